"""From a request to tokens: a chat with a forced beginning of the answer, or a plain text.

A plain text is tokenised like the subject model's contexts: BOS first wherever the tokenizer has
one, and a special token's name in the text is plain text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

from autointerp_dagster.core.errors import ModelError
from autointerp_dagster.core.llm import (
    Choice,
    Continuation,
    FreeText,
    IntegerList,
    LabelList,
    Message,
    PromptScores,
    Request,
)

Spellings = dict[tuple[int, ...], int]
"""Integers by the tokens that spell them."""


@dataclass(frozen=True, slots=True)
class LabelForm:
    """How a tokenizer spells ``[0, 1, ...]``: forced tokens, and the choice at each label."""

    opening: tuple[int, ...]
    """Before the first label."""
    first: tuple[int, int]
    """The tokens that read as 0 and as 1 in the first place."""
    separator: tuple[int, ...]
    """Between labels."""
    later: tuple[int, int]
    """The tokens for 0 and 1 in later places."""


@dataclass(frozen=True, slots=True)
class IntegerForm:
    """How a tokenizer spells ``[3, 10, ...]``."""

    opening: tuple[int, ...]
    """Before the first number."""
    first: Spellings
    """Numbers in the first place, by their tokens."""
    separator: tuple[int, ...]
    """Between numbers; not empty."""
    later: Spellings
    """Numbers in later places, by their tokens."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request as tokens, ready for the first token that the model chooses."""

    request: Request
    call_id: str
    ids: tuple[int, ...]
    n_static: int | None
    """Leading tokens that the request's shared messages decide; less than all. Null for a plain
    text, of which nobody says how much others share."""
    options: tuple[tuple[int, ...], ...] = ()
    """The tokens of each option of a choice, as they follow ``ids``."""
    pieces: tuple[str, ...] = ()
    """The text of each of the last tokens, those whose log-probabilities are wanted."""

    @property
    def static(self) -> tuple[int, ...] | None:
        """The tokens whose cache is kept between units; null for a plain text."""
        return None if self.n_static is None else self.ids[: self.n_static]

    @property
    def given(self) -> tuple[int, ...]:
        """The tokens before the first place at which the model's output is wanted."""
        return self.ids[: max(0, len(self.ids) - len(self.pieces) - 1)]


@lru_cache(maxsize=16)
def label_form(tokenizer: Any) -> LabelForm:
    """The label form of a tokenizer.

    Raises:
        ModelError: If 0 and 1 are not single tokens there.
    """
    opening, first = _choice(tokenizer, "[0", "[1")
    between, later = _choice(tokenizer, "[0, 0", "[0, 1")
    n_before = len(opening) + 1
    if between[:n_before] != (*opening, first[0]):
        raise _no_form()
    return LabelForm(opening, first, between[n_before:], later)


@lru_cache(maxsize=16)
def integer_form(tokenizer: Any, lo: int, hi: int) -> IntegerForm:
    """The form of a tokenizer for integers from ``lo`` to ``hi``.

    Raises:
        ModelError: If numbers in a list are not tokens of their own there.
    """
    numbers = range(lo, hi + 1)
    firsts = [encoded(tokenizer, f"[{number}") for number in numbers]
    n_opening = min(common_len(firsts), min(map(len, firsts)) - 1)
    first = {ids[n_opening:]: number for ids, number in zip(firsts, numbers, strict=True)}
    start = firsts[0]
    laters = [encoded(tokenizer, f"[{lo}, {number}") for number in numbers]
    n_before = min(common_len(laters), min(map(len, laters)) - 1)
    later = {ids[n_before:]: number for ids, number in zip(laters, numbers, strict=True)}
    separator = laters[0][len(start) : n_before]
    if laters[0][: len(start)] != start or not separator or len(later) != len(numbers):
        raise ModelError(
            "tokenizer: got numbers that merge with what stands around them, wanted tokens of "
            "their own in '[0, 1]'. Serve this model with vLLM and use its base_url."
        )
    return IntegerForm(start[:n_opening], first, separator, later)


def prompt_of(tokenizer: Any, request: Request, call_id: str) -> Prompt:
    """The tokens of a request, up to and with the forced beginning of the answer.

    Raises:
        ModelError: If a chat is asked of a model without chat template.
        ValueError: If the request has a chat where its format wants a plain text, or the reverse.
    """
    answer = request.answer
    wants_text = isinstance(answer, Continuation | PromptScores)
    if wants_text != (request.prompt is not None) or wants_text == bool(request.messages):
        raise ValueError(
            f"request of unit {request.unit!r}: {type(answer).__name__} wants "
            f"{'a prompt and no messages' if wants_text else 'messages and no prompt'}."
        )
    if isinstance(answer, Continuation | PromptScores):
        return _plain(tokenizer, request, call_id)
    text = _rendered(tokenizer, request.messages, is_question=True)
    options: tuple[tuple[int, ...], ...] = ()
    if isinstance(answer, LabelList):
        ids = (*encoded(tokenizer, text), *label_form(tokenizer).opening)
    elif isinstance(answer, IntegerList):
        opening = integer_form(tokenizer, answer.lo, answer.hi).opening
        ids = (*encoded(tokenizer, text), *opening)
    elif isinstance(answer, FreeText):  # small models never write the marker by themselves
        ids = encoded(tokenizer, text + answer.marker)
    else:
        ids, options = _with_options(tokenizer, text, answer)
    shared = request.messages[: request.n_shared]
    n_static = common_len([ids[:-1], _static_ids(tokenizer, shared)]) if shared else 0
    return Prompt(request, call_id, ids, n_static, options)


def encoded(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of text that already holds its special tokens."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def common_len(rows: list[tuple[int, ...]]) -> int:
    """Length of the longest common prefix of all rows."""
    shortest, longest = min(rows), max(rows)
    for i, (one, other) in enumerate(zip(shortest, longest, strict=False)):
        if one != other:
            return i
    return min(len(shortest), len(longest))


def pieces_of(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """What each token stands for; joined they are ``text``.

    A character spread over several tokens stands whole at the last of them, as in
    :class:`~autointerp_dagster.adapters.tokenizers.HFDetokenizer`; the others are empty or what
    they hold before it. What a tokenizer leaves out belongs to the token that follows, and at the
    end of the text to the last.

    Args:
        text: The tokenised text.
        spans: Start and end of each token in characters.
    """
    if not spans:
        return []
    ends = [min(end, start) for (_, end), (start, _) in pairwise(spans)]
    borders = [0, *accumulate(ends, max), len(text)]
    return [text[start:stop] for start, stop in pairwise(borders)]


def _plain(tokenizer: Any, request: Request, call_id: str) -> Prompt:
    """A plain text: its tokens after BOS, and the pieces of those that are to be scored."""
    if not tokenizer.is_fast:
        raise ModelError(
            f"{tokenizer.name_or_path}: its tokenizer does not tell where in the text a token is, "
            "wanted a fast tokenizer. Save one as tokenizer.json."
        )
    text = request.prompt or ""
    tokens = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    bos = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    pieces: list[str] = []
    if isinstance(request.answer, PromptScores):
        spans = tokens["offset_mapping"]
        n_given = sum(end <= request.answer.start for _, end in spans)
        pieces = pieces_of(text, spans)[n_given:]
    return Prompt(request, call_id, (*bos, *tokens["input_ids"]), None, pieces=tuple(pieces))


def _with_options(
    tokenizer: Any, text: str, answer: Choice
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The tokens that the question and all its answers begin with, and each option's after them."""
    question = encoded(tokenizer, text)
    whole = [encoded(tokenizer, text + option) for option in answer.options]
    n_before = common_len([question, *whole])
    return question[:n_before], tuple(ids[n_before:] for ids in whole)


@lru_cache(maxsize=16)
def _static_ids(tokenizer: Any, shared: tuple[Message, ...]) -> tuple[int, ...]:
    return encoded(tokenizer, _rendered(tokenizer, shared, is_question=False))


def _rendered(tokenizer: Any, messages: tuple[Message, ...], *, is_question: bool) -> str:
    if not tokenizer.chat_template:
        raise ModelError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template, wanted a chat model. "
            "Use an instruct variant as explainer and judge; a base model continues and scores "
            "plain text only."
        )
    turns = [{"role": m.role, "content": m.content} for m in messages]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=is_question)


def _choice(tokenizer: Any, zero: str, one: str) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Common tokens of two spellings, and the last token of each, in which alone they differ."""
    ids_0, ids_1 = encoded(tokenizer, zero), encoded(tokenizer, one)
    if len(ids_0) != len(ids_1) or ids_0[:-1] != ids_1[:-1] or ids_0 == ids_1:
        raise _no_form()
    return ids_0[:-1], (ids_0[-1], ids_1[-1])


def _no_form() -> ModelError:
    return ModelError(
        "tokenizer: got labels of several tokens, wanted one token each for 0 and 1 in '[0, 1]'. "
        "Serve this model with vLLM and use its base_url."
    )
