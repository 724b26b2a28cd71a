"""The activating windows of a range's latents that windows are drawn from.

1. Each window gets its quantile by strength among all of its latent's.
2. In ``centred`` mode windows are cut again, around their maxima; of two that overlap one stays.
3. Of a very frequent latent only a sample stays.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int8, Int64, UInt64

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.latent_records.centred import Cuts, centred_windows, without_overlaps
from autointerp_dagster.core.latent_records.firing import ActiveWindows, FiringTokens
from autointerp_dagster.core.rng import hash_priority
from autointerp_dagster.core.sampling import (
    BY_STRENGTH,
    latent_keys,
    may_be_drawn,
    quantile_bands,
    ranks_within,
    strength_ranks,
)
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.core.windows import SPLITS, WindowGrid

_SPARE = 4
"""Times as many windows as are drawn: what stays at least of the latent's, so that near-duplicates
may go."""


class Keys(NamedTuple):
    """The addresses of a latent's draws."""

    tie: UInt64[np.ndarray, " latent"]
    draw: UInt64[np.ndarray, " latent"]
    silent: UInt64[np.ndarray, " latent"]
    rank: UInt64[np.ndarray, " latent"]


def keys_of(seed: int, layer: LayerKey, latents: range) -> Keys:
    """The addresses of each latent of the range."""
    address = latent_keys(seed, layer, latents, "windows")
    purposes = np.arange(len(Keys._fields))
    return Keys(*(hash_priority(address, np.full(len(address), i)) for i in purposes))


class Pool(NamedTuple):
    """Activating windows by (latent, window)."""

    row: Int64[np.ndarray, " window"]
    """Which of the active windows it is."""
    latent: Int64[np.ndarray, " window"]
    window: Int64[np.ndarray, " window"]
    """Index into the grid; in ``centred`` mode of the window that holds the maximum."""
    split: Int8[np.ndarray, " window"]
    maximum: Float32[np.ndarray, " window"]
    """Largest activation in the window of the grid."""
    quantile: Int8[np.ndarray, " window"]
    """By maximum, among all of the latent's windows; 0 is the strongest."""
    priority: UInt64[np.ndarray, " window"]

    def at(self, rows: Int64[np.ndarray, " row"]) -> "Pool":
        """Some of the windows."""
        return Pool(*(column[rows] for column in self))

    def strength(self, keys: Keys, grid: WindowGrid) -> Int64[np.ndarray, " window"]:
        """Rank of each window among its latent's in the pool, 0 the strongest; no two alike."""
        ties = hash_priority(keys.tie[self.latent], grid.window_id[self.window])
        return strength_ranks(self.latent, self.maximum, ties)


def pool_of(
    firing: FiringTokens,
    active: ActiveWindows,
    is_ok: Bool[np.ndarray, " latent"],
    dataset: TokenDataset,
    grid: WindowGrid,
    keys: Keys,
    config: SamplingConfig,
) -> tuple[Pool, Cuts]:
    """What is drawn from, for the latents that are ``is_ok``, and what is shown of each window.

    Quantiles count every window of the latent, whichever stay.
    """
    latent, window = active.latent, active.window
    ids = grid.window_id[window]
    quantile = quantile_bands(
        latent,
        active.maximum,
        lambda rows: hash_priority(keys.tie[latent[rows]], ids[rows]),
        config.n_quantiles,
    )
    priority = hash_priority(keys.draw[latent], ids)
    row = np.arange(len(latent))
    pool = Pool(row, latent, window, active.split, active.maximum, quantile, priority)
    if config.window_mode == "centred":
        pool, cuts = _centred(pool, firing, active, dataset, grid, keys)
    else:
        cuts = Cuts(None, active.first, active.n_tokens, active.maximum)
    stays = _sampled(pool, is_ok, grid, keys, config)
    stays &= _in_reach(pool, stays, is_ok, grid, config)
    pool = pool.at(np.flatnonzero(stays))
    return pool.at(np.flatnonzero(is_ok[pool.latent])), cuts


def starts_of(pool: Pool, cuts: Cuts, grid: WindowGrid) -> Int64[np.ndarray, " window"]:
    """The first position of what is shown of each window."""
    return grid.start[pool.window] if cuts.start is None else cuts.start[pool.row]


def _in_reach(
    pool: Pool,
    stays: Bool[np.ndarray, " window"],
    is_ok: Bool[np.ndarray, " latent"],
    grid: WindowGrid,
    config: SamplingConfig,
) -> Bool[np.ndarray, " window"]:
    """False for windows that are not drawn in any case: most of a frequent latent's."""
    is_centred = config.window_mode == "centred"
    threshold, shingles = config.near_duplicate_jaccard, grid.shingles
    if config.strategy != "quantiles" or (threshold is not None and is_centred):
        return stays
    may_go = np.zeros(len(pool.row), dtype=bool)
    if threshold is not None and shingles is not None:
        may_go = (shingles.row >= 0)[pool.window]
    group = pool.latent * len(SPLITS)
    group += pool.split
    if not stays.all():
        group[~stays] = len(is_ok) * len(SPLITS)  # of which none are drawn
    wanted = np.outer(is_ok, [config.n_train, config.n_select, config.n_test]).reshape(-1)
    return may_be_drawn(
        group, pool.quantile, pool.priority, np.append(wanted, 0), config.n_quantiles, may_go
    )


def _centred(
    pool: Pool,
    firing: FiringTokens,
    active: ActiveWindows,
    dataset: TokenDataset,
    grid: WindowGrid,
    keys: Keys,
) -> tuple[Pool, Cuts]:
    cuts, is_peak = centred_windows(firing, active, dataset, grid)
    pool = pool.at(np.flatnonzero(is_peak[pool.row]))
    start, context = starts_of(pool, cuts, grid), grid.context[pool.window]
    strength = pool.strength(keys, grid)
    stays = without_overlaps(pool.latent, context, start, strength, grid.window_len)
    return pool.at(np.flatnonzero(stays)), cuts


def _sampled(
    pool: Pool,
    is_ok: Bool[np.ndarray, " latent"],
    grid: WindowGrid,
    keys: Keys,
    config: SamplingConfig,
) -> Bool[np.ndarray, " window"]:
    """About ``max_windows`` of each latent, by hashed priority, and the strongest ones if need be.

    Each split, and each quantile where draws go by quantiles, keeps its share of ``max_windows``,
    or 4 times what is drawn of it if that is more. These are the very windows that a draw by the
    same priority would take first, so what is drawn is what would be drawn from all, unless three
    quarters of them nearly repeat what was shown. Strategies that begin with the strongest windows
    keep 4 times as many of these as are drawn of the split.
    """
    kept = np.ones(len(pool.row), dtype=bool)
    n_windows = np.bincount(pool.latent, minlength=len(is_ok))
    rows = np.flatnonzero(((n_windows > config.max_windows) & is_ok)[pool.latent])
    if not len(rows):
        return kept
    latent, split = pool.latent[rows], pool.split[rows]
    spare = _SPARE * np.array([config.n_train, config.n_select, config.n_test])
    goes_by_quantile = config.strategy in ("quantiles", "mix")
    n_bands = config.n_quantiles if goes_by_quantile else 1
    group = latent * len(SPLITS) + split
    cell = group * n_bands + (pool.quantile[rows] if goes_by_quantile else 0)
    share = np.ceil(np.bincount(cell)[cell] * (config.max_windows / n_windows[latent]))
    stays = ranks_within(cell, pool.priority[rows]) < np.maximum(share, -(-spare // n_bands)[split])
    if config.strategy in BY_STRENGTH:
        place = ranks_within(group, pool.priority[rows], pool.at(rows).strength(keys, grid))
        stays |= place < spare[split]
    kept[rows] = stays
    return kept
