"""Which windows of a range's latents are shown: each split without what repeats those before it."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.latent_records.firing import ActiveWindows, FiringTokens
from autointerp_dagster.core.negatives import (
    NegativeRequest,
    Negatives,
    NegativeSources,
    Question,
    Rows,
    draw_negatives,
)
from autointerp_dagster.core.rng import hash_priority
from autointerp_dagster.core.sampling import (
    draw_ranks,
    latent_keys,
    quantile_bands,
    ranks_within,
    strength_ranks,
)
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.core.windows import SPLITS, WindowGrid, near_duplicates

_Shown = tuple[Rows, Rows]
"""Latent and window of what an explainer may see."""


class DrawnWindows(NamedTuple):
    """Windows of both classes, the activating ones first."""

    latent: Int64[np.ndarray, " row"]
    """From 0 at the start of the range."""
    window: Int64[np.ndarray, " row"]
    split: Int64[np.ndarray, " row"]
    rank: Int64[np.ndarray, " row"]
    """Order of use within a (latent, split, class)."""
    row: Int64[np.ndarray, " activating"]
    """Which of the active windows each activating one is."""
    quantile: Int64[np.ndarray, " activating"]
    kind: Int64[np.ndarray, " silent"]
    """Of each non-activating one: index into the kinds asked for."""
    source: Int64[np.ndarray, " silent"]
    """As in ``Negatives``."""
    n_near_duplicates: Int64[np.ndarray, " latent"]


class _Keys(NamedTuple):
    """The addresses of a latent's draws."""

    tie: UInt64[np.ndarray, " latent"]
    draw: UInt64[np.ndarray, " latent"]
    silent: UInt64[np.ndarray, " latent"]
    rank: UInt64[np.ndarray, " latent"]


class _Pool(NamedTuple):
    """All activating windows of the latents that are drawn for."""

    row: Int64[np.ndarray, " window"]
    latent: Int64[np.ndarray, " window"]
    window: Int64[np.ndarray, " window"]
    split: Int64[np.ndarray, " window"]
    strength: Int64[np.ndarray, " window"]
    quantile: Int64[np.ndarray, " window"]
    priority: UInt64[np.ndarray, " window"]


def draw_windows(
    firing: FiringTokens,
    active: ActiveWindows,
    is_ok: Bool[np.ndarray, " latent"],
    grid: WindowGrid,
    layer: LayerKey,
    latents: range,
    config: SamplingConfig,
    top_token: Int64[np.ndarray, " latent"],
    sources: NegativeSources,
) -> DrawnWindows:
    """The windows of the latents that are ``is_ok``.

    Ranks: activating train windows by quantile, then by their maximum, the strongest first; all
    others in a hashed order. No select window nearly repeats a train window, and no test window
    one of these or a select window, which a refining explainer is shown.
    """
    keys = _keys(config.seed, layer, latents)
    pool = _pool(active, is_ok, grid, keys, config)
    is_active = _activity(firing, active, grid, config)
    wanted = (config.n_negative_train, config.n_negative_select, config.n_negative_test)

    shown: _Shown = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    chosen: list[Rows] = []
    silent: list[Negatives] = []
    dropped = np.zeros(len(latents), dtype=np.int64)
    for split in range(len(SPLITS)):
        repeats = _repeats(grid, shown) if split else None
        rows = np.flatnonzero(pool.split == split)
        if repeats is not None:
            is_repeat = repeats(pool.latent[rows], pool.window[rows])
            dropped += np.bincount(pool.latent[rows[is_repeat]], minlength=len(latents))
            rows = rows[~is_repeat]
        drawn = _choose(pool, rows, config)
        request = NegativeRequest(
            grid=grid,
            split=split,
            n_wanted=wanted[split],
            latent=pool.latent[drawn.row],
            window=pool.window[drawn.row],
            rank=drawn.rank,
            top_token=top_token,
            key=keys.silent,
            active=is_active,
            repeats=repeats,
        )
        quiet = draw_negatives(config.negative_kinds, request, sources)
        dropped += quiet.n_near_duplicates
        shown = (
            np.concatenate([shown[0], pool.latent[drawn.row], quiet.latent]),
            np.concatenate([shown[1], pool.window[drawn.row], quiet.window]),
        )
        chosen.append(drawn.row)
        silent.append(quiet)
    return _ranked(
        pool,
        np.concatenate(chosen),
        Negatives(*(np.concatenate(column) for column in zip(*silent, strict=True))),
        dropped,
        grid,
        keys,
    )


def _repeats(grid: WindowGrid, shown: _Shown) -> Question:
    """Whether a latent's window nearly repeats one of an earlier split."""
    return lambda latent, window: near_duplicates(grid.shingles, shown, (latent, window))


def _keys(seed: int, layer: LayerKey, latents: range) -> _Keys:
    address = latent_keys(seed, layer, latents, "windows")
    purposes = np.arange(len(_Keys._fields))
    return _Keys(*(hash_priority(address, np.full(len(address), i)) for i in purposes))


def _pool(
    active: ActiveWindows,
    is_ok: Bool[np.ndarray, " latent"],
    grid: WindowGrid,
    keys: _Keys,
    config: SamplingConfig,
) -> _Pool:
    row = np.flatnonzero(is_ok[active.latent])
    latent, window = active.latent[row], active.window[row]
    ids = grid.window_id[window]
    strength = strength_ranks(latent, active.maximum[row], hash_priority(keys.tie[latent], ids))
    quantile = quantile_bands(latent, strength, config.n_quantiles)
    priority = hash_priority(keys.draw[latent], ids)
    return _Pool(row, latent, window, active.split[row], strength, quantile, priority)


class _Chosen(NamedTuple):
    row: Int64[np.ndarray, " chosen"]
    """Into the pool."""
    rank: Int64[np.ndarray, " chosen"]
    """Order of drawing within a (latent, split)."""


def _choose(pool: _Pool, rows: Rows, config: SamplingConfig) -> _Chosen:
    wanted = np.array([config.n_train, config.n_select, config.n_test])[pool.split[rows]]
    ranks = draw_ranks(
        config.strategy,
        pool.latent[rows] * len(SPLITS) + pool.split[rows],
        pool.quantile[rows],
        pool.strength[rows],
        pool.priority[rows],
        wanted,
    )
    chosen = ranks >= 0
    return _Chosen(rows[chosen], ranks[chosen])


def _activity(
    firing: FiringTokens, active: ActiveWindows, grid: WindowGrid, config: SamplingConfig
) -> Question:
    """Whether a latent is active in a window, or in its context, as ``silent_scope`` says."""
    if config.silent_scope == "window":
        windows = active.latent * grid.n_windows + active.window
        return lambda latent, window: _contains(windows, latent * grid.n_windows + window)
    n_contexts = len(grid.first_window) - 1
    contexts = np.unique(firing.latent * n_contexts + firing.context)
    return lambda latent, window: _contains(contexts, latent * n_contexts + grid.context[window])


def _contains(
    sorted_keys: Int64[np.ndarray, " key"], asked: Int64[np.ndarray, " row"]
) -> Bool[np.ndarray, " row"]:
    if not len(sorted_keys):
        return np.zeros(len(asked), dtype=bool)
    at = np.minimum(np.searchsorted(sorted_keys, asked), len(sorted_keys) - 1)
    return sorted_keys[at] == asked


def _ranked(
    pool: _Pool,
    chosen: Int64[np.ndarray, " chosen"],
    silent: Negatives,
    n_near_duplicates: Int64[np.ndarray, " latent"],
    grid: WindowGrid,
    keys: _Keys,
) -> DrawnWindows:
    latent = np.concatenate([pool.latent[chosen], silent.latent])
    window = np.concatenate([pool.window[chosen], silent.window])
    split = grid.split[window].astype(np.int64)
    is_silent = np.arange(len(latent)) >= len(chosen)
    group = (latent * len(SPLITS) + split) * 2 + is_silent
    strongest_first = np.zeros(len(latent), dtype=np.int64)
    strongest_first[: len(chosen)] = np.where(split[: len(chosen)] == 0, pool.strength[chosen], 0)
    priority = hash_priority(keys.rank[latent], grid.window_id[window])
    return DrawnWindows(
        latent=latent,
        window=window,
        split=split,
        rank=ranks_within(group, priority, strongest_first),
        row=pool.row[chosen],
        quantile=pool.quantile[chosen],
        kind=silent.kind,
        source=silent.source,
        n_near_duplicates=n_near_duplicates,
    )
