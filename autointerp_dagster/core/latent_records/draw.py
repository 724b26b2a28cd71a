"""Which windows of a range's latents are shown: each split without what repeats those before it."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.latent_records.centred import Cuts
from autointerp_dagster.core.latent_records.firing import ActiveWindows, FiringTokens
from autointerp_dagster.core.latent_records.pool import Keys, Pool, keys_of, pool_of, starts_of
from autointerp_dagster.core.latent_records.questions import (
    Repeats,
    Shown,
    activity,
    near_repeats,
    on_grid,
    or_meeting,
    same_texts,
)
from autointerp_dagster.core.negatives import (
    NegativeRequest,
    Negatives,
    NegativeSources,
    draw_negatives,
)
from autointerp_dagster.core.rng import hash_priority
from autointerp_dagster.core.sampling import BY_STRENGTH, draw_ranks, ranks_within
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.core.windows import SPLITS, WindowGrid


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
    one of these or a select window, which a refining explainer is shown. No non-activating window
    nearly repeats an activating one of its own split either, which no judge could tell from it;
    where near-duplicates are not looked for, none has the same visible tokens. None has a token in
    common with a centred window that is shown.
    """
    keys = keys_of(config.seed, layer, latents)
    pool, cuts = pool_of(firing, active, is_ok, dataset, grid, keys, config)
    is_active = activity(firing, active, grid, config)
    wanted = (config.n_negative_train, config.n_negative_select, config.n_negative_test)

    shown = Shown.none()
    chosen: list[Pool] = []
    silent: list[Negatives] = []
    dropped = np.zeros(len(latents), dtype=np.int64)
    for split in range(len(SPLITS)):
        among = pool.at(np.flatnonzero(pool.split == split))
        repeats = near_repeats(dataset, grid, config, shown) if split else None
        among, repeating = _without_repeats(among, _shown_of(among, cuts, grid), repeats)
        drawn, rank = _choose(among, grid, keys, config)
        mine = _shown_of(drawn, cuts, grid)
        shown = shown.extended(mine)
        near = near_repeats(dataset, grid, config, shown)
        repeats = same_texts(dataset, grid, mine) if near is None else on_grid(near, grid)
        is_fixed = config.window_mode == "fixed"
        request = NegativeRequest(
            grid=grid, split=split, n_wanted=wanted[split], latent=drawn.latent,
            window=drawn.window, rank=rank, top_token=top_token, key=keys.silent,
            active=is_active if is_fixed else or_meeting(is_active, mine, grid),
            repeats=repeats,
        )  # fmt: skip
        quiet = draw_negatives(config.negative_kinds, request, sources)
        dropped += quiet.n_near_duplicates + np.bincount(repeating, minlength=len(latents))
        shown = shown.extended(Shown(quiet.latent, quiet.window, grid.start[quiet.window]))
        chosen.append(drawn)
        silent.append(quiet)
    return _ranked(chosen, silent, dropped, cuts, grid, keys)


def _shown_of(pool: Pool, cuts: Cuts, grid: WindowGrid) -> Shown:
    return Shown(pool.latent, pool.window, starts_of(pool, cuts, grid))


def _without_repeats(
    pool: Pool, shown: Shown, repeats: Repeats | None
) -> tuple[Pool, Int64[np.ndarray, " repeating"]]:
    """The windows that repeat nothing, and the latents of those that do."""
    is_repeat = np.zeros(len(pool.row), dtype=bool) if repeats is None else repeats(shown)
    if not is_repeat.any():
        return pool, pool.latent[:0]
    return pool.at(np.flatnonzero(~is_repeat)), pool.latent[is_repeat]


def _choose(
    pool: Pool, grid: WindowGrid, keys: Keys, config: SamplingConfig
) -> tuple[Pool, Int64[np.ndarray, " chosen"]]:
    """The windows drawn among some, and their order of drawing within a (latent, split)."""
    wanted = np.array([config.n_train, config.n_select, config.n_test])[pool.split]
    strength = pool.strength(keys, grid) if config.strategy in BY_STRENGTH else None
    group = pool.latent * len(SPLITS) + pool.split
    ranks = draw_ranks(config.strategy, group, pool.quantile, strength, pool.priority, wanted)
    chosen = np.flatnonzero(ranks >= 0)
    return pool.at(chosen), ranks[chosen]


def _ranked(
    by_split: list[Pool],
    silent_by_split: list[Negatives],
    n_near_duplicates: Int64[np.ndarray, " latent"],
    cuts: Cuts,
    grid: WindowGrid,
    keys: Keys,
) -> DrawnWindows:
    chosen = Pool(*(np.concatenate(column) for column in zip(*by_split, strict=True)))
    silent = Negatives(*(np.concatenate(column) for column in zip(*silent_by_split, strict=True)))
    latent = np.concatenate([chosen.latent, silent.latent])
    window = np.concatenate([chosen.window, silent.window])
    n_drawn = [len(part.latent) for part in (*by_split, *silent_by_split)]
    split = np.repeat(np.tile(np.arange(len(SPLITS)), 2), n_drawn)  # what each was drawn for
    n_activating = len(chosen.latent)
    is_silent = np.arange(len(latent)) >= n_activating
    group = (latent * len(SPLITS) + split) * 2 + is_silent
    strongest_first = np.zeros(len(latent), dtype=np.int64)
    train = np.flatnonzero(chosen.split == 0)
    strongest_first[train] = chosen.at(train).strength(keys, grid)
    priority = hash_priority(keys.rank[latent], grid.window_id[window])
    return DrawnWindows(
        latent=latent,
        window=window,
        start=np.concatenate([starts_of(chosen, cuts, grid), grid.start[silent.window]]),
        split=split,
        rank=ranks_within(group, priority, strongest_first),
        chosen=chosen,
        cuts=cuts,
        kind=silent.kind,
        source=silent.source,
        n_near_duplicates=n_near_duplicates,
    )
