"""The activation cache: every non-zero activation of every latent, one chunk of contexts at a time.

1. Forward a chunk of equal-length contexts, BOS included, to the last hookpoint and no further.
2. Per layer, encode every position but BOS and keep the activations above zero.
3. Round them to bfloat16 (float16 would overflow at 65,504) and sort them by latent.

A generator, so that memory holds one chunk; where the non-zeros go is the caller's business.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Float32, Int32, Int64, UInt16, UInt32
from torch import Tensor, nn

from autointerp_dagster.core.errors import ModelError
from autointerp_dagster.core.hooks import captured_outputs
from autointerp_dagster.core.schemas import FIRING_COUNTS
from autointerp_dagster.core.sparse_coders import SparseCoder
from autointerp_dagster.core.tokens import TokenDataset, context_batches
from autointerp_dagster.core.types import LatentRange, LayerKey


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
    coders: Mapping[LayerKey, SparseCoder],
    batch_size: int,
    device: torch.device,
) -> Iterator[Chunk]:
    """Run the subject model over the dataset once, for all layers.

    Args:
        base_model: Hookpoints count from here; called as ``base_model(input_ids=..., use_cache=
            False)`` in inference mode. Contexts of a chunk are equally long: no padding, no mask.
        dataset: The contexts.
        coders: On ``device``; several may share a hookpoint.
        batch_size: Contexts in one forward pass.
        device: Where the model is.

    Yields:
        One chunk per entry of :func:`tokens.context_batches`, in that order, with every layer.

    Raises:
        ModelError: If the model gives NaN or infinity, or a hookpoint does not fit.
    """
    for contexts in context_batches(dataset, batch_size):
        tokens = np.stack([dataset.context_tokens(int(context)) for context in contexts])
        yield Chunk(contexts, _encode_chunk(base_model, dataset, contexts, tokens, coders, device))


def _encode_chunk(
    base_model: nn.Module,
    dataset: TokenDataset,
    contexts: Int64[np.ndarray, " context"],
    tokens: Int32[np.ndarray, "context position"],
    coders: Mapping[LayerKey, SparseCoder],
    device: torch.device,
) -> dict[LayerKey, Nonzeros]:
    first = dataset.first_visible
    with torch.inference_mode():
        with captured_outputs(base_model, (layer.hookpoint for layer in coders)) as outputs:
            input_ids = torch.from_numpy(tokens).to(device=device, dtype=torch.int64)
            base_model(input_ids=input_ids, use_cache=False)
        visible = {name: hidden[:, first:] for name, hidden in outputs.items()}
        for name, hidden in visible.items():
            _refuse_non_finite(hidden, contexts, name)
        return {
            layer: nonzeros_of(coder, visible[layer.hookpoint], contexts, first)
            for layer, coder in coders.items()
        }


def nonzeros_of(
    coder: SparseCoder,
    hidden: Float[Tensor, "context position d_in"],
    contexts: Int64[np.ndarray, " context"],
    first_position: int,
) -> Nonzeros:
    """Encode the vectors of some contexts and keep what is above zero.

    Args:
        coder: On the same device as ``hidden``.
        hidden: The hookpoint's output at every position that counts.
        contexts: Index of each context in the dataset, ascending.
        first_position: The position in its context that ``hidden[:, 0]`` stands for.
    """
    n_positions = hidden.shape[1]
    indices, values = coder.encode(hidden.flatten(0, 1))
    rounded = values.to(torch.bfloat16)
    token, slot = torch.nonzero(rounded > 0, as_tuple=True)
    latent = indices[token, slot]
    latent, order = torch.sort(latent, stable=True)  # rows come in (context, position) order
    token, slot = token[order], slot[order]
    row = token.cpu().numpy()
    return Nonzeros(
        latent=latent.cpu().numpy().astype(np.uint32),
        context=contexts[row // n_positions].astype(np.uint32),
        position=(row % n_positions + first_position).astype(np.uint16),
        activation=rounded[token, slot].float().cpu().numpy(),
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
            f"hookpoint {hookpoint!r}, context {context}: the subject model's output is NaN or "
            "infinite. Try dtype float32, or check the model's weights."
        )
