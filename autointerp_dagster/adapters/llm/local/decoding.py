"""Decoding under guidance: label lists whose form is forced, and one line of free text.

Every row depends on its own prompt and parameters; a draw has a generator seeded by its call.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicCache

from autointerp_dagster.adapters.llm.backend import FULL_LINE, Reply
from autointerp_dagster.adapters.llm.local.model import Batch, LocalModel
from autointerp_dagster.adapters.llm.local.prompts import Prompt, label_form
from autointerp_dagster.core.llm import FreeText, LabelList, Token, Usage

NGRAM = 3
"""A run of this many generated tokens is never repeated: small models loop otherwise."""
OPENERS = 64
"""Candidates for the first word; end of turn and blanks among them are passed over."""

_NEVER = float("-inf")


def decode_labels(model: LocalModel, kept: DynamicCache, prompts: Sequence[Prompt]) -> list[Reply]:
    """One label list per prompt; the model only chooses between 0 and 1 at each place.

    Args:
        model: The model.
        kept: Cache of a prefix of every prompt; not written to.
        prompts: Requests for label lists, each longer than the prefix.

    Returns:
        In order. ``tokens`` are the labels alone, with both candidates' raw log-probabilities.
    """
    form = label_form(model.tokenizer)
    prefix_len = int(kept.get_seq_length())
    batch = Batch(kept, len(prompts))
    n_labels = [_n_labels(prompt) for prompt in prompts]
    draws = [Draw(prompt) for prompt in prompts]
    chosen: list[list[Token]] = [[] for _ in prompts]
    steps: list[tuple[int, ...]] = [prompt.ids[prefix_len:] for prompt in prompts]
    for place in range(max(n_labels)):
        candidates = form.first if place == 0 else form.later
        logprobs = torch.log_softmax(model.fine_logits(batch, steps), dim=-1)
        steps = [()] * len(prompts)
        for row, n in enumerate(n_labels):
            if place < n:
                token = _label(logprobs[row, list(candidates)], draws[row])
                chosen[row].append(token)
                if place + 1 < n:
                    steps[row] = (candidates[int(token.text)], *form.separator)
    return [
        Reply(
            text="[" + ", ".join(token.text for token in tokens) + "]",
            finish_reason="stop",
            tokens=tuple(tokens),
            usage=Usage(len(prompt.ids), prefix_len, len(tokens)),
        )
        for prompt, tokens in zip(prompts, chosen, strict=True)
    ]


def decode_text(model: LocalModel, kept: DynamicCache, prompts: Sequence[Prompt]) -> list[Reply]:
    """One line per prompt after its marker, up to ``max_tokens``, a line break or the turn's end.

    Args:
        model: The model.
        kept: Cache of a prefix of every prompt; not written to.
        prompts: Requests for free text, each longer than the prefix.
    """
    prefix_len = int(kept.get_seq_length())
    batch = Batch(kept, len(prompts))
    lines = [Line(prompt) for prompt in prompts]
    steps: list[tuple[int, ...]] = [prompt.ids[prefix_len:] for prompt in prompts]
    while any(line.finish_reason is None for line in lines):
        logits = model.logits(batch, steps)
        for row, line in enumerate(lines):
            steps[row] = () if line.finish_reason is not None else line.grow(model, logits[row])
    return [line.reply(model, prefix_len) for line in lines]


class Draw:
    """The choices of one call: the most probable, or drawn from the call's own generator.

    The generator is seeded by the call's id: a hash of the question, its seed and sample index.
    """

    def __init__(self, prompt: Prompt) -> None:
        self._temperature = prompt.request.temperature
        self._generator = torch.Generator().manual_seed(int(prompt.call_id[:15], 16))

    def __call__(self, logits: Float[Tensor, " candidate"]) -> int:
        """Index of the next choice; the first of equals at temperature 0."""
        if self._temperature == 0:
            return int(logits.argmax())
        weights = torch.softmax(logits / self._temperature, dim=-1)
        return int(torch.multinomial(weights, 1, generator=self._generator))


@dataclass(slots=True)
class Line:
    """One line of free text as it grows."""

    prompt: Prompt
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    draw: Draw = field(init=False)

    def __post_init__(self) -> None:
        self.draw = Draw(self.prompt)

    def grow(self, model: LocalModel, logits: Float[Tensor, " token"]) -> tuple[int, ...]:
        """Choose the next token; what is to be fed, or nothing if the line has ended."""
        logits = self._without_loops(logits.clone())
        if not self.ids:
            logits = self._without_blanks(model, logits)
        token = self.draw(logits)
        if token in model.stop_ids:
            self.finish_reason = "stop"
            return ()
        self.ids.append(token)
        if "\n" in model.tokenizer.decode([token]):
            self.finish_reason = "stop"
        elif len(self.ids) >= self.prompt.request.max_tokens:
            self.finish_reason = FULL_LINE
        return () if self.finish_reason is not None else (token,)

    def reply(self, model: LocalModel, prefix_len: int) -> Reply:
        """The finished line, marker included."""
        answer = self.prompt.request.answer
        assert isinstance(answer, FreeText)
        text = model.tokenizer.decode(self.ids, skip_special_tokens=True).strip()
        line = text.split("\n", maxsplit=1)[0].strip()
        return Reply(
            text=f"{answer.marker} {line}",
            finish_reason=self.finish_reason or "stop",
            usage=Usage(len(self.prompt.ids), prefix_len, len(self.ids)),
        )

    def _without_loops(self, logits: Float[Tensor, " token"]) -> Float[Tensor, " token"]:
        last = self.ids[len(self.ids) - NGRAM + 1 :]
        for start in range(len(self.ids) - NGRAM + 1):
            if self.ids[start : start + NGRAM - 1] == last:
                logits[self.ids[start + NGRAM - 1]] = _NEVER
        return logits

    def _without_blanks(
        self, model: LocalModel, logits: Float[Tensor, " token"]
    ) -> Float[Tensor, " token"]:
        """An answer has at least one word: an empty one would only be asked for again."""
        for token in logits.topk(min(OPENERS, len(logits))).indices.tolist():
            if token in model.stop_ids or not model.tokenizer.decode([token]).strip():
                logits[token] = _NEVER
        return logits


def _n_labels(prompt: Prompt) -> int:
    answer = prompt.request.answer
    assert isinstance(answer, LabelList)
    return answer.n


def _label(logprobs: Float[Tensor, "2"], draw: Draw) -> Token:
    """The label chosen between 0 and 1; equal log-probabilities give 0."""
    both = [(str(digit), float(logprob)) for digit, logprob in enumerate(logprobs)]
    text, logprob = both[draw(logprobs)]
    return Token(text, logprob, tuple(sorted(both, key=lambda pair: -pair[1])))
