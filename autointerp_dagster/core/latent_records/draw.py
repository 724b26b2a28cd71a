"""Which windows of a range's latents are shown: each split without what repeats those before it."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.latent_records.centred import Cuts
from autointerp_dagster.core.latent_records.firing import ActiveWindows, FiringTokens
from autointerp_dagster.core.latent_records.pool import Keys, Pool, keys_of, pool_of
from autointerp_dagster.core.negatives import (
    NegativeRequest,
    Negatives,
    NegativeSources,
    Question,
    Rows,
    draw_negatives,
)
from autointerp_dagster.core.rng import hash_priority
from autointerp_dagster.core.sampling import draw_ranks, ranks_within
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.core.windows import (
    SPLITS,
    Spans,
    WindowGrid,
    near_duplicates,
    repeating_spans,
)


class _Shown(NamedTuple):
    """Windows that an explainer may see, or that are compared with them."""

    latent: Rows
    window: Rows
    start: Rows

    def extended(self, latent: Rows, window: Rows, start: Rows) -> "_Shown":
        """These and some more."""
        more = (latent, window, start)
        return _Shown(*(np.concatenate(both) for both in zip(self, more, strict=True)))

    def spans(self, grid: WindowGrid) -> Spans:
        """Where they are, for windows that are not all on the grid."""
        return Spans(self.latent, grid.context[self.window], self.start)


_Repeats = Callable[[_Shown], Bool[np.ndarray, " row"]]


class DrawnWindows(NamedTuple):
    """Windows of both classes, the activating ones first."""

    latent: Int64[np.ndarray, " row"]
    """From 0 at the start of the range."""
    window: Int64[np.ndarray, " row"]
    """Index into the grid; in ``centred`` mode the window that holds the maximum."""
    start: Int64[np.ndarray, " row"]
    """First position of what is shown."""
    split: Int64[np.ndarray, " row"]
    rank: Int64[np.ndarray, " row"]
    """Order of use within a (latent, split, class)."""
    chosen: Pool
    """The activating ones."""
    cuts: Cuts
    """What is shown of each active window: ``chosen.row`` tells which."""
    kind: Int64[np.ndarray, " silent"]
    """Of each non-activating one: index into the kinds asked for."""
    source: Int64[np.ndarray, " silent"]
    """As in ``Negatives``."""
    n_near_duplicates: Int64[np.ndarray, " latent"]


def draw_windows(
    firing: FiringTokens,
    active: ActiveWindows,
    is_ok: Bool[np.ndarray, " latent"],
    dataset: TokenDataset,
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
    keys = keys_of(config.seed, layer, latents)
    pool, cuts = pool_of(firing, active, is_ok, dataset, grid, keys, config)
    is_active = _activity(firing, active, grid, config)
    wanted = (config.n_negative_train, config.n_negative_select, config.n_negative_test)

    shown = _Shown(*(np.zeros(0, np.int64) for _ in _Shown._fields))
    chosen: list[Pool] = []
    silent: list[Negatives] = []
    dropped = np.zeros(len(latents), dtype=np.int64)
    for split in range(len(SPLITS)):
        repeats = _repeats(dataset, grid, config, shown) if split else None
        rows, repeating = _without_repeats(pool, np.flatnonzero(pool.split == split), cuts, repeats)
        drawn, rank = _choose(pool, rows, config)
        request = NegativeRequest(
            grid=grid, split=split, n_wanted=wanted[split], latent=drawn.latent,
            window=drawn.window, rank=rank, top_token=top_token, key=keys.silent, active=is_active,
            repeats=None if repeats is None else _on_grid(repeats, grid),
        )  # fmt: skip
        quiet = draw_negatives(config.negative_kinds, request, sources)
        dropped += quiet.n_near_duplicates + np.bincount(repeating, minlength=len(latents))
        shown = shown.extended(*_shown_of(drawn, cuts))
        shown = shown.extended(quiet.latent, quiet.window, grid.start[quiet.window])
        chosen.append(drawn)
        silent.append(quiet)
    return _ranked(
        Pool(*(np.concatenate(column) for column in zip(*chosen, strict=True))),
        Negatives(*(np.concatenate(column) for column in zip(*silent, strict=True))),
        dropped,
        cuts,
        grid,
        keys,
    )


def _shown_of(pool: Pool, cuts: Cuts) -> _Shown:
    return _Shown(pool.latent, pool.window, cuts.start[pool.row])


def _repeats(
    dataset: TokenDataset, grid: WindowGrid, config: SamplingConfig, shown: _Shown
) -> _Repeats | None:
    """Whether a latent's window nearly repeats one of an earlier split; null: not looked for."""
    threshold = config.near_duplicate_jaccard
    if threshold is None:
        return None
    if config.window_mode == "centred":
        return lambda asked: repeating_spans(
            dataset, grid.window_len, threshold, shown.spans(grid), asked.spans(grid)
        )
    shingles = grid.shingles
    if shingles is None:
        raise ValueError("near_duplicate_jaccard: wanted a grid that was made with this sampling.")
    return lambda asked: near_duplicates(shingles, shown[:2], asked[:2])


def _without_repeats(
    pool: Pool, rows: Rows, cuts: Cuts, repeats: _Repeats | None
) -> tuple[Int64[np.ndarray, " kept"], Int64[np.ndarray, " repeating"]]:
    """``rows`` of the pool that repeat nothing, and the latents of those that do."""
    if repeats is None:
        return rows, rows[:0]
    is_repeat = repeats(_shown_of(pool.at(rows), cuts))
    return rows[~is_repeat], pool.latent[rows[is_repeat]]


def _on_grid(repeats: _Repeats, grid: WindowGrid) -> Question:
    return lambda latent, window: repeats(_Shown(latent, window, grid.start[window]))


def _choose(
    pool: Pool, rows: Rows, config: SamplingConfig
) -> tuple[Pool, Int64[np.ndarray, " chosen"]]:
    """The windows drawn among ``rows``, and their order of drawing within a (latent, split)."""
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
    return pool.at(rows[chosen]), ranks[chosen]


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
    chosen: Pool,
    silent: Negatives,
    n_near_duplicates: Int64[np.ndarray, " latent"],
    cuts: Cuts,
    grid: WindowGrid,
    keys: Keys,
) -> DrawnWindows:
    latent = np.concatenate([chosen.latent, silent.latent])
    window = np.concatenate([chosen.window, silent.window])
    split = grid.split[window].astype(np.int64)
    n_activating = len(chosen.latent)
    is_silent = np.arange(len(latent)) >= n_activating
    group = (latent * len(SPLITS) + split) * 2 + is_silent
    strongest_first = np.zeros(len(latent), dtype=np.int64)
    strongest_first[:n_activating] = np.where(chosen.split == 0, chosen.strength, 0)
    priority = hash_priority(keys.rank[latent], grid.window_id[window])
    return DrawnWindows(
        latent=latent,
        window=window,
        start=np.concatenate([cuts.start[chosen.row], grid.start[silent.window]]),
        split=split,
        rank=ranks_within(group, priority, strongest_first),
        chosen=chosen,
        cuts=cuts,
        kind=silent.kind,
        source=silent.source,
        n_near_duplicates=n_near_duplicates,
    )
