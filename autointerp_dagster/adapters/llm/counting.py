"""How many tokens requests have, counted before anything is sent, and what a prefix cache has.

A prefix cache has what two prompts begin with alike: the messages that all prompts of a kind share,
and in a unit (a latent's prompts under one explanation) what the question begins with. Servers
cache whole blocks (vLLM 16 tokens, OpenAI 128 from 1,024 on), so they serve a little less.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from autointerp_dagster.adapters.llm.factory import find_model
from autointerp_dagster.adapters.llm.remote.reply import TOKENS_PER_MESSAGE
from autointerp_dagster.core.config.models import LLMConfig, LocalLLMConfig
from autointerp_dagster.core.errors import ModelError
from autointerp_dagster.core.llm import IntegerList, LabelList, Message, Request, estimated_tokens

Messages = Sequence[Message]


class PromptTokens(NamedTuple):
    """Of one prompt."""

    total: int
    shared: int
    """Of these, those that a prefix cache would have from the prompts before it."""


class Tokens(Protocol):
    """A way to count tokens."""

    description: str
    """What counts, for people."""

    def of_text(self, text: str) -> int:
        """Tokens of a text by itself."""
        ...

    def of_labels(self, n: int) -> int:
        """Tokens of an answer that is a list of ``n`` labels."""
        ...

    def of_chat(self, shared: Messages, rest: Messages) -> int:
        """Tokens that ``rest`` adds to a chat that begins with ``shared``.

        Args:
            shared: May be empty.
            rest: If not empty, the model's turn follows it.
        """
        ...

    def of_shared(self, shared: Messages) -> int:
        """Tokens of the beginning of a chat."""
        ...


class EstimatedTokens:
    """Counts where no tokenizer is at hand; see ``core.llm.estimated_tokens``."""

    description = (
        f"an estimate: one token per 3.5 bytes and {TOKENS_PER_MESSAGE} per message "
        "(for exact counts name the model's tokenizer)"
    )

    def of_text(self, text: str) -> int:
        """See :class:`Tokens`."""
        return estimated_tokens(text)

    def of_labels(self, n: int) -> int:
        """A digit and a separator or bracket each, and the opening bracket."""
        return 2 * n + 1

    def of_chat(self, shared: Messages, rest: Messages) -> int:
        """See :class:`Tokens`."""
        del shared
        return sum(estimated_tokens(m.content) + TOKENS_PER_MESSAGE for m in rest)

    def of_shared(self, shared: Messages) -> int:
        """See :class:`Tokens`."""
        return self.of_chat((), shared)


class TokenizerTokens:
    """Counts with a tokenizer of the transformers library, and its chat template if it has one."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        """Count with ``tokenizer``, called ``name`` in the description."""
        self._tokenizer = tokenizer
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        self.description = f"the tokenizer {name}"
        if not self._has_template:
            self.description += f" (no chat template: {TOKENS_PER_MESSAGE} more per message)"

    def of_text(self, text: str) -> int:
        """See :class:`Tokens`."""
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def of_labels(self, n: int) -> int:
        """The list as JSON."""
        return self.of_text(json.dumps([0] * n))

    def of_chat(self, shared: Messages, rest: Messages) -> int:
        """Exact but for a token that would span the border, which templates do not have."""
        if not self._has_template:
            return sum(self.of_text(m.content) + TOKENS_PER_MESSAGE for m in rest)
        whole = self._rendered([*shared, *rest], is_question=True)
        before = self._rendered(shared, is_question=False) if shared else ""
        if whole.startswith(before):
            return self.of_text(whole[len(before) :])
        return max(0, self.of_text(whole) - self.of_text(before))

    def of_shared(self, shared: Messages) -> int:
        """See :class:`Tokens`."""
        if not self._has_template:
            return self.of_chat((), shared)
        return self.of_text(self._rendered(shared, is_question=False)) if shared else 0

    def _rendered(self, messages: Messages, *, is_question: bool) -> str:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        return self._tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=is_question
        )


class PromptCounter:
    """Counts prompts in the order in which they would be sent to one model."""

    def __init__(self, tokens: Tokens) -> None:
        """Count with ``tokens``; nothing was sent yet."""
        self.tokens = tokens
        self._n_shared: dict[tuple[Message, ...], int] = {}
        self._unit = ""
        self._last = ""

    def count(self, request: Request) -> PromptTokens:
        """Tokens of a prompt that follows those counted before."""
        if request.prompt is not None:
            total, n_before = self.tokens.of_text(request.prompt), 0
            question = request.prompt
        else:
            shared = request.messages[: request.n_shared]
            rest = request.messages[request.n_shared :]
            is_new = shared not in self._n_shared
            if is_new:
                self._n_shared[shared] = self.tokens.of_shared(shared)
            n_static = self._n_shared[shared]
            total = n_static + self.tokens.of_chat(shared, rest)
            n_before = 0 if is_new else n_static
            question = rest[0].content if rest else ""
        n_alike = self._n_alike(request.unit, question)
        return PromptTokens(total, min(total, n_before + n_alike))

    def _n_alike(self, unit: str, question: str) -> int:
        """Tokens with which a question begins like the last one, if they are of one unit."""
        is_same = unit == self._unit
        common = _common(self._last, question) if is_same else ""
        self._unit, self._last = unit, question
        return self.tokens.of_text(common) if common else 0


def completion_tokens(request: Request, tokens: Tokens) -> int | None:
    """Tokens of an answer whose format decides them (a list); null for any other."""
    if isinstance(request.answer, LabelList | IntegerList):
        return min(request.max_tokens, tokens.of_labels(request.answer.n))
    return None


def open_tokens(config: LLMConfig) -> Tokens:
    """The way to count that a study's model has: its tokenizer if it is known, else an estimate.

    Raises:
        ModelError: If the tokenizer cannot be had.
    """
    if isinstance(config, LocalLLMConfig):
        return _tokenizer(config.source, str(find_model(config)), None)
    if config.tokenizer is None:
        return EstimatedTokens()
    return _tokenizer(config.tokenizer, config.tokenizer, "tokenizer")


def _tokenizer(name: str, source: str, key: str | None) -> Tokens:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = Path(source) / "tokenizer.json"
    is_bare = file.is_file() and not file.with_name("tokenizer_config.json").is_file()
    try:
        if is_bare:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
        else:
            tokenizer = AutoTokenizer.from_pretrained(source)
        return TokenizerTokens(tokenizer, name)
    except (OSError, ValueError) as error:
        where = f"models: {key}: " if key else "model "
        raise ModelError(
            f"{where}{name!r}: neither a folder with a tokenizer nor one on the hub that can be "
            f"had ({type(error).__name__}). Correct the name, or leave it out for an estimate."
        ) from error


def _common(one: str, other: str) -> str:
    """The longest common beginning."""
    n = min(len(one), len(other))
    differs = (i for i in range(n) if one[i] != other[i])
    return one[: next(differs, n)]
