"""The activation cache: every non-zero activation of every latent, one chunk of contexts at a time.

1. Forward a chunk of equal-length contexts, BOS included, to the last hookpoint and no further.
   Coders of any width may read any sides of any modules.
2. Per layer, encode every position but BOS and keep the activations above zero.
3. Round them to bfloat16 (float16 would overflow at 65,504) and pack each with its place into one
   64-bit key, so that one sort of integers orders them by latent.

A generator, so that memory holds one chunk; where the non-zeros go is the caller's business.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Float32, Int32, Int64, UInt16, UInt32
from torch import Tensor, nn

from autointerp_dagster.core.errors import CoderError, ModelError, StudyError
from autointerp_dagster.core.hooks import captured
from autointerp_dagster.core.schemas import FIRING_COUNTS
from autointerp_dagster.core.sparse_coders import PlacedCoder, SparseActivations, SparseCoder
from autointerp_dagster.core.tokens import TokenDataset, context_batches
from autointerp_dagster.core.types import LatentRange, LayerKey

_TOKEN_BITS, _VALUE_BITS = 24, 16
_MAX_LATENTS, _MAX_TOKENS = 1 << (63 - _TOKEN_BITS - _VALUE_BITS), 1 << _TOKEN_BITS
_INFINITY = 0x7F80
"""In bfloat16; NaN is above it."""

logger = logging.getLogger(__name__)


class Nonzeros(NamedTuple):
    """Activations above zero of one layer, as columns, sorted by (latent, context, position)."""

    latent: UInt32[np.ndarray, " nnz"]
    context: UInt32[np.ndarray, " nnz"]
    position: UInt16[np.ndarray, " nnz"]
    """In the context; 0 is BOS where there is one."""
    activation: Float32[np.ndarray, " nnz"]
    """Raw coder units, > 0, rounded to bfloat16."""

    def within(self, latents: LatentRange) -> "Nonzeros":
        """The rows of a block of latents; a view."""
        first, last = np.searchsorted(self.latent, [latents.start, latents.stop])
        return Nonzeros(*(column[first:last] for column in self))


class Chunk(NamedTuple):
    """What one forward pass gave."""

    contexts: Int64[np.ndarray, " context"]
    """Ascending."""
    nonzeros: dict[LayerKey, Nonzeros]
    batch_size: int
    """Most contexts that ran at once: fewer than asked for after a lack of memory."""


class FiringCounts:
    """Exact counts of one layer's latents, added up chunk by chunk."""

    def __init__(self, num_latents: int) -> None:
        self._n_tokens = np.zeros(num_latents, dtype=np.uint64)
        self._n_contexts = np.zeros(num_latents, dtype=np.uint64)
        self._max = np.zeros(num_latents, dtype=np.float32)

    def add(self, nonzeros: Nonzeros) -> None:
        """Count a chunk; every context must come whole, in one chunk."""
        latent, context = nonzeros.latent, nonzeros.context
        if latent.size == 0:
            return
        is_new_latent = np.diff(latent, prepend=latent[0]) != 0
        is_new_latent[0] = True
        is_new_context = is_new_latent | (np.diff(context, prepend=context[0]) != 0)
        starts = np.flatnonzero(is_new_latent)
        fired = latent[starts]
        self._n_tokens[fired] += np.diff(starts, append=latent.size).astype(np.uint64)
        self._n_contexts[fired] += np.add.reduceat(is_new_context, starts, dtype=np.uint64)
        maxima = np.maximum.reduceat(nonzeros.activation, starts)
        self._max[fired] = np.maximum(self._max[fired], maxima)

    def table(self) -> pl.DataFrame:
        """``schemas.FIRING_COUNTS``: a row for every latent; maximum null where it never fired."""
        frame = pl.DataFrame(
            {
                "latent": np.arange(self._n_tokens.size, dtype=np.uint32),
                "n_tokens": self._n_tokens,
                "n_contexts": self._n_contexts,
                "max_activation": self._max,
            }
        )
        fired = pl.col("n_tokens") > 0
        return FIRING_COUNTS.conform(
            frame.with_columns(pl.when(fired).then("max_activation").alias("max_activation"))
        )


def chunks_of(
    base_model: nn.Module,
    dataset: TokenDataset,
    coders: Mapping[LayerKey, PlacedCoder],
    batch_size: int,
    device: torch.device,
    first_chunk: int = 0,
) -> Iterator[Chunk]:
    """Run the subject model over the dataset once, for all layers.

    On a GPU a chunk's non-zeros travel to the host while the next chunk is computed, so the model
    is one chunk ahead of what is yielded.

    Args:
        base_model: Hookpoints count from here; called as ``base_model(input_ids=..., use_cache=
            False)`` in inference mode. Contexts of a chunk are equally long: no padding, no mask.
        dataset: The contexts.
        coders: On ``device``; several may read one hookpoint.
        batch_size: Contexts in one forward pass. Where memory lacks they are run in halves, and so
            are those of all later chunks; the chunks stay as they are.
        device: Where the model begins. What stands at a hookpoint of another device is brought
            here.
        first_chunk: Chunks that are left out at the start, when a run goes on.

    Yields:
        One chunk per entry of :func:`tokens.context_batches`, in that order, with every layer.

    Raises:
        ModelError: If the dataset holds a token that the model does not know, the model gives NaN
            or infinity, an activation is beyond bfloat16, a hookpoint does not fit, or there is no
            memory for one context.
        CoderError: If a coder has more latents than a key holds (8,388,608).
        StudyError: If a chunk has more positions than a key holds (16,777,216).
    """
    _refuse_unknown_tokens(base_model, dataset)
    batches = context_batches(dataset, batch_size)[first_chunk:]
    _refuse_too_many(coders, dataset, batches)
    forward = _Forward(base_model, dataset, coders, device, batch_size)
    ahead: _Encoded | None = None
    for contexts in batches:
        hidden = forward(contexts)
        if ahead is not None:
            yield ahead.on_host()
        ahead = _Encoded.of(hidden, coders, contexts, dataset.first_visible, forward.batch_size)
        if device.type == "cpu":
            yield ahead.on_host()
            ahead = None
    if ahead is not None:
        yield ahead.on_host()


def nonzeros_of(
    coder: SparseCoder,
    hidden: Float[Tensor, "context position d_in"],
    contexts: Int64[np.ndarray, " context"],
    first_position: int,
    layer: LayerKey | None = None,
) -> Nonzeros:
    """Encode the vectors of some contexts and keep what is above zero.

    Args:
        coder: On the same device as ``hidden``.
        hidden: What stands at the hookpoint at every position that counts.
        contexts: Index of each context in the dataset, ascending.
        first_position: The position in its context that ``hidden[:, 0]`` stands for.
        layer: For the message of an error.

    Raises:
        ModelError: If an activation is beyond bfloat16.
    """
    keys = _keys(coder.encode(hidden.flatten(0, 1)))
    return _unpacked(keys.cpu().numpy(), contexts, hidden.shape[1], first_position, layer)


class _Encoded(NamedTuple):
    """A chunk on its way from the device to the host."""

    contexts: Int64[np.ndarray, " context"]
    n_positions: int
    first_position: int
    batch_size: int
    keys: dict[LayerKey, Tensor]
    """Complete once ``copied`` is."""
    copied: torch.cuda.Event | None

    @classmethod
    def of(
        cls,
        hidden: Mapping[str, Tensor],
        coders: Mapping[LayerKey, PlacedCoder],
        contexts: Int64[np.ndarray, " context"],
        first_position: int,
        batch_size: int,
    ) -> "_Encoded":
        """Encode all layers and start to copy what fires."""
        visible = {name: of[:, first_position:] for name, of in hidden.items()}
        for name, of in visible.items():
            _refuse_non_finite(of, contexts, name)
        n_positions = next(iter(visible.values())).shape[1]
        keys = {
            layer: _keys(placed.coder.encode(visible[placed.reads].flatten(0, 1)))
            for layer, placed in coders.items()
        }
        copied = None
        if any(of.is_cuda for of in keys.values()):
            keys, copied = _start_copies(keys)
        return cls(contexts, n_positions, first_position, batch_size, keys, copied)

    def on_host(self) -> Chunk:
        """Wait for the copy, and sort."""
        if self.copied is not None:
            self.copied.synchronize()
        place = (self.contexts, self.n_positions, self.first_position)
        return Chunk(
            self.contexts,
            {layer: _unpacked(keys.numpy(), *place, layer) for layer, keys in self.keys.items()},
            self.batch_size,
        )


class _Forward:
    """Runs the contexts of a chunk, as many at once as there is memory for."""

    def __init__(
        self,
        base_model: nn.Module,
        dataset: TokenDataset,
        coders: Mapping[LayerKey, PlacedCoder],
        device: torch.device,
        batch_size: int,
    ) -> None:
        self._base_model, self._dataset, self._device = base_model, dataset, device
        self._hookpoints = [placed.reads for placed in coders.values()]
        self.batch_size = batch_size
        """Halved, and kept so, whenever there is no memory for it."""

    def __call__(self, contexts: Int64[np.ndarray, " context"]) -> Mapping[str, Tensor]:
        """What stands at each hookpoint; on a GPU this returns before it is computed."""
        parts: list[Mapping[str, Tensor]] = []
        start = 0
        while start < len(contexts):
            part = self._try(contexts[start : start + self.batch_size])
            if part is None:
                continue
            parts.append(part)
            start += self.batch_size
        if len(parts) == 1:
            return parts[0]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _try(self, contexts: Int64[np.ndarray, " context"]) -> Mapping[str, Tensor] | None:
        """Null after a lack of memory; the next try is with half as many contexts."""
        tokens = np.stack([self._dataset.context_tokens(int(context)) for context in contexts])
        try:
            return self._run(tokens)
        except torch.OutOfMemoryError as error:
            if len(contexts) == 1:
                raise ModelError(
                    f"context {contexts[0]}: no memory on {self._device} for its "
                    f"{tokens.shape[1]} tokens, even alone, as with models.subject.batch_size 1. "
                    "Free memory there, or choose shorter contexts."
                ) from error
        self.batch_size = len(contexts) // 2
        logger.warning(
            "out of memory: running %d contexts at a time; lower models.subject.batch_size",
            self.batch_size,
        )
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _run(self, tokens: Int32[np.ndarray, "context position"]) -> Mapping[str, Tensor]:
        with torch.inference_mode():
            input_ids = torch.from_numpy(tokens).to(torch.int64)
            input_ids = input_ids.to(self._device, non_blocking=True)
            with captured(self._base_model, self._hookpoints) as found:
                self._base_model(input_ids=input_ids, use_cache=False)
            return {name: of.to(self._device) for name, of in found.items()}


def _keys(found: SparseActivations) -> Int64[Tensor, " nnz"]:
    """Latent, token and the bits of the value in bfloat16, packed to be sorted as one integer."""
    bits = found.value.to(torch.bfloat16).view(torch.int16).to(torch.int64)
    places = found.latent << (_TOKEN_BITS + _VALUE_BITS) | found.token << _VALUE_BITS
    return (places | bits)[bits > 0]


def _start_copies(
    keys: Mapping[LayerKey, Tensor],
) -> tuple[dict[LayerKey, Tensor], torch.cuda.Event]:
    """Copies in pinned host memory, complete at the event; the next forward pass runs beside."""
    copying = torch.cuda.Stream()
    copying.wait_stream(torch.cuda.current_stream())
    on_host: dict[LayerKey, Tensor] = {}
    with torch.cuda.stream(copying):
        for layer, of in keys.items():
            room = torch.empty(of.shape, dtype=of.dtype, pin_memory=True)
            on_host[layer] = room.copy_(of, non_blocking=True)
            of.record_stream(copying)  # its memory is not given away before it is copied
    copied = torch.cuda.Event()
    copied.record(copying)
    return on_host, copied


def _unpacked(
    keys: Int64[np.ndarray, " nnz"],
    contexts: Int64[np.ndarray, " context"],
    n_positions: int,
    first_position: int,
    layer: LayerKey | None,
) -> Nonzeros:
    keys = np.sort(keys)
    bits = (keys & ((1 << _VALUE_BITS) - 1)).astype(np.uint32)
    row = (keys >> _VALUE_BITS) & (_MAX_TOKENS - 1)
    latent = (keys >> (_TOKEN_BITS + _VALUE_BITS)).astype(np.uint32)
    in_chunk, position = np.divmod(row.astype(np.uint32), np.uint32(n_positions))
    context = contexts.astype(np.uint32)[in_chunk]
    if (bits >= _INFINITY).any():
        worst = int(np.argmax(bits >= _INFINITY))
        raise ModelError(
            f"{layer or 'coder'}, latent {latent[worst]}, context {context[worst]}: an activation "
            "is beyond bfloat16 (3.4e38). Check the coder's weights: is it this hookpoint's?"
        )
    return Nonzeros(
        latent=latent,
        context=context,
        position=(position + first_position).astype(np.uint16),
        activation=(bits << 16).view(np.float32),
    )


def _refuse_unknown_tokens(base_model: nn.Module, dataset: TokenDataset) -> None:
    """A model without an embedding of the usual kind is left to complain by itself."""
    embedding = getattr(base_model, "get_input_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor):
        return
    size, tokens = len(weight), dataset.tokens
    if tokens.size and (tokens.min() < 0 or tokens.max() >= size):
        first = int(np.flatnonzero((tokens < 0) | (tokens >= size))[0])
        context = int(np.searchsorted(dataset.offsets, first, side="right")) - 1
        raise ModelError(
            f"context {context}, position {first - int(dataset.offsets[context])}: token "
            f"{dataset.tokens[first]}, the subject model's vocabulary has {size}. Make the token "
            "dataset with this model's tokenizer."
        )


def _refuse_too_many(
    coders: Mapping[LayerKey, PlacedCoder],
    dataset: TokenDataset,
    batches: Sequence[Int64[np.ndarray, " _"]],
) -> None:
    """Beyond these a key's parts would run into each other."""
    for layer, placed in coders.items():
        if placed.coder.num_latents > _MAX_LATENTS:
            raise CoderError(
                f"{layer}: the coder has {placed.coder.num_latents} latents, the activation cache "
                f"holds at most {_MAX_LATENTS}. Choose a narrower coder."
            )
    lengths = np.diff(dataset.offsets)
    for contexts in batches:
        length = int(lengths[contexts[0]]) - dataset.first_visible
        if length * len(contexts) > _MAX_TOKENS:
            raise StudyError(
                f"models.subject.batch_size: {len(contexts)} contexts with {length} positions "
                f"each, a chunk holds at most {_MAX_TOKENS} positions. "
                f"Lower it to {_MAX_TOKENS // length} or less."
            )


def _refuse_non_finite(
    hidden: Float[Tensor, "context position d_in"],
    contexts: Int64[np.ndarray, " context"],
    hookpoint: str,
) -> None:
    is_finite = hidden.isfinite().all(dim=-1).all(dim=-1).cpu().numpy()
    if not is_finite.all():
        context = int(contexts[np.flatnonzero(~is_finite)[0]])
        raise ModelError(
            f"hookpoint {hookpoint!r}, context {context}: what the subject model gives there is "
            "NaN or infinite. Try dtype float32, or check the model's weights."
        )
