"""Which way a latent points at the hookpoint, and how much of it is there.

The one place that knows how a coder's units become the model's: a coder that scales its inputs, or
whose decoder writes to another module than its encoder reads, is to be reckoned with here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from autointerp_dagster.core.hooks import edited
from autointerp_dagster.core.sparse_coders import SparseCoder


def directions_of(coder: SparseCoder, latents: Sequence[int]) -> Float32[Tensor, "latent d_in"]:
    """What one unit of each latent adds to the hookpoint's output, in the model's units.

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
    model: nn.Module, hookpoint: str, coder: SparseCoder, latents: Int64[Tensor, " row"]
) -> Iterator[None]:
    """Take from each row of a batch what one latent adds to it, at every position it fires at.

    Args:
        model: Any module; run it in the ``with`` block.
        hookpoint: Dotted path relative to ``model``; its output is ``[row, position, d_in]``.
        coder: On the device of the hookpoint's output.
        latents: One for each row.

    Raises:
        ModelError: If there is no such module, or it returns no tensor.
    """
    directions = directions_of(coder, latents.tolist())

    def without(hidden: Tensor) -> Tensor:
        n_rows, n_positions, _ = hidden.shape
        repeated = latents.to(hidden.device).repeat_interleave(n_positions)
        found = activations_of(coder, hidden.flatten(0, 1), repeated).view(n_rows, n_positions, 1)
        removed = found * directions.to(hidden.device)[:, None, :]
        return (hidden.float() - removed).to(hidden.dtype)

    with edited(model, hookpoint, without):
        yield
