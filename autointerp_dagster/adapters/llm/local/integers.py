"""Decoding a list of integers whose form is forced; the model only chooses the integers.

A number may have several tokens (``10`` is ``1`` and ``0`` to many tokenizers): after each token
the model chooses between the numbers that go on and the end of the number.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicCache

from autointerp_dagster.adapters.llm.backend import Reply
from autointerp_dagster.adapters.llm.local.decoding import Draw
from autointerp_dagster.adapters.llm.local.model import Batch, LocalModel
from autointerp_dagster.adapters.llm.local.prompts import (
    IntegerForm,
    Prompt,
    Spellings,
    integer_form,
)
from autointerp_dagster.core.llm import IntegerList, Usage


def decode_integers(
    model: LocalModel, kept: DynamicCache, prompts: Sequence[Prompt]
) -> list[Reply]:
    """One list of integers per prompt, of the length and within the bounds asked for.

    Args:
        model: The model.
        kept: Cache of a prefix of every prompt; not written to.
        prompts: Requests for integer lists, each longer than the prefix.

    Returns:
        In order, without log-probabilities.
    """
    prefix_len = int(kept.get_seq_length())
    batch = Batch(kept, len(prompts))
    lists = [_List.of(model, prompt) for prompt in prompts]
    steps: list[tuple[int, ...]] = [prompt.ids[prefix_len:] for prompt in prompts]
    while not all(one.is_done for one in lists):
        logits = model.fine_logits(batch, steps)
        steps = [
            () if one.is_done else one.grow(row) for one, row in zip(lists, logits, strict=True)
        ]
    return [
        Reply(
            text=str(one.numbers),
            finish_reason="stop",
            usage=Usage(len(prompt.ids), prefix_len, one.n_chosen),
        )
        for prompt, one in zip(prompts, lists, strict=True)
    ]


@dataclass(slots=True)
class _List:
    """One list as it grows."""

    n: int
    form: IntegerForm
    draw: Draw
    numbers: list[int] = field(default_factory=list)
    n_chosen: int = 0
    begun: tuple[int, ...] = ()
    """Tokens of the number that is being written."""

    @classmethod
    def of(cls, model: LocalModel, prompt: Prompt) -> "_List":
        answer = prompt.request.answer
        assert isinstance(answer, IntegerList)
        form = integer_form(model.tokenizer, answer.lo, answer.hi)
        return cls(answer.n, form, Draw(prompt))

    @property
    def is_done(self) -> bool:
        return len(self.numbers) >= self.n

    def grow(self, logits: Float[Tensor, " token"]) -> tuple[int, ...]:
        """Choose the next token; what is to be fed, or nothing once the list is whole."""
        options = self.form.later if self.numbers else self.form.first
        allowed = self._allowed(options)
        token = allowed[self.draw(logits[torch.tensor(allowed)])]
        self.n_chosen += 1
        whole = (*self.begun, token)
        if self.begun in options and token == self.form.separator[0]:
            return self._take(options[self.begun], self.form.separator)
        if whole in options and not _goes_on(options, whole):
            return self._take(options[whole], (token, *self.form.separator))
        self.begun = whole
        return (token,)

    def _allowed(self, options: Spellings) -> list[int]:
        n = len(self.begun)
        following = {ids[n] for ids in options if ids[:n] == self.begun and len(ids) > n}
        if self.begun in options:
            following.add(self.form.separator[0])
        return sorted(following)

    def _take(self, number: int, fed: tuple[int, ...]) -> tuple[int, ...]:
        self.numbers.append(number)
        self.begun = ()
        return () if self.is_done else fed


def _goes_on(options: Spellings, begun: tuple[int, ...]) -> bool:
    return any(len(ids) > len(begun) and ids[: len(begun)] == begun for ids in options)
