"""Where the candidates of the hard kinds of negatives come from."""

from typing import get_args

import numpy as np
from jaxtyping import Int64, UInt64

from autointerp_dagster.core.negatives.lanes import Lanes
from autointerp_dagster.core.negatives.request import NegativeRequest, NegativeSources, Rows
from autointerp_dagster.core.rng import hash_priority
from autointerp_dagster.core.schemas import NegativeKind
from autointerp_dagster.core.windows import SPLITS, WindowGrid

_APART = 1 << 40
"""Beyond every address that ``random`` draws under."""


def neighbour_lanes(request: NegativeRequest, sources: NegativeSources) -> Lanes:
    """One lane per neighbour, the nearest first; its windows shuffled for each latent.

    Raises:
        ValueError: If the sources lack the neighbours, or name a window that is not in the grid.
    """
    neighbours, windows = sources.neighbours, sources.neighbour_windows
    if neighbours is None or windows is None:
        raise _missing("neighbour", "neighbours and neighbour_windows")
    window = _windows_of(request.grid, windows["window_id"].to_numpy().astype(np.int64))
    rows = np.flatnonzero(request.grid.split[window] == request.split)
    owner = windows["latent"].to_numpy().astype(np.int64)[rows]
    latent = neighbours["latent"].to_numpy().astype(np.int64) - sources.first_latent
    other = neighbours["neighbour"].to_numpy().astype(np.int64)
    order = np.lexsort((neighbours["rank"].to_numpy(), latent))
    order = order[_is_asked(request, latent[order])]
    latent, other = latent[order], other[order]
    first = np.searchsorted(owner, other)
    size = np.searchsorted(owner, other, side="right") - first
    key = hash_priority(_keys(request, "neighbour")[latent], other)
    return Lanes(latent, first, size, key, window[rows], rows)


def similar_lanes(request: NegativeRequest, sources: NegativeSources) -> Lanes:
    """One lane per activating window, by rank: the windows whose text is nearest.

    Raises:
        ValueError: If the sources cannot search.
    """
    if sources.similar is None:
        raise _missing("similar", "similar")
    order = np.lexsort((request.rank, request.latent))
    latent = request.latent[order]
    distinct, at = np.unique(request.window[order], return_inverse=True)
    near = sources.similar.nearest(distinct, request.split)
    n_found = (near >= 0).sum(axis=1)
    return Lanes(latent, at * near.shape[1], n_found[at], None, near.reshape(-1))


def token_lanes(request: NegativeRequest, sources: NegativeSources) -> Lanes:
    """One lane per latent: the windows that show the token it fires on most, shuffled.

    Raises:
        ValueError: If the sources cannot look tokens up.
    """
    if sources.token_windows is None:
        raise _missing("same_token", "token_windows")
    latent = np.unique(request.latent)
    first, stop = sources.token_windows.bounds(request.top_token[latent], request.split)
    key = _keys(request, "same_token")[latent]
    return Lanes(latent, first, stop - first, key, sources.token_windows.window)


def _keys(request: NegativeRequest, kind: NegativeKind) -> UInt64[np.ndarray, " latent"]:
    """The address of each latent's draw of a kind, whatever other kinds are asked for."""
    purpose = _APART + get_args(NegativeKind).index(kind) * len(SPLITS) + request.split
    return hash_priority(request.key, np.full(len(request.key), purpose))


def _is_asked(request: NegativeRequest, latent: Rows) -> Int64[np.ndarray, " asked"]:
    """Rows of latents that have activating windows to set negatives beside."""
    is_inside = (latent >= 0) & (latent < len(request.key))
    has_windows = np.bincount(request.latent, minlength=len(request.key)) > 0
    return np.flatnonzero(is_inside & has_windows[np.where(is_inside, latent, 0)])


def _windows_of(
    grid: WindowGrid, window_id: Int64[np.ndarray, " row"]
) -> Int64[np.ndarray, " row"]:
    """The index of each ``context << 16 | start`` in the grid."""
    context, start = window_id >> 16, window_id & 0xFFFF
    known = np.minimum(context, len(grid.first_window) - 2)
    window = grid.first_window[known] + start // grid.window_len
    is_there = (context == known) & (start % grid.window_len == 0)
    is_there &= window < grid.first_window[known + 1]
    if not is_there.all():
        at = int(np.argmin(is_there))
        raise ValueError(
            f"neighbour_windows: context {context[at]}, start {start[at]} is no window of this "
            f"corpus cut to {grid.window_len} tokens. Make the neighbours again."
        )
    return window


def _missing(kind: NegativeKind, what: str) -> ValueError:
    return ValueError(
        f"negatives of kind {kind!r}: the sources have no {what}. Give draw_negatives what the "
        "kinds asked for are drawn from."
    )
