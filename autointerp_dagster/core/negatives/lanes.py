"""Negatives that come from lists of candidates: each latent takes from several lists by turns.

1. A latent's lanes are asked turn by turn: everybody's first candidate, everybody's second, ...
   A window that several lanes offer belongs to the one that offers it first.
2. Candidates in which the latent is active, or that nearly repeat a window shown before or an
   activating one of the split, are passed over. It ends once the others can stand at the places in
   the context where the activating windows stand, or are 16 times as many as are wanted.
3. Of these the latent takes by turns, first those at a place where it still lacks one; then, if it
   is short, the others by turns.

So the quota is spread over the lanes, and places match as far as the candidates allow.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt64

from autointerp_dagster.core.grouping import number_in_group
from autointerp_dagster.core.negatives.permuting import counts_up, permuted
from autointerp_dagster.core.negatives.request import NegativeRequest, Rows
from autointerp_dagster.core.negatives.silent import matching_demand
from autointerp_dagster.core.windows import SPLITS, WindowGrid

_AT_FIRST, _AT_MOST = 4, 16  # candidates per window wanted


class Lanes(NamedTuple):
    """Lists of candidates; a latent may have several, lanes may share one list."""

    latent: Int64[np.ndarray, " lane"]
    """Index into ``request.key``, ascending; the lanes of a latent in their order."""
    first: Int64[np.ndarray, " lane"]
    """The lane's list is ``window[first : first + size]``."""
    size: Int64[np.ndarray, " lane"]
    key: UInt64[np.ndarray, " lane"] | None
    """Address under which the list is shuffled; null: it is taken in its order."""
    window: Int[np.ndarray, " member"]
    """Index into the grid."""
    source: Int64[np.ndarray, " member"] | None = None
    """What ``Negatives.source`` says of a member; null: nothing."""


class Taken(NamedTuple):
    """Windows drawn from lanes, distinct within a latent."""

    latent: Int64[np.ndarray, " row"]
    window: Int64[np.ndarray, " row"]
    source: Int64[np.ndarray, " row"]
    """-1 where the lanes say nothing."""
    n_near_duplicates: Int64[np.ndarray, " latent"]
    """Per latent, near-duplicates offered before the last window that was taken."""


class _Offers(NamedTuple):
    """Silent candidates, distinct within a latent."""

    latent: Int64[np.ndarray, " row"]
    window: Int64[np.ndarray, " row"]
    lane: Int64[np.ndarray, " row"]
    turn: Int64[np.ndarray, " row"]
    """Place in its lane, those that were passed over included."""
    member: Int64[np.ndarray, " row"]
    is_repeat: Bool[np.ndarray, " row"]


class _Places(NamedTuple):
    """How many windows are wanted at which place in the context."""

    grid: WindowGrid
    cell: Int64[np.ndarray, " demand"]
    """Latent and place as one number, ascending; a sentinel at the end."""
    n: Int64[np.ndarray, " demand"]

    @classmethod
    def of(cls, request: NegativeRequest, quota: int) -> "_Places":
        wanted = np.zeros(len(SPLITS), dtype=np.int64)
        wanted[request.split] = quota
        split = np.full(len(request.latent), request.split, dtype=np.int64)
        place = request.grid.place[request.window]
        demand = matching_demand(request.latent, split, request.rank, place, wanted, request.key)
        cell = demand.latent * request.grid.n_windows + demand.place
        return cls(request.grid, np.append(cell, np.iinfo(np.int64).max), np.append(demand.n, 0))

    def fits(self, latent: Rows, window: Rows) -> Bool[np.ndarray, " row"]:
        """Whether one is still wanted there, as the rows come."""
        cell = latent * self.grid.n_windows + self.grid.place[window]
        at = np.searchsorted(self.cell, cell)
        return number_in_group(cell) < np.where(self.cell[at] == cell, self.n[at], 0)


def draw_from_lanes(request: NegativeRequest, quota: int, lanes: Lanes) -> Taken:
    """At most ``quota`` windows for each latent that has lanes; fewer where too few pass."""
    n_latents, places = len(request.key), _Places.of(request, quota)
    offers = _offers(request, quota, lanes, places)
    usable = np.flatnonzero(~offers.is_repeat)
    lane, latent = offers.lane[usable], offers.latent[usable]
    turn = np.empty(len(usable), dtype=np.int64)
    by_turn = np.lexsort((offers.turn[usable], lane))
    turn[by_turn] = number_in_group(lane[by_turn])  # in the lane, among those that passed
    usable = usable[np.lexsort((lane, turn, latent))]
    chosen = usable[_is_chosen(offers.latent[usable], offers.window[usable], places, quota)]
    n_taken = np.bincount(offers.latent[chosen], minlength=n_latents)
    asked = offers.turn * max(1, len(lanes.latent)) + offers.lane
    last = np.where(n_taken < quota, np.iinfo(np.int64).max, -1)
    np.maximum.at(last, offers.latent[chosen], asked[chosen])
    passed = offers.latent[offers.is_repeat & (asked < last[offers.latent])]
    source = np.full(len(chosen), -1)
    if lanes.source is not None:
        source = lanes.source[offers.member[chosen]]
    n_near_duplicates = np.bincount(passed, minlength=n_latents)
    return Taken(offers.latent[chosen], offers.window[chosen], source, n_near_duplicates)


def _offers(request: NegativeRequest, quota: int, lanes: Lanes, places: _Places) -> _Offers:
    """The silent candidates of every latent, as far as there is need."""
    n_latents, n_windows = len(request.key), request.grid.n_windows
    longest = np.zeros(n_latents, dtype=np.int64)
    np.maximum.at(longest, lanes.latent, lanes.size)
    n_lanes = np.maximum(np.bincount(lanes.latent, minlength=n_latents), 1)
    step, done = -(-quota * _AT_FIRST // n_lanes), np.zeros(n_latents, dtype=np.int64)
    found = _none_offered()
    while (is_pending := _is_short(found, places, quota, n_latents) & (done < longest)).any():
        asked = _asked(lanes, is_pending, done, step)
        seen = np.concatenate([found.latent, asked.latent]) * n_windows
        seen += np.concatenate([found.window, asked.window])
        first = np.sort(np.unique(seen, return_index=True)[1])
        new = first[first >= len(found.latent)] - len(found.latent)
        asked = _rows_of(asked, new)
        asked = _rows_of(asked, np.flatnonzero(~request.active(asked.latent, asked.window)))
        if request.repeats is not None:
            asked = asked._replace(is_repeat=request.repeats(asked.latent, asked.window))
        found = _Offers(*(np.concatenate(both) for both in zip(found, asked, strict=True)))
        done[is_pending] += step[is_pending]
        step *= 2
    return found


def _is_short(
    offers: _Offers, places: _Places, quota: int, n_latents: int
) -> Bool[np.ndarray, " latent"]:
    """Which latents should be offered more."""
    usable = np.flatnonzero(~offers.is_repeat)
    latent = offers.latent[usable]
    fits = places.fits(latent, offers.window[usable])
    n_usable = np.bincount(latent, minlength=n_latents)
    return (np.bincount(latent[fits], minlength=n_latents) < quota) & (n_usable < quota * _AT_MOST)


def _asked(
    lanes: Lanes,
    is_pending: Bool[np.ndarray, " latent"],
    done: Int64[np.ndarray, " latent"],
    step: Int64[np.ndarray, " latent"],
) -> _Offers:
    """The next candidates of every lane of the pending latents, turn by turn."""
    lane = np.flatnonzero(is_pending[lanes.latent])
    latent = lanes.latent[lane]
    n = np.clip(lanes.size[lane] - done[latent], 0, step[latent])
    lane, turn = np.repeat(lane, n), np.repeat(done[latent], n) + counts_up(n)
    order = np.argsort(turn, kind="stable")
    lane, turn = lane[order], turn[order]
    at = turn if lanes.key is None else permuted(turn, lanes.size[lane], lanes.key[lane])
    member = lanes.first[lane] + at
    is_repeat = np.zeros(len(lane), dtype=bool)
    window = lanes.window[member].astype(np.int64)
    return _Offers(lanes.latent[lane], window, lane, turn, member, is_repeat)


def _is_chosen(latent: Rows, window: Rows, places: _Places, quota: int) -> Bool[np.ndarray, " row"]:
    """Which candidates are taken of all that passed, in the order of turns within a latent."""
    chosen = places.fits(latent, window)
    left = quota - np.bincount(latent[chosen], minlength=int(latent.max(initial=0)) + 1)
    others = np.flatnonzero(~chosen)
    chosen[others] = number_in_group(latent[others]) < left[latent[others]]
    return chosen


def _rows_of(offers: _Offers, rows: Rows) -> _Offers:
    return _Offers(*(column[rows] for column in offers))


def _none_offered() -> _Offers:
    none = np.zeros(0, dtype=np.int64)
    return _Offers(none, none, none, none, none, np.zeros(0, dtype=bool))
