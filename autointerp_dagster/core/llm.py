"""What the science asks of a language model, and what it gets back.

Scorers and explainers build :class:`Request` objects and read :class:`Completion` objects; somebody
else sends them, so batching, retries, the journal and the budget live once.
"""

import hashlib
import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from autointerp_dagster.core.schemas import VerdictReason

_LABEL = re.compile(r"[01]|true|false", re.IGNORECASE)
_ITEM = r"""["']?(?:[01]|true|false)["']?"""
_LABEL_LIST = re.compile(rf"\[\s*{_ITEM}(?:\s*,\s*{_ITEM})*\s*,?\s*\]", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class LabelReading(NamedTuple):
    """One label of an answer."""

    prediction: bool
    probability: float | None
    """P(1) / (P(0) + P(1)) over the returned candidates; null where none was returned."""


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token with the log-probabilities the endpoint returned."""

    text: str
    logprob: float
    """Natural logarithm, <= 0."""
    top: tuple[tuple[str, float], ...] = ()
    """The most probable candidates at this place and their log-probabilities."""


@dataclass(frozen=True, slots=True)
class FreeText:
    """An answer in prose whose last line starts with ``marker``."""

    marker: str = "[EXPLANATION]:"

    def fault(self, text: str) -> str | None:
        """What is wrong with the format, in words a model can act on; null if nothing is."""
        if self.read(text) is None:
            return f"the last line did not start with {self.marker} and a text after it"
        return None

    def read(self, text: str) -> str | None:
        """The text after the last marker, on one line; null if there is none.

        The marker may be in any case and in Markdown emphasis (``**[Explanation]:** words``).
        """
        _, *after_markers = re.split(re.escape(self.marker), text, flags=re.IGNORECASE)
        if not after_markers:
            return None
        line = after_markers[-1].lstrip("*_ \t\r\n").split("\n", maxsplit=1)[0].strip()
        if line.count("**") % 2:
            line = line.removesuffix("**").rstrip()
        return line or None


@dataclass(frozen=True, slots=True)
class LabelList:
    """An answer that is a JSON list of ``n`` zeros and ones, e.g. ``[1, 0, 0]``.

    The last list of the text counts. Quoted digits and ``true`` / ``false`` are read too; what
    stands around the list (prose, code fences, an object) is ignored.
    """

    n: int

    @property
    def json_schema(self) -> dict[str, object]:
        """For endpoints with structured outputs."""
        items = {"type": "integer", "enum": [0, 1]}
        return {"type": "array", "items": items, "minItems": self.n, "maxItems": self.n}

    def fault(self, text: str) -> str | None:
        """What is wrong with the format, in words a model can act on; null if nothing is."""
        labels = self._labels(text)
        if labels is None:
            return "there was no list of zeros and ones"
        if len(labels) != self.n:
            return f"the list had {len(labels)} entries instead of {self.n}"
        return None

    def read(self, text: str, tokens: tuple[Token, ...] | None) -> list[LabelReading] | None:
        """One reading per label, in order; null if the format is faulty.

        Args:
            text: The whole answer.
            tokens: The answer's tokens with log-probabilities, where the endpoint gave them.
        """
        labels = self._labels(text)
        if labels is None or len(labels) != self.n:
            return None
        return [
            LabelReading(label, probability)
            for label, probability in zip(labels, self._probabilities(tokens), strict=True)
        ]

    def _labels(self, text: str) -> list[bool] | None:
        places = _label_places(text)
        return None if places is None else [text[place] in "1tT" for place in places]

    def _probabilities(self, tokens: tuple[Token, ...] | None) -> list[float | None]:
        slots = self._slots(tokens or ())
        return [None if token is None else _probability_of_one(token) for token in slots]

    def _slots(self, tokens: tuple[Token, ...]) -> list[Token | None]:
        """The token that carries each label; null where one token carries several."""
        places = _label_places("".join(token.text for token in tokens))
        if places is None:  # guided decoding returns the label tokens alone
            slots: list[Token | None] = [token for token in tokens if _digit(token.text)]
        else:
            ends = list(accumulate(len(token.text) for token in tokens))
            owners = [bisect_right(ends, place) for place in places]
            slots = [tokens[owner] if owners.count(owner) == 1 else None for owner in owners]
        return slots if len(slots) == self.n else [None] * self.n


def _label_places(text: str) -> list[int] | None:
    """Where each label of the last list starts in ``text``; null if there is no list."""
    lists = list(_LABEL_LIST.finditer(text))
    if not lists:
        return None
    start, stop = lists[-1].span()
    return [label.start() for label in _LABEL.finditer(text, start, stop)]


def _digit(token: str) -> str | None:
    """The label that a token reads as, e.g. ``"1"`` for ``" 1"`` and ``"[1,"``."""
    label = token.strip(" \n\t[],\"'")
    return label if label in ("0", "1") else None


def _probability_of_one(token: Token) -> float | None:
    mass = {"0": 0.0, "1": 0.0}
    for text, logprob in token.top:
        digit = _digit(text)
        if digit is not None and not math.isnan(logprob):
            mass[digit] += math.exp(logprob)
    total = mass["0"] + mass["1"]
    return mass["1"] / total if total > 0 else None


Answer = FreeText | LabelList


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
    """One question to a chat model. Its parameters travel with it."""

    messages: tuple[Message, ...]
    answer: Answer
    """The format that the answer must have."""
    unit: str
    """Requests of a unit (one latent's prompts) run together on a local model; not in the hash."""
    block: JournalBlock
    """Not in the hash."""
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
        content = {
            "model": model_identity,
            "messages": [[m.role, m.content] for m in self.messages],
            "answer": [type(self.answer).__name__, repr(self.answer)],
            "parameters": [self.temperature, self.max_tokens, self.top_logprobs, self.seed],
            "attempt": self.attempt,
            "sample": self.sample,
        }
        canonical = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a call cost."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt tokens, those that a prefix cache served."""
    completion_tokens: int = 0
    usd: float = 0.0

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
