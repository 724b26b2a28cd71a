"""The subject model steered at the end of many prompts: one token per strength that is tried.

Steering begins at a prompt's last token, so the keys and values of all tokens before it are those
of the undisturbed model: they are computed once and shared by every strength, every target and the
clean run. A try is then a forward pass over one token per prompt, with a vector of its own for each
row, so that dozens of latents are steered in one pass.

Prompts are sorted by length and padded on the right, in batches of so many rows. What is kept on
the device is the cache and the clean log-probabilities of a group; see :func:`rows_that_fit`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from autointerp_dagster.adapters.subject_models import SubjectModel
from autointerp_dagster.core.errors import ModelError
from autointerp_dagster.core.hooks import captured_outputs, steered
from autointerp_dagster.core.interventions.directions import activations_of, directions_of
from autointerp_dagster.core.interventions.experiment import Rises
from autointerp_dagster.core.interventions.strength import Divergence, divergence_between
from autointerp_dagster.core.rng import hash_priority
from autointerp_dagster.core.sparse_coders import SparseCoder

BATCH_ROWS = {"cpu": 32, "cuda": 256}
"""Prompts in one forward pass."""
KEPT_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}
"""Memory for what is kept of a group of prompts. A latent's prompts always stay together."""


class _Continued(NamedTuple):
    """Where some rows of a batch stand, after zero or more tokens from their last prompt token."""

    cache: DynamicCache
    mask: Tensor
    lengths: Tensor


@dataclass(slots=True)
class _Batch:
    """Some prompts without their last tokens, right-padded, as the undisturbed model left them."""

    rows: Tensor
    """Places of the prompts in the group."""
    cache: DynamicCache
    """Never written to."""
    mask: Tensor
    """``[row, position]``: 1 where there is a token, 0 for padding."""
    lengths: Tensor
    """Tokens, the last one not counted: its position."""
    last: Tensor
    """The last token of each prompt."""
    clean: Tensor
    """``[row, token]``: log-probabilities of the next token, float32."""

    def begun(self, places: Tensor) -> _Continued:
        """A copy of some rows that may be continued."""
        cache = DynamicCache()
        for keys, values, _ in self.cache:
            assert keys is not None
            assert values is not None
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys[places], values[places]
            cache.layers.append(layer)
        return _Continued(cache, self.mask[places], self.lengths[places])


class SteeredModel:
    """The prompts of a group of latents, ready to be steered; a ``core`` ``SteeredPrompts``."""

    def __init__(
        self,
        subject: SubjectModel,
        coder: SparseCoder,
        hookpoint: str,
        prompts: Sequence[np.ndarray],
        latents: Sequence[int],
        batch_rows: int | None = None,
    ) -> None:
        """Run the prompts once, undisturbed.

        Args:
            subject: Weights, on their device.
            coder: Whose latents these are; on any device.
            hookpoint: Where it was trained, and is steered; counts from the base model.
            prompts: Tokens, at least 2 each.
            latents: Of each prompt.
            batch_rows: Prompts in one forward pass; null: what suits the device.

        Raises:
            ModelError: If a prompt is too short, the hookpoint does not exist, or the clean model
                gives NaN.
        """
        short = [i for i, prompt in enumerate(prompts) if len(prompt) < 2]
        if short:
            raise ModelError(
                f"steering at {hookpoint!r}: prompt {short[0]} is too short "
                f"({len(prompts[short[0]])} tokens), wanted at least 2: one before the token that "
                "is steered. Draw longer prompts."
            )
        self._subject, self._hookpoint = subject, hookpoint
        self._model: Any = subject.model
        self._base: Any = subject.base_model
        self._device = subject.device
        self._coder = coder.to(self._device)
        self._latents = torch.tensor(list(latents), dtype=torch.int64, device=self._device)
        known, self._direction_of = torch.unique(self._latents, return_inverse=True)
        self._directions = directions_of(coder, known.tolist()).to(self._device)
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        size = batch_rows or BATCH_ROWS.get(self._device.type, BATCH_ROWS["cpu"])
        parts = [order[i : i + size] for i in range(0, len(order), size)]
        with torch.inference_mode():
            self._batches = [self._prepared(part, prompts) for part in parts]

    def activations(self) -> np.ndarray:
        """Of each prompt's latent on its last token, computed anew; 0 where it does not fire."""
        found = np.zeros(len(self._latents), dtype=np.float32)
        with torch.inference_mode():
            for batch in self._batches:
                hidden = self._hidden(batch)
                values = activations_of(self._coder, hidden, self._latents[batch.rows])
                found[batch.rows.cpu().numpy()] = values.float().cpu().numpy()
        return found

    def divergence(self, rows: np.ndarray, strengths: np.ndarray) -> Divergence:
        """Of the next token's distribution, for each of ``rows``, nats."""

        def of(batch: _Batch, places: Tensor, steered_by: Tensor) -> Sequence[Tensor]:
            logprobs = self._first(batch, places, steered_by)
            return divergence_between(batch.clean[places], logprobs)

        kl, reverse = self._by_batch(rows, strengths, of)
        return Divergence(kl.astype(np.float64), reverse.astype(np.float64))

    def rises(self, rows: np.ndarray, strengths: np.ndarray, n: int) -> Rises:
        """The ``n`` next tokens whose probability rises most, for each of ``rows``."""

        def of(batch: _Batch, places: Tensor, steered_by: Tensor) -> Sequence[Tensor]:
            logprobs = self._first(batch, places, steered_by)
            rise = (logprobs.exp() - batch.clean[places].exp()).nan_to_num(nan=-torch.inf)
            largest = rise.topk(min(n, rise.shape[1]), dim=-1)
            return largest.indices, largest.values

        tokens, values = self._by_batch(rows, strengths, of)
        return Rises(tokens.astype(np.int64), values.astype(np.float64))

    def continuations(
        self, rows: np.ndarray, strengths: np.ndarray, draws: np.ndarray, temperature: float
    ) -> np.ndarray:
        """Tokens after each of ``rows``, one per uniform number in [0, 1) of ``draws``.

        The vector is added at the prompt's last token and at every generated one. The number names
        the noise that a token is drawn with: see :func:`gumbel_noise`.
        """
        drawn = torch.from_numpy(draws).to(self._device)
        place_of = {row: i for i, row in enumerate(rows.tolist())}

        def of(batch: _Batch, places: Tensor, steered_by: Tensor) -> Sequence[Tensor]:
            mine = torch.tensor([place_of[row] for row in batch.rows[places].tolist()])
            return (self._written(batch, places, steered_by, drawn[mine], temperature),)

        (tokens,) = self._by_batch(rows, strengths, of)
        return tokens.astype(np.int64)

    def _prepared(self, rows: Sequence[int], prompts: Sequence[np.ndarray]) -> _Batch:
        lengths = torch.tensor([len(prompts[row]) - 1 for row in rows])
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : lengths[i]] = torch.from_numpy(prompts[row][:-1].astype(np.int64))
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        mask = (positions < lengths[:, None]).long()
        cache = DynamicCache()
        self._base(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            position_ids=positions.to(self._device),
            past_key_values=cache,
            use_cache=True,
        )
        batch = _Batch(
            rows=torch.tensor(rows, device=self._device),
            cache=cache,
            mask=mask.to(self._device),
            lengths=lengths.to(self._device),
            last=torch.tensor([int(prompts[row][-1]) for row in rows], device=self._device),
            clean=torch.empty(0, device=self._device),
        )
        every = torch.arange(len(rows), device=self._device)
        batch.clean = self._first(batch, every, None)
        if not bool(batch.clean.exp().isfinite().all()):
            raise ModelError(
                f"steering at {self._hookpoint!r}: the undisturbed model gives NaN. Try dtype "
                "float32, or check the model's weights."
            )
        return batch

    def _hidden(self, batch: _Batch) -> Tensor:
        """The hookpoint's output at the last token of each prompt."""
        begun = batch.begun(torch.arange(len(batch.rows), device=self._device))
        with captured_outputs(self._base, [self._hookpoint]) as outputs:
            self._base(**_step(begun, batch.last))
        return outputs[self._hookpoint][:, -1]

    def _first(self, batch: _Batch, places: Tensor, vectors: Tensor | None) -> Tensor:
        """Log-probabilities of the token after the prompt, float32."""
        _, logits = self._stepped(batch.begun(places), batch.last[places], vectors)
        return torch.log_softmax(logits, dim=-1)

    def _stepped(
        self, at: _Continued, tokens: Tensor, vectors: Tensor | None
    ) -> tuple[_Continued, Tensor]:
        """One token more in each row; float32 logits of what follows it."""
        inputs = _step(at, tokens)
        if vectors is None:
            out = self._model(**inputs)
        else:
            with steered(self._base, self._hookpoint, vectors):
                out = self._model(**inputs)
        after = _Continued(at.cache, inputs["attention_mask"], at.lengths + 1)
        return after, out.logits[:, -1].float()

    def _written(
        self, batch: _Batch, places: Tensor, vectors: Tensor, draws: Tensor, temperature: float
    ) -> Tensor:
        at, tokens = batch.begun(places), batch.last[places]
        written = []
        for draw in draws.unbind(dim=1):
            at, logits = self._stepped(at, tokens, vectors)
            tokens = _sampled(logits / temperature, draw)
            written.append(tokens)
        return torch.stack(written, dim=1)

    def _by_batch(
        self,
        rows: np.ndarray,
        strengths: np.ndarray,
        of: Callable[[_Batch, Tensor, Tensor], Sequence[Tensor]],
    ) -> list[np.ndarray]:
        """What ``of`` gives for every batch that holds some of ``rows``, in the order of these."""
        strength_of = np.full(len(self._latents), np.nan)
        strength_of[rows] = strengths
        asked = torch.from_numpy(strength_of).to(self._device, torch.float32)
        seen: list[np.ndarray] = []
        found: list[list[np.ndarray]] = []
        with torch.inference_mode():
            for batch, places in self._touched(asked):
                mine = batch.rows[places]
                vectors = asked[mine, None] * self._directions[self._direction_of[mine]]
                parts = of(batch, places, vectors)
                seen.append(mine.cpu().numpy())
                found.append([part.cpu().numpy() for part in parts])
        if not seen:
            raise ValueError("SteeredModel: asked about no rows, wanted at least one.")
        back = {row: i for i, row in enumerate(np.concatenate(seen).tolist())}
        order = [back[row] for row in rows.tolist()]
        return [np.concatenate(parts)[order] for parts in zip(*found, strict=True)]

    def _touched(self, asked: Tensor) -> Iterator[tuple[_Batch, Tensor]]:
        for batch in self._batches:
            places = torch.nonzero(~asked[batch.rows].isnan())[:, 0]
            if len(places):
                yield batch, places


def rows_that_fit(subject: SubjectModel, prompt_len: int) -> int:
    """How many prompts may be prepared at once: what is kept of them takes ``KEPT_BYTES``."""
    config: Any = subject.model.config.get_text_config()
    n_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = 2 * config.num_hidden_layers * n_heads * head_dim * prompt_len
    row_bytes = values * subject.model.dtype.itemsize + 4 * config.vocab_size
    return max(1, KEPT_BYTES.get(subject.device.type, KEPT_BYTES["cpu"]) // row_bytes)


def text_ends(subject: SubjectModel) -> frozenset[int]:
    """Tokens after which the subject model begins another text."""
    generation: Any = getattr(subject.model, "generation_config", None)
    declared = getattr(generation, "eos_token_id", None)
    ids = declared if isinstance(declared, list) else [declared]
    return frozenset(i for i in [*ids, subject.tokenizer.eos_token_id] if isinstance(i, int))


def _step(at: _Continued, tokens: Tensor) -> dict[str, Any]:
    """Arguments of a forward pass over one more token per row."""
    return {
        "input_ids": tokens[:, None],
        "attention_mask": torch.cat([at.mask, torch.ones_like(at.mask[:, :1])], dim=1),
        "position_ids": at.lengths[:, None],
        "past_key_values": at.cache,
        "use_cache": True,
    }


def gumbel_noise(draw: float, n_tokens: int) -> np.ndarray:
    """What is added to the log-probabilities of a step: the largest sum is the token drawn.

    Rounding of the log-probabilities seldom changes which is the largest, so what is written does
    not depend on the batch; a number put into the cumulative distribution falls, where many tokens
    are unlikely, beside the border of one of them.

    Args:
        draw: In [0, 1); names the noise.
        n_tokens: Of the vocabulary.
    """
    bits = hash_priority(int(draw * 2**53), np.arange(n_tokens, dtype=np.int64))
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform))


def _sampled(logits: Tensor, draws: Tensor) -> Tensor:
    """A token of each row from its distribution, by :func:`gumbel_noise`."""
    noise = np.stack([gumbel_noise(draw, logits.shape[-1]) for draw in draws.tolist()])
    finite = logits.double().nan_to_num(nan=-torch.inf)
    return (finite + torch.from_numpy(noise).to(logits.device)).argmax(dim=-1)
