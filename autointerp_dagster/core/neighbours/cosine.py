"""Neighbours by direction: the cosine of two latents' rows of the encoder or the decoder.

Rows are compared tile by tile, of each latent the best so far are kept: never width x width. The
last bits of a matrix product depend on its shape, so tiles are always of one shape, at multiples of
it from latent 0 on, whatever the cell; and cosines are rounded to six decimals, which float32 has.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from autointerp_dagster.core.neighbours.ranked import Ranked

_TILE = 1024
"""Latents whose neighbours are sought at once."""
_OTHERS_TILE = 4096
"""Latents they are compared with at once."""
_UNITS = 1_000_000
"""Steps of a cosine per 1."""
_ID_BITS = 32


class _Tile(NamedTuple):
    start: int
    directions: Float32[Tensor, "latent d_in"]
    """Of length 1, or 0 where the coder has no row or one of zeros."""


def cosine_neighbours(
    rows_of: Callable[[range], Float[Tensor, "latent d_in"]],
    n_latents: int,
    latents: range,
    n: int,
) -> Ranked:
    """The ``n`` latents of the layer whose row is most alike in direction, of each latent.

    Args:
        rows_of: Rows of the encoder or the decoder of consecutive latents, on any device.
        n_latents: Width of the coder.
        latents: Whose neighbours are sought.
        n: Neighbours wanted of each, at least 1.

    Returns:
        Cosines in (0, 1], multiples of 1e-6. Neighbours with a cosine of 0 or less are left out,
        so a row of zeros has none and is nobody's.

    Raises:
        ValueError: If a row is not finite; names the latent.
    """
    height, width = min(_TILE, n_latents), min(_OTHERS_TILE, n_latents)
    parts = []
    first = latents.start // height * height if latents else 0
    for start in range(first, latents.stop if latents else 0, height):
        tile = _tile(rows_of, start, height, n_latents)
        best = torch.full((height, n), -1, dtype=torch.int64, device=tile.directions.device)
        for other in range(0, n_latents, width):
            keys = _keys(tile, _tile(rows_of, other, width, n_latents))
            both = torch.cat([best, keys], dim=1)
            best = both.topk(n, dim=1).values
        parts.append(_ranked(best.cpu().numpy(), start, latents, n))
    return Ranked.concat(parts)


def _tile(
    rows_of: Callable[[range], Float[Tensor, "latent d_in"]], start: int, size: int, n_latents: int
) -> _Tile:
    latents = range(start, min(start + size, n_latents))
    rows = rows_of(latents).double()
    length = rows.norm(dim=1, keepdim=True)
    wrong = torch.nonzero(~length.isfinite())
    if len(wrong):
        raise ValueError(
            f"latent {start + int(wrong[0, 0])}: its row of the coder is not finite, wanted "
            "numbers. Leave this coder out, or mend its weights."
        )
    directions = (rows / length.clamp_min(torch.finfo(torch.float64).tiny)).float()
    missing = directions.new_zeros(size - len(latents), directions.shape[1])
    return _Tile(start, torch.cat([directions, missing]))


def _keys(tile: _Tile, others: _Tile) -> Int64[Tensor, "latent other"]:
    """Integers that order the pairs: by rounded cosine, then the smaller latent; -1: no pair."""
    cosine = (tile.directions @ others.directions.T).clamp_(max=1.0)
    steps = cosine.mul_(_UNITS).round_().to(torch.int64)
    device = steps.device
    mine = tile.start + torch.arange(len(tile.directions), device=device)
    other = others.start + torch.arange(len(others.directions), device=device)
    is_pair = (steps > 0) & (mine[:, None] != other)
    keys = (steps << _ID_BITS) + ((1 << _ID_BITS) - 1 - other)
    return torch.where(is_pair, keys, -1)


def _ranked(keys: Int64[np.ndarray, "latent n"], start: int, latents: range, n: int) -> Ranked:
    row, rank = np.nonzero(keys >= 0)
    key = keys[row, rank]
    latent = start + row
    is_asked = (latent >= latents.start) & (latent < latents.stop)
    neighbour = (1 << _ID_BITS) - 1 - (key & ((1 << _ID_BITS) - 1))
    value = (key >> _ID_BITS) / _UNITS
    return Ranked.best(latent[is_asked], neighbour[is_asked], value[is_asked], n)
