"""Ranks under hashed priorities: quantiles of a latent's windows, and the order they are drawn in.

A row's rank depends on its own hash and on the rows of its own latent, so order, batches, ranges
and other latents change nothing, and (but for ``mix``) a larger draw holds a smaller one.
"""

from itertools import pairwise
from typing import Literal

import numpy as np
import polars as pl
from jaxtyping import Bool, Float32, Int, Int64, UInt64

from autointerp_dagster.core.grouping import number_in_group
from autointerp_dagster.core.rng import address_key
from autointerp_dagster.core.types import LayerKey

Strategy = Literal["quantiles", "random", "top", "mix"]
BY_STRENGTH: tuple[Strategy, ...] = ("top", "mix")
"""Strategies that ask how strong a window is beyond its quantile."""

_TOP_SHARE_OF_MIX = 5  # one in five
_ROWS_AT_ONCE = 8192  # keys that the sort finds in the processor's nearest memory


def latent_keys(
    seed: int, layer: LayerKey, latents: range, purpose: str
) -> UInt64[np.ndarray, " latent"]:
    """One address per latent for :func:`core.rng.hash_priority`."""
    return np.array(
        [address_key(seed, layer, latent, purpose) for latent in latents], dtype=np.uint64
    )


def ranks_within(
    group: Int64[np.ndarray, " row"],
    priority: UInt64[np.ndarray, " row"],
    before: Int64[np.ndarray, " row"] | None = None,
) -> Int64[np.ndarray, " row"]:
    """Rank of each row in its group, from 0, by ``before`` (ascending) and then by ``priority``.

    Both ``group`` and ``before`` are >= 0, and together no longer than 63 bits. Rows alike in
    all three keep their order.
    """
    if not len(group):
        return np.zeros(0, dtype=np.int64)
    order = order_within(group, priority, before)
    ranks = np.empty(len(group), dtype=np.int64)
    ranks[order] = number_in_group(group[order])
    return ranks


def order_within(
    group: Int64[np.ndarray, " row"],
    priority: UInt64[np.ndarray, " row"],
    before: Int64[np.ndarray, " row"] | None = None,
) -> Int64[np.ndarray, " row"]:
    """Rows by ``group``, then ``before``, then ``priority``, ascending; alike keep their order.

    As in :func:`ranks_within`, of which this is the order.
    """
    major = group if before is None else group * (int(before.max(initial=0)) + 1) + before
    row_bits = len(major).bit_length()
    bits = max(1, int(major.max(initial=0)).bit_length())
    if bits + row_bits > 64:
        return np.lexsort((priority, major))
    # One sort of one integer: the row itself, and above it as much of the priority as fits.
    free = np.uint64(64 - bits - row_bits)
    packed = major.astype(np.uint64)
    if free:
        packed <<= free
        packed |= priority >> (np.uint64(64) - free)
    packed <<= np.uint64(row_bits)
    packed |= np.arange(len(packed), dtype=np.uint64)
    packed = sorted_keys(packed, group)
    order = (packed & np.uint64((1 << row_bits) - 1)).astype(np.int64)
    packed = packed >> np.uint64(row_bits)
    same = packed[1:] == packed[:-1]
    if same.any():
        tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
        rows = order[tied]
        order[tied] = rows[np.lexsort((priority[rows], packed[tied]))]
    return order


def sorted_keys(
    packed: UInt64[np.ndarray, " row"], group: Int64[np.ndarray, " row"]
) -> UInt64[np.ndarray, " row"]:
    """The keys in ascending order; may change ``packed``.

    A row of a larger group must have a larger key. Where groups follow each other they are sorted
    some at a time: 8 ns a key, and 15 for half a million at once (numpy: 25 and 50).
    """
    n_rows = len(packed)
    if n_rows < 2 * _ROWS_AT_ONCE or (group[1:] < group[:-1]).any():
        return pl.Series(packed).sort().to_numpy()
    cuts = np.searchsorted(group, group[np.arange(_ROWS_AT_ONCE, n_rows, _ROWS_AT_ONCE)])
    for start, stop in pairwise([0, *np.unique(cuts).tolist(), n_rows]):
        packed[start:stop] = pl.Series(packed[start:stop]).sort().to_numpy()
    return packed


def strength_ranks(
    latent: Int64[np.ndarray, " window"],
    maximum: Float32[np.ndarray, " window"],
    priority: UInt64[np.ndarray, " window"],
) -> Int64[np.ndarray, " window"]:
    """Rank of each window among its latent's, strongest first; ties by ``priority``.

    ``maximum`` is the largest activation in the window, > 0.
    """
    # The bits of positive floats sort as the floats do.
    bits = np.ascontiguousarray(maximum).view(np.int32).astype(np.int64)
    # bfloat16 leaves the last 16 bits 0; without them more of the priority fits into the sort.
    scale = np.bitwise_or.reduce(bits) & -np.bitwise_or.reduce(bits) if len(bits) else 1
    return ranks_within(latent, priority, (int(bits.max(initial=0)) - bits) // scale)


def draw_ranks(
    strategy: Strategy,
    group: Int64[np.ndarray, " window"],
    quantile: Int[np.ndarray, " window"],
    strength: Int64[np.ndarray, " window"] | None,
    priority: UInt64[np.ndarray, " window"],
    n_wanted: Int64[np.ndarray, " window"],
) -> Int64[np.ndarray, " window"]:
    """In which order each window is drawn within its group, from 0; -1: it is not.

    * ``quantiles``: one of each quantile, a second of each, and so on, so the quantiles are as
      even as they can be; a short one is made up for evenly by the others, and which get the
      remainder is drawn.
    * ``random``: all alike. * ``top``: strongest first.
    * ``mix``: the strongest fifth of ``n_wanted`` (rounded up), then as ``quantiles``.

    A group is one latent's windows of one split; ``n_wanted`` is the same for all of its rows, and
    a group with fewer rows is drawn whole. ``strength`` is the order of a group's windows, 0 the
    strongest; null for a strategy that is not of :data:`BY_STRENGTH`.
    """
    turn = _turns(strategy, group, quantile, strength, priority, n_wanted)
    rows = _in_reach(group, turn, n_wanted, int(quantile.max(initial=0)) + 1)
    ranks = np.full(len(group), -1, dtype=np.int64)
    ranks[rows] = ranks_within(group[rows], priority[rows], turn[rows])
    ranks[ranks >= n_wanted] = -1
    return ranks


def _turns(
    strategy: Strategy,
    group: Int64[np.ndarray, " window"],
    quantile: Int[np.ndarray, " window"],
    strength: Int64[np.ndarray, " window"] | None,
    priority: UInt64[np.ndarray, " window"],
    n_wanted: Int64[np.ndarray, " window"],
) -> Int64[np.ndarray, " window"]:
    """Windows of an earlier turn are drawn first; within a turn the priority decides."""
    if strategy == "random":
        return np.zeros(len(group), dtype=np.int64)
    if strategy == "quantiles":
        return _turns_by_quantile(group, quantile, priority)
    if strength is None:
        raise ValueError(f"draw_ranks: strategy {strategy!r} goes by strength, got none.")
    place = ranks_within(group, priority, strength)
    if strategy == "top":
        return place
    others = np.flatnonzero(place >= -(-n_wanted // _TOP_SHARE_OF_MIX))
    turn = np.zeros(len(group), dtype=np.int64)
    turn[others] = 1 + _turns_by_quantile(group[others], quantile[others], priority[others])
    return turn


def _turns_by_quantile(
    group: Int64[np.ndarray, " window"],
    quantile: Int[np.ndarray, " window"],
    priority: UInt64[np.ndarray, " window"],
) -> Int64[np.ndarray, " window"]:
    """How many of the same group and quantile have a smaller priority."""
    band = quantile.astype(np.int64)
    order = order_within(group, priority, band)
    band += group * (int(band.max(initial=0)) + 1)
    turn = np.empty(len(group), dtype=np.int64)
    turn[order] = number_in_group(band[order])
    return turn


def _turns_needed(
    n_wanted: Int64[np.ndarray, " any"], n_quantiles: int
) -> Int64[np.ndarray, " any"]:
    """As many as are needed if no quantile is short."""
    return -(-n_wanted // n_quantiles)


def _in_reach(
    group: Int64[np.ndarray, " window"],
    turn: Int64[np.ndarray, " window"],
    n_wanted: Int64[np.ndarray, " window"],
    n_quantiles: int,
) -> Int64[np.ndarray, " reached"]:
    """Windows whose turn can come; saves sorting most windows of a frequent latent.

    Where the turns up to one hold enough windows, later ones are out of reach. So is a turn that as
    many as are wanted have come before.
    """
    n_turns = _turns_needed(n_wanted, n_quantiles)
    is_reached, rows = np.zeros(len(group), dtype=bool), np.arange(len(group))
    for last in (n_turns, 2 * n_turns, n_wanted + 1):
        is_early = turn[rows] < last[rows]
        n_early = np.bincount(group[rows], weights=is_early)[group[rows]] if len(rows) else rows
        is_done = (n_early >= n_wanted[rows]) | (last[rows] > n_wanted[rows])
        is_reached[rows[is_early & is_done]] = True
        rows = rows[~is_done]
    return np.flatnonzero(is_reached)


def may_be_drawn(
    group: Int64[np.ndarray, " window"],
    quantile: Int[np.ndarray, " window"],
    priority: UInt64[np.ndarray, " window"],
    n_wanted: Int64[np.ndarray, " group"],
    n_quantiles: int,
    may_go: Bool[np.ndarray, " window"],
) -> Bool[np.ndarray, " window"]:
    """False for windows that :func:`draw_ranks` by ``quantiles`` does not draw, whoever else goes.

    Most windows of a frequent latent have a priority that says so, and need not be ranked: of m
    uniform priorities fewer than n lie below (n + 5 sqrt(n) + 5) / m with chance 1e-4, and groups
    where that happens, or whose quantiles are short, are kept whole.

    Args:
        group: As in :func:`draw_ranks`.
        quantile: Below ``n_quantiles``.
        priority: Of the draw.
        n_wanted: How many are drawn of each group.
        n_quantiles: Bands per latent.
        may_go: Windows that may be taken away before the draw; all of them are kept.
    """
    cell = group * n_quantiles + quantile
    count = np.bincount(cell, minlength=len(n_wanted) * n_quantiles)
    early = np.repeat(_turns_needed(n_wanted, n_quantiles), n_quantiles)
    share = (early + 5 * np.sqrt(early) + 5) / np.maximum(count, 1)
    below = (np.minimum(share, 0.75) * 2.0**64).astype(np.uint64)
    below[share >= 0.75] = np.iinfo(np.uint64).max
    kept = priority <= below[cell]
    n_near = np.bincount(cell[np.flatnonzero(kept & ~may_go)], minlength=len(count))
    n_early = np.minimum(n_near, early).reshape(-1, n_quantiles)
    is_short = (n_early < early.reshape(-1, n_quantiles)) & (n_early < count.reshape(n_early.shape))
    enough = (n_early.sum(axis=1) >= n_wanted) & ~is_short.any(axis=1)
    kept |= may_go
    if not enough.all():
        kept |= ~enough[group]
    return kept
