"""The subject model steered at the end of many prompts: one token per strength that is tried.

Steering begins at a prompt's last token, so the keys and values of all tokens before it are those
of the undisturbed model: they are computed once and shared by every strength, every target and the
clean run. A try is then a forward pass over one token per prompt, with a vector of its own for each
row, so that dozens of latents are steered in one pass.

Every pass has one of a few fixed shapes: so many rows, filled up with copies, and prompts padded on
the right to a length that follows from their own or from the settings. What a matrix product gives
for a row then depends neither on the other rows nor on its place among them, to the bit, so what is
found for a latent does not depend on which others are steered along with it.

What is kept on the device is the cache and the clean log-probabilities of a group; see
:func:`rows_that_fit`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicCache, DynamicLayer

from autointerp_dagster.adapters.subject_models import SubjectModel
from autointerp_dagster.core.errors import ModelError
from autointerp_dagster.core.hooks import captured, steered
from autointerp_dagster.core.interventions.directions import activations_of, directions_of
from autointerp_dagster.core.interventions.experiment import Rises
from autointerp_dagster.core.interventions.strength import Divergence, divergence_between
from autointerp_dagster.core.rng import hash_priority
from autointerp_dagster.core.sparse_coders import PlacedCoder

STEP_ROWS = {"cpu": 16, "cuda": 256}
"""Prompts in one forward pass over a token each."""
PREFIX_ROWS = {"cpu": 4, "cuda": 64}
"""Prompts in one forward pass over all their tokens but the last."""
PREFIX_BLOCK = 16
"""In that pass prompts are padded to a multiple of so many tokens."""
HEAD_BLOCK = 8192
"""Rows of the output head that are turned into float32 at a time."""
KEPT_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}
"""Memory for what is kept of a group of prompts. A latent's prompts always stay together."""


class _Continued(NamedTuple):
    """Where some rows stand, after zero or more tokens from their last prompt token."""

    cache: DynamicCache
    mask: Tensor
    """``[row, position]``: 1 where there is a token, 0 for padding."""
    lengths: Tensor
    """Tokens so far: the position of the next one."""


class _Slot(NamedTuple):
    """Rows that go through the model together; always equally many."""

    rows: Tensor
    """Places of the prompts in the group; the last ones may be copies of the first."""
    asked: np.ndarray
    """For each, its place in what was asked."""
    n_asked: int
    """Rows that are no copies."""
    vectors: Tensor
    """What is added to each."""


class SteeredModel:
    """The prompts of a group of latents, ready to be steered; a ``core`` ``SteeredPrompts``."""

    def __init__(
        self,
        subject: SubjectModel,
        placed: PlacedCoder,
        prompts: Sequence[np.ndarray],
        latents: Sequence[int],
        prompt_len: int,
        step_rows: int | None = None,
    ) -> None:
        """Run the prompts once, undisturbed.

        Args:
            subject: Weights, on their device.
            placed: Whose latents these are, on any device: read at one hookpoint, and steered at
                the one that it writes to.
            prompts: Tokens, 2 to ``prompt_len`` each.
            latents: Of each prompt.
            prompt_len: To which prompts are padded. It decides the last bits of all that is found,
                so it comes from the settings, not from the prompts at hand.
            step_rows: Prompts in one forward pass over a token each; null: what suits the device.
                It decides last bits, too.

        Raises:
            ModelError: If a prompt is too short or too long, a hookpoint does not exist or cannot
                be steered, or the clean model gives NaN.
        """
        coder, self._reads, self._writes = placed
        _check_lengths(self._writes, prompts, prompt_len)
        self._model: Any = subject.model
        self._base: Any = subject.base_model
        self._device = subject.device
        self._coder = coder.to(self._device)
        self._latents = torch.tensor(list(latents), dtype=torch.int64, device=self._device)
        known, self._direction_of = torch.unique(self._latents, return_inverse=True)
        self._directions = directions_of(coder, known.tolist()).to(self._device)
        kind = self._device.type
        self._step_rows = step_rows or STEP_ROWS.get(kind, STEP_ROWS["cpu"])
        self._prefix_rows = PREFIX_ROWS.get(kind, PREFIX_ROWS["cpu"])
        self._prefix_len = prompt_len - 1
        last = [int(prompt[-1]) for prompt in prompts]
        self._last = torch.tensor(last, device=self._device)
        lengths = torch.tensor([len(prompt) - 1 for prompt in prompts])
        mask = torch.arange(self._prefix_len) < lengths[:, None]
        self._lengths, self._mask = lengths.to(self._device), mask.long().to(self._device)
        with torch.inference_mode():
            self._kept = self._prefixes(prompts)
            self._clean = self._undisturbed()

    def activations(self) -> np.ndarray:
        """Of each prompt's latent on its last token, computed anew; 0 where it does not fire."""

        def of(slot: _Slot) -> Sequence[Tensor]:
            with captured(self._base, [self._reads]) as found:
                self._base(**_step(self._begun(slot.rows), self._last[slot.rows]))
            hidden = found[self._reads][:, -1].to(self._device)
            return (activations_of(self._coder, hidden, self._latents[slot.rows]).float(),)

        (found,) = self._by_slot(*self._every_row(), of)
        return found.astype(np.float32)

    def divergence(self, rows: np.ndarray, strengths: np.ndarray) -> Divergence:
        """Of the next token's distribution, for each of ``rows``, nats."""

        def of(slot: _Slot) -> Sequence[Tensor]:
            return divergence_between(self._clean[slot.rows], self._first(slot))

        kl, reverse = self._by_slot(rows, strengths, of)
        return Divergence(kl.astype(np.float64), reverse.astype(np.float64))

    def rises(self, rows: np.ndarray, strengths: np.ndarray, n: int) -> Rises:
        """The ``n`` next tokens whose probability rises most, for each of ``rows``."""

        def of(slot: _Slot) -> Sequence[Tensor]:
            rise = self._first(slot).exp() - self._clean[slot.rows].exp()
            largest = rise.nan_to_num(nan=-torch.inf).topk(min(n, rise.shape[1]), dim=-1)
            return largest.indices, largest.values

        tokens, values = self._by_slot(rows, strengths, of)
        return Rises(tokens.astype(np.int64), values.astype(np.float64))

    def continuations(
        self, rows: np.ndarray, strengths: np.ndarray, draws: np.ndarray, temperature: float
    ) -> np.ndarray:
        """Tokens after each of ``rows``, one per uniform number in [0, 1) of ``draws``.

        The vector is added at the prompt's last token and at every generated one. The number names
        the noise that a token is drawn with: see :func:`gumbel_noise`.
        """

        def of(slot: _Slot) -> Sequence[Tensor]:
            at, tokens = self._begun(slot.rows), self._last[slot.rows]
            written = []
            for draw in draws[slot.asked].T:
                at, logits = self._stepped(at, tokens, slot.vectors)
                tokens = _sampled(logits / temperature, draw)
                written.append(tokens)
            return (torch.stack(written, dim=1),)

        (tokens,) = self._by_slot(rows, strengths, of)
        return tokens.astype(np.int64)

    def _prefixes(self, prompts: Sequence[np.ndarray]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, ``[prompt, head, position, width]``; 0 past the end."""
        kept: list[tuple[Tensor, Tensor]] = []
        places_of: dict[int, list[int]] = {}
        for place, prompt in enumerate(prompts):
            n_blocks = -(-(len(prompt) - 1) // PREFIX_BLOCK)
            places_of.setdefault(n_blocks * PREFIX_BLOCK, []).append(place)
        for padded_len, places in sorted(places_of.items()):
            for start in range(0, len(places), self._prefix_rows):
                mine = places[start : start + self._prefix_rows]
                cache = self._run([prompts[place] for place in mine], padded_len)
                n = min(padded_len, self._prefix_len)
                for layer, (keys, values, *_) in enumerate(cache):
                    assert keys is not None
                    assert values is not None
                    if len(kept) == layer:
                        kept.append((self._room(keys, prompts), self._room(values, prompts)))
                    for room, found in zip(kept[layer], (keys, values), strict=True):
                        room[mine, :, :n] = found[: len(mine), :, :n]
        return kept

    def _room(self, like: Tensor, prompts: Sequence[np.ndarray]) -> Tensor:
        return like.new_zeros(len(prompts), like.shape[1], self._prefix_len, like.shape[3])

    def _run(self, prompts: Sequence[np.ndarray], padded_len: int) -> DynamicCache:
        """The cache of prompts without their last tokens; rows beyond them are copies."""
        ids = torch.zeros(self._prefix_rows, padded_len, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row in range(self._prefix_rows):
            prompt = prompts[row] if row < len(prompts) else prompts[0]
            ids[row, : len(prompt) - 1] = torch.from_numpy(prompt[:-1].astype(np.int64))
            mask[row, : len(prompt) - 1] = 1
        cache = DynamicCache()
        self._base(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            position_ids=torch.arange(padded_len).expand_as(ids).to(self._device),
            past_key_values=cache,
            use_cache=True,
        )
        return cache

    def _undisturbed(self) -> Tensor:
        """``[prompt, token]``: log-probabilities of the next token, float32."""
        slots = self._slots(*self._every_row())
        found = torch.cat([self._first(slot)[: slot.n_asked] for slot in slots])
        if not bool(found.exp().isfinite().all()):
            raise ModelError(
                f"steering at {self._writes!r}: the undisturbed model gives NaN. Try dtype "
                "float32, or check the model's weights."
            )
        return found

    def _begun(self, rows: Tensor) -> _Continued:
        """A copy of some rows that may be continued."""
        cache = DynamicCache()
        for keys, values in self._kept:
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            mine = rows.to(keys.device)  # of a sharded model each layer keeps its own
            layer.keys, layer.values = keys[mine], values[mine]
            cache.layers.append(layer)
        return _Continued(cache, self._mask[rows], self._lengths[rows])

    def _first(self, slot: _Slot) -> Tensor:
        """Log-probabilities of the token after the prompt, float32."""
        _, logits = self._stepped(self._begun(slot.rows), self._last[slot.rows], slot.vectors)
        return torch.log_softmax(logits, dim=-1)

    def _stepped(
        self, at: _Continued, tokens: Tensor, vectors: Tensor
    ) -> tuple[_Continued, Tensor]:
        """One token more in each row; float32 logits of what follows it."""
        inputs = _step(at, tokens)
        with steered(self._base, self._writes, vectors), fine_head(self._model):
            out = self._model(**inputs)
        after = _Continued(at.cache, inputs["attention_mask"], at.lengths + 1)
        return after, out.logits[:, -1].float().to(self._device)

    def _every_row(self) -> tuple[np.ndarray, np.ndarray]:
        """All prompts, not steered."""
        return np.arange(len(self._latents)), np.zeros(len(self._latents))

    def _by_slot(
        self, rows: np.ndarray, strengths: np.ndarray, of: Callable[[_Slot], Sequence[Tensor]]
    ) -> list[np.ndarray]:
        """What ``of`` gives for each of ``rows``, in their order."""
        if not len(rows):
            raise ValueError("SteeredModel: asked about no rows, wanted at least one.")
        with torch.inference_mode():
            found = [
                [part[: slot.n_asked].cpu().numpy() for part in of(slot)]
                for slot in self._slots(rows, strengths)
            ]
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    def _slots(self, rows: np.ndarray, strengths: np.ndarray) -> Iterator[_Slot]:
        for start in range(0, len(rows), self._step_rows):
            asked = np.full(self._step_rows, start)
            n_asked = min(self._step_rows, len(rows) - start)
            asked[:n_asked] += np.arange(n_asked)
            mine = torch.from_numpy(rows[asked]).to(self._device)
            by = torch.from_numpy(strengths[asked]).to(self._device, torch.float32)
            vectors = by[:, None] * self._directions[self._direction_of[mine]]
            yield _Slot(mine, asked, n_asked, vectors)


@contextmanager
def fine_head(model: Any) -> Iterator[None]:
    """Compute the output head in float32 while ``model`` runs in the ``with`` block.

    A bfloat16 logit of 20 has steps of 0.125; what the model does to its logits, it does to these.
    A head in float32, or one that is quantised, is left as it is.

    Args:
        model: A causal language model.
    """
    head = model.get_output_embeddings()
    if head is None or head.weight.dtype not in (torch.bfloat16, torch.float16):
        yield
        return

    def finely(module: Any, inputs: tuple[Tensor, ...], output: object) -> Tensor:
        del output
        hidden = inputs[0].float()
        # In blocks, because a whole float32 head may not fit beside the model.
        blocks = module.weight.split(HEAD_BLOCK)
        logits = torch.cat([functional.linear(hidden, block.float()) for block in blocks], dim=-1)
        return logits if module.bias is None else logits + module.bias.float()

    handle = head.register_forward_hook(finely)
    try:
        yield
    finally:
        handle.remove()


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


def _check_lengths(hookpoint: str, prompts: Sequence[np.ndarray], prompt_len: int) -> None:
    for i, prompt in enumerate(prompts):
        if len(prompt) < 2:
            raise ModelError(
                f"steering at {hookpoint!r}: prompt {i} is too short ({len(prompt)} tokens), "
                "wanted at least 2: one before the token that is steered. Draw longer prompts."
            )
        if len(prompt) > prompt_len:
            raise ModelError(
                f"steering at {hookpoint!r}: prompt {i} is too long ({len(prompt)} tokens), wanted "
                f"at most {prompt_len}. Draw shorter prompts."
            )


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


def _sampled(logits: Tensor, draws: np.ndarray) -> Tensor:
    """A token of each row from its distribution, by :func:`gumbel_noise`."""
    noise_of = {draw: gumbel_noise(draw, logits.shape[-1]) for draw in set(draws.tolist())}
    noise = torch.from_numpy(np.stack([noise_of[draw] for draw in draws.tolist()]))
    finite = logits.double().nan_to_num(nan=-torch.inf)
    return (finite + noise.to(logits.device)).argmax(dim=-1)
