"""One question to a language model, its answer, and what it cost."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from autointerp_dagster.core.llm.answers import Answer, Token
from autointerp_dagster.core.schemas import VerdictReason


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class JournalBlock:
    """Where a call is kept, so that a cell reads only its own calls."""

    stage: str
    """The asset that asks, e.g. ``score_detection``."""
    coder_hash: str
    """Hash of the coder's weights."""
    block: int
    """``latent // 4096``."""


@dataclass(frozen=True, slots=True)
class Request:
    """One question to a language model. Its parameters travel with it."""

    messages: tuple[Message, ...]
    """For a chat model; empty if there is a ``prompt``."""
    answer: Answer
    """The format that the answer must have."""
    unit: str
    """Requests of a unit (one latent's prompts) run together on a local model; not in the hash."""
    block: JournalBlock
    """Not in the hash."""
    prompt: str | None = None
    """Plain text for a base model, wanted by ``Continuation`` and ``PromptScores``."""
    n_shared: int = 0
    """How many leading messages other requests share (few-shots); a hint, not in the hash."""
    temperature: float = 0.0
    max_tokens: int = 64
    top_logprobs: int = 0
    """How many candidates to return per token; 0 asks for no log-probabilities."""
    seed: int | None = None
    attempt: int = 0
    """> 0 when the question is asked again after a faulty answer."""
    sample: int = 0
    """Which of several answers to the same question."""

    def call_id(self, model_identity: str) -> str:
        """The call's address: a hash of everything that decides the answer.

        Args:
            model_identity: Endpoint and model name, or the hash of a local model's weights.
        """
        content: dict[str, Any] = {
            "model": model_identity,
            "messages": [[m.role, m.content] for m in self.messages],
            "answer": self.answer.identity,
            "parameters": [float(self.temperature), self.max_tokens, self.top_logprobs, self.seed],
            "attempt": self.attempt,
            "sample": self.sample,
        }
        if self.prompt is not None:
            content["prompt"] = self.prompt
        canonical = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def estimated_tokens(text: str) -> int:
    """Tokens of a text where no tokenizer is at hand: one per 3.5 bytes of UTF-8, rounded up.

    English prose has 4 to 4.5 bytes per token, code and names about 3.5: rather too many than too
    few.
    """
    return -(-2 * len(text.encode()) // 7)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a call cost."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt tokens, those that a prefix cache served."""
    completion_tokens: int = 0
    usd: float = 0.0
    estimated_tokens: int = 0
    """Of all tokens, those estimated because the server reported none."""

    @property
    def n_tokens(self) -> int:
        """Prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: "Usage") -> "Usage":
        """The sum, field by field."""
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
            self.usd + other.usd,
            self.estimated_tokens + other.estimated_tokens,
        )

    def __sub__(self, other: "Usage") -> "Usage":
        """The difference, field by field."""
        return Usage(
            self.prompt_tokens - other.prompt_tokens,
            self.cached_tokens - other.cached_tokens,
            self.completion_tokens - other.completion_tokens,
            self.usd - other.usd,
            self.estimated_tokens - other.estimated_tokens,
        )


@dataclass(frozen=True, slots=True)
class Completion:
    """The final answer to a request: after retries, or the reason why there is none."""

    call_id: str
    text: str | None
    """Null if the call failed for good."""
    tokens: tuple[Token, ...] | None = None
    """Null where the endpoint gave no log-probabilities."""
    reason: VerdictReason | None = None
    """Null if the answer has the format asked for."""
    n_calls: int = 1
    """How often the model was asked."""
    from_journal: bool = False
    usage: Usage = Usage()
    """What this run paid; zero if the journal answered."""
    cost: Usage = Usage()
    """What the answer cost when it was paid for, in this run or an earlier one."""


@runtime_checkable
class LLM(Protocol):
    """A language model with its journal, retries, flow control and budget behind it."""

    identity: str
    """Endpoint and model, or the hash of the local weights; part of every call_id."""

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion]]:
        """Every request with its completion, in any order, as they come.

        Requests are drawn lazily, so a generator of millions is fine. A request that fails for good
        comes back with a reason; nothing is raised for it, and nothing vanishes.

        Raises:
            LLMError: If the endpoint cannot be reached at all.
        """
        ...
