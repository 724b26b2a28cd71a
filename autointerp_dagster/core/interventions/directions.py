"""Which way a latent points at the hookpoint, and how much of it is there.

The one place that knows how a coder's units become the model's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from autointerp_dagster.core.errors import ModelError
from autointerp_dagster.core.hooks import edited, watched
from autointerp_dagster.core.sparse_coders import PlacedCoder, SparseCoder


def directions_of(coder: SparseCoder, latents: Sequence[int]) -> Float32[Tensor, "latent d_out"]:
    """What one unit of each latent adds where the coder writes, in the model's units.

    Adding ``s`` times this is what decoding would give with the latent raised by ``s`` and the
    reconstruction error kept.
    """
    return coder.decoder_rows(latents)


def activations_of(
    coder: SparseCoder, hidden: Float[Tensor, "token d_in"], latents: Int64[Tensor, " token"]
) -> Float32[Tensor, " token"]:
    """The activation of one latent for each vector; 0 where it does not fire."""
    active = coder.encode(hidden)
    is_asked_for = active.latent == latents.to(active.latent.device)[active.token]
    found = torch.zeros(len(hidden), device=active.value.device)
    found[active.token[is_asked_for]] = active.value[is_asked_for]
    return found


@contextmanager
def ablated(
    model: nn.Module, placed: PlacedCoder, latents: Int64[Tensor, " row"]
) -> Iterator[None]:
    """Take from each row of a batch what one latent adds to it, at every position it fires at.

    Args:
        model: Any module; run it in the ``with`` block.
        placed: On the device of the hookpoint that it reads. In a forward pass that one comes no
            later than the one it writes to; at both stands ``[row, position, width]``.
        latents: One for each row.

    Raises:
        ModelError: If a hookpoint does not exist, or what is written comes before what is read.
    """
    coder, reads, writes = placed
    directions = directions_of(coder, latents.tolist())
    read: list[Tensor] = []

    def without(hidden: Tensor) -> Tensor:
        if not read:
            raise ModelError(
                f"ablation at {writes!r}: it runs before {reads!r}, where the coder reads. Choose "
                "a coder that writes where it reads, or later."
            )
        x = read.pop()
        n_rows, n_positions, _ = x.shape
        repeated = latents.to(x.device).repeat_interleave(n_positions)
        found = activations_of(coder, x.flatten(0, 1), repeated).view(n_rows, n_positions, 1)
        removed = found * directions.to(found.device)[:, None, :]
        return (hidden.float() - removed.to(hidden.device)).to(hidden.dtype)

    with watched(model, reads, read.append), edited(model, writes, without):
        yield
