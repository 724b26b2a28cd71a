"""Plain text written on by the model, up to a stop string, a special token or a number of tokens.

Nothing guides the model here. Every row depends on its own prompt and parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicCache

from autointerp_dagster.adapters.llm.backend import Reply
from autointerp_dagster.adapters.llm.local.decoding import Draw
from autointerp_dagster.adapters.llm.local.model import Batch, LocalModel
from autointerp_dagster.adapters.llm.local.prompts import Prompt
from autointerp_dagster.adapters.llm.local.scores import Top, top_of
from autointerp_dagster.core.llm import Continuation, Token, Usage


def continue_text(model: LocalModel, kept: DynamicCache, prompts: Sequence[Prompt]) -> list[Reply]:
    """What the model writes after each prompt; greedy at temperature 0, else drawn.

    Args:
        model: The model.
        kept: Cache of a prefix of every prompt; not written to.
        prompts: Requests for a continuation, each longer than the prefix.

    Returns:
        In order. A special token (the end of a turn or document) ends a text like a stop string,
        and neither is part of it. ``tokens``, where asked for, joined are the text; their
        log-probabilities are the model's, before the temperature.
    """
    prefix_len = int(kept.get_seq_length())
    batch = Batch(kept, len(prompts))
    texts = [_Text(prompt) for prompt in prompts]
    steps: list[tuple[int, ...]] = [prompt.ids[prefix_len:] for prompt in prompts]
    while any(text.finish_reason is None for text in texts):
        logprobs = torch.log_softmax(model.fine_logits(batch, steps), dim=-1)
        for row, text in enumerate(texts):
            steps[row] = () if text.finish_reason is not None else text.grow(model, logprobs[row])
    return [text.reply(prefix_len) for text in texts]


@dataclass(slots=True)
class _Text:
    """One continuation as it grows."""

    prompt: Prompt
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[Top] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    draw: Draw = field(init=False)

    def __post_init__(self) -> None:
        self.draw = Draw(self.prompt)

    def grow(self, model: LocalModel, logprobs: Float[Tensor, " token"]) -> tuple[int, ...]:
        """Choose the next token; what is to be fed, or nothing if the text has ended."""
        token = self.draw(logprobs)
        if token in model.special_ids:
            self.finish_reason = "stop"
            return ()
        self.ids.append(token)
        self.logprobs.append(float(logprobs[token]))
        self.tops.append(top_of(model, logprobs, self.prompt.request.top_logprobs))
        self._read(model)
        if self.finish_reason is None and len(self.ids) >= self.prompt.request.max_tokens:
            self.finish_reason = "length"
        return () if self.finish_reason is not None else (token,)

    def reply(self, prefix_len: int) -> Reply:
        """The finished text."""
        return Reply(
            text=self.text,
            finish_reason=self.finish_reason or "stop",
            tokens=self._tokens() if self.prompt.request.top_logprobs > 0 else None,
            usage=Usage(len(self.prompt.ids), prefix_len, len(self.ids)),
        )

    def _read(self, model: LocalModel) -> None:
        """Take the text from all tokens: bytes of a letter may have come in several."""
        before = self.prompt.ids[-1]  # some tokenizers drop a space at the start of a text
        self.pieces = model.detokenizer.pieces(np.array([before, *self.ids]))[1:]
        self.text = "".join(self.pieces)
        answer = self.prompt.request.answer
        assert isinstance(answer, Continuation)
        cuts = [self.text.find(stop) for stop in answer.stop if stop in self.text]
        if cuts:
            self.text, self.finish_reason = self.text[: min(cuts)], "stop"

    def _tokens(self) -> tuple[Token, ...]:
        """Those that begin before the text's end; the last may be cut."""
        tokens: list[Token] = []
        start = 0
        for piece, logprob, top in zip(self.pieces, self.logprobs, self.tops, strict=True):
            if start >= len(self.text):
                break
            tokens.append(Token(piece[: len(self.text) - start], logprob, top))
            start += len(piece)
        return tuple(tokens)
