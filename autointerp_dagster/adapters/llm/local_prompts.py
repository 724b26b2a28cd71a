"""From a request to tokens: the chat template, and an assistant turn whose beginning is forced."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from autointerp_dagster.core.errors import ModelError
from autointerp_dagster.core.llm import LabelList, Message, Request


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
class Prompt:
    """A request as tokens, ready for the first token that the model chooses."""

    request: Request
    call_id: str
    ids: tuple[int, ...]
    n_static: int
    """Leading tokens that the request's shared messages decide; less than all."""

    @property
    def static(self) -> tuple[int, ...]:
        """The tokens whose cache is kept between units."""
        return self.ids[: self.n_static]


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


def prompt_of(tokenizer: Any, form: LabelForm, request: Request, call_id: str) -> Prompt:
    """The tokens of a request, up to and with the forced beginning of the answer."""
    text = _rendered(tokenizer, request.messages, is_question=True)
    if isinstance(request.answer, LabelList):
        ids = (*encoded(tokenizer, text), *form.opening)
    else:  # small models never write the marker by themselves
        ids = encoded(tokenizer, text + request.answer.marker)
    shared = request.messages[: request.n_shared]
    n_static = common_len([ids[:-1], _static_ids(tokenizer, shared)]) if shared else 0
    return Prompt(request, call_id, ids, n_static)


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


@lru_cache(maxsize=16)
def _static_ids(tokenizer: Any, shared: tuple[Message, ...]) -> tuple[int, ...]:
    return encoded(tokenizer, _rendered(tokenizer, shared, is_question=False))


def _rendered(tokenizer: Any, messages: tuple[Message, ...], *, is_question: bool) -> str:
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
