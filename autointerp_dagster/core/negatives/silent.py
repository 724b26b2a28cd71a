"""Non-activating windows: silent ones, drawn for each latent at the places where it fires."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from autointerp_dagster.core.negatives.permuting import counts_up, permuted
from autointerp_dagster.core.negatives.request import Question
from autointerp_dagster.core.rng import hash_priority
from autointerp_dagster.core.windows import SPLITS, WindowGrid


class Demand(NamedTuple):
    """How many silent windows are wanted of each (latent, split, place in the context)."""

    latent: Int64[np.ndarray, " demand"]
    """Index into the arrays that the caller keeps per latent."""
    split: Int64[np.ndarray, " demand"]
    place: Int64[np.ndarray, " demand"]
    """Index of the window in its context."""
    n: Int64[np.ndarray, " demand"]
    key: UInt64[np.ndarray, " demand"]
    """Address of the draw; differs between latents."""


class Drawn(NamedTuple):
    """Non-activating windows, distinct within a latent."""

    latent: Int64[np.ndarray, " row"]
    window: Int64[np.ndarray, " row"]
    """Index into the grid."""
    n_near_duplicates: Int64[np.ndarray, " latent"]
    """Per latent, how many were passed over because ``repeats`` said so."""


def matching_demand(
    latent: Int64[np.ndarray, " window"],
    split: Int64[np.ndarray, " window"],
    draw_rank: Int64[np.ndarray, " window"],
    place: Int64[np.ndarray, " window"],
    n_wanted: Int64[np.ndarray, " split"],
    keys: UInt64[np.ndarray, " latent"],
) -> Demand:
    """Demand for silent windows at the places of a latent's chosen activating windows.

    The i-th silent window of a split stands where the i-th chosen one stands, and begins again
    after the last: with as many of both, the places are the same to the last window. A split
    without chosen windows has no places to match and asks for none.

    Args:
        latent: Of each chosen activating window, an index into ``keys``.
        split: Its split code.
        draw_rank: Order of drawing within a (latent, split), from 0 without gaps.
        place: Its index in its context.
        n_wanted: Silent windows wanted, by split code.
        keys: Address of each latent's draw.
    """
    group = latent * len(SPLITS) + split
    n_chosen = np.bincount(group, minlength=len(keys) * len(SPLITS))[group]
    copies = np.maximum(0, (n_wanted[split] - draw_rank - 1) // np.maximum(n_chosen, 1) + 1)
    n_places = int(place.max(initial=0)) + 1
    cell, n = _summed(group * n_places + place, copies)
    at, place_of = np.divmod(cell, n_places)
    of_latent, split_of = np.divmod(at, len(SPLITS))
    stratum = place_of * len(SPLITS) + split_of
    return Demand(of_latent, split_of, place_of, n, hash_priority(keys[of_latent], stratum))


def _summed(
    cell: Int64[np.ndarray, " window"], copies: Int64[np.ndarray, " window"]
) -> tuple[Int64[np.ndarray, " cell"], Int64[np.ndarray, " cell"]]:
    """Each cell that has copies, ascending, and how many; none has 2**17 in one window."""
    packed = np.sort(cell[copies > 0] << 17 | copies[copies > 0])
    cell, copies = packed >> 17, packed & (1 << 17) - 1
    first = np.flatnonzero(np.append(True, cell[1:] != cell[:-1])[: len(cell)])
    return cell[first], np.add.reduceat(copies, first) if len(first) else copies


def silent_windows(
    grid: WindowGrid, demand: Demand, n_latents: int, active: Question, repeats: Question | None
) -> Drawn:
    """Draw non-activating windows without replacement, at random under each latent's address.

    A stratum holds the windows of one split at one place. Each latent walks through a stratum in
    an order of its own, a keyed permutation that is computed only as far as it is needed, and
    takes the first windows that pass. A stratum that runs out gives fewer windows; they are made
    up for neither by another place nor in another way.

    Args:
        grid: The windows to draw from.
        demand: How many of each (latent, split, place); each combination once.
        n_latents: Length of the caller's arrays per latent.
        active: Whether the latent is active there (the window, or its context).
        repeats: Whether the window nearly repeats one that is shown; null: no question.
    """
    strata = grid.strata
    stratum = demand.split * strata.n_places + demand.place
    first = strata.first[stratum]
    size = strata.first[stratum + 1] - first
    need, walked = demand.n.copy(), np.zeros(len(demand.n), dtype=np.int64)
    latents, windows = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    passed_over = np.zeros(n_latents, dtype=np.int64)
    pending, ahead = np.flatnonzero((need > 0) & (size > 0)), 1
    while len(pending):
        step = np.minimum(size[pending] - walked[pending], need[pending] * ahead + 2)
        of = np.repeat(pending, step)
        index = walked[of] + counts_up(step)
        window = strata.members[first[of] + permuted(index, size[of], demand.key[of])]
        silent = ~active(demand.latent[of], window)
        repeated = np.zeros(len(of), dtype=bool)
        if repeats is not None:
            repeated[silent] = repeats(demand.latent[of[silent]], window[silent])
        passes = silent & ~repeated
        taken_before = _running_count(passes, step)
        in_time = taken_before < need[of]
        chosen = passes & in_time
        latents.append(demand.latent[of[chosen]])
        windows.append(window[chosen])
        passed_over += np.bincount(demand.latent[of[repeated & in_time]], minlength=n_latents)
        need -= np.bincount(of[chosen], minlength=len(need))
        walked[pending] += step
        pending, ahead = np.flatnonzero((need > 0) & (walked < size)), ahead * 2
    return Drawn(np.concatenate(latents), np.concatenate(windows), passed_over)


def _running_count(
    flags: Bool[np.ndarray, " row"], n: Int64[np.ndarray, " group"]
) -> Int64[np.ndarray, " row"]:
    """How many flags are set before each row, within its group of ``n`` consecutive rows."""
    before = np.cumsum(flags) - flags
    return before - np.repeat(before[np.cumsum(n) - n], n)
