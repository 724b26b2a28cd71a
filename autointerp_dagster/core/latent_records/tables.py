"""The stored tables of a range of latents.

1. The range's firing tokens are sorted and grouped into (latent, window).
2. Every latent gets statistics and a status; only those that are ``ok`` go on.
3. Train windows are drawn, activating and silent ones.
4. Select and test windows that nearly repeat a train window of the latent are dropped; the others
   are drawn.
"""

from typing import NamedTuple, get_args

import numpy as np
import polars as pl

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.latent_records.draw import DrawnWindows, draw_windows
from autointerp_dagster.core.latent_records.firing import (
    ActiveWindows,
    FiringTokens,
    active_windows,
    count_by_split,
    firing_tokens,
)
from autointerp_dagster.core.latent_records.statistics import statistics_of, status_of
from autointerp_dagster.core.negatives import NegativeSources
from autointerp_dagster.core.schemas import LATENTS, NEIGHBOUR_WINDOWS, WINDOWS, LatentStatus
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.core.windows import SPLITS, WindowGrid, check_splits, window_grid


class RecordTables(NamedTuple):
    """The records of a range, as they are stored."""

    latents: pl.DataFrame
    """``schemas.LATENTS``: every latent of the range, with its status."""
    windows: pl.DataFrame
    """``schemas.WINDOWS`` of the latents whose status is ``ok``."""


class RecordCounts(NamedTuple):
    """What became of a range's latents; they add up to the range."""

    ok: int
    dead: int
    rare: int
    dense: int
    n_windows: int
    """Windows drawn, of both classes."""
    n_near_duplicates: int


def record_counts(tables: RecordTables) -> RecordCounts:
    """How many latents have which status, and how many windows were drawn and dropped."""
    of = {name: int((tables.latents["status"] == name).sum()) for name in get_args(LatentStatus)}
    n_near_duplicates = int(tables.latents["n_near_duplicates"].sum())
    return RecordCounts(**of, n_windows=tables.windows.height, n_near_duplicates=n_near_duplicates)


def latent_records_of(
    activations: pl.DataFrame,
    firing_counts: pl.DataFrame,
    dataset: TokenDataset,
    layer: LayerKey,
    latents: range,
    config: SamplingConfig,
    grid: WindowGrid | None = None,
    sources: NegativeSources | None = None,
) -> RecordTables:
    """The records of a range of latents; a row depends on nothing but its own latent and the grid.

    A latent is ``dead`` if it never fires, else ``rare`` if it has fewer than ``min_tokens`` firing
    tokens or fewer than ``min_test_windows`` activating test windows, else ``dense`` if it fires in
    more than ``max_window_firing_rate`` of all windows, else ``ok``.

    Of the counts, ``n_train``, ``n_select`` and ``n_test`` are all activating windows of the split,
    before near-duplicates are dropped and before any draw (how many were drawn: count the rows of
    ``windows``). ``n_near_duplicates`` are activating windows of select and test, all of them
    looked at, plus silent ones that were passed over in their draw, because they nearly repeat a
    drawn window of an earlier split; 0 unless the status is ``ok``,
    like ``n_negative_*``. Dead latents have null ``max_activation`` and ``activation_quantiles``
    (linear interpolation). ``top_tokens`` weigh all activating train windows, drawn or not; ties
    go to the smaller token id; empty without train windows.

    Args:
        activations: ``schemas.ACTIVATIONS`` of these latents and no others, in any order.
        firing_counts: ``schemas.FIRING_COUNTS`` of at least these latents.
        dataset: What the activations were computed on.
        layer: Part of every address.
        latents: The range, in steps of 1; may be empty.
        config: How windows are cut, split and drawn.
        grid: From :func:`core.windows.window_grid` of the same ``dataset`` and ``config``; made
            here if null. Pass it where several ranges share it.
        sources: What negatives of other kinds than ``random`` are drawn from.

    Raises:
        ValueError: If an activation is not a finite number above 0, lies outside of the range or
            of the tokens, or is there twice; or if the firing counts do not match.
        RuntimeError: If a document block were in two splits (a bug).
    """
    grid = window_grid(dataset, config) if grid is None else grid
    firing = firing_tokens(activations, dataset, grid, layer, latents)
    active = active_windows(firing, grid)
    statistics = statistics_of(firing, active, firing_counts, dataset, grid, layer, latents)
    statistics = statistics.with_columns(status=status_of(config))
    is_ok = (statistics["status"] == "ok").to_numpy()
    sources = NegativeSources() if sources is None else sources
    top = statistics["top_tokens"].list.first().cast(pl.Int64).fill_null(-1).to_numpy()
    drawn = draw_windows(firing, active, is_ok, grid, layer, latents, config, top, sources)
    check_splits(grid, drawn.window, drawn.split)
    is_silent = np.arange(len(drawn.latent)) >= len(drawn.row)
    n_negative = count_by_split(drawn.latent[is_silent], drawn.split[is_silent], len(latents))
    rows = statistics.with_columns(
        pl.Series("n_near_duplicates", drawn.n_near_duplicates),
        *(pl.Series(f"n_negative_{name}", n_negative[:, i]) for i, name in enumerate(SPLITS)),
    )
    windows = _window_rows(drawn, firing, active, grid, latents, config, sources)
    return RecordTables(LATENTS.conform(rows, layer), WINDOWS.conform(windows, layer))


def _window_rows(
    drawn: DrawnWindows,
    firing: FiringTokens,
    active: ActiveWindows,
    grid: WindowGrid,
    latents: range,
    config: SamplingConfig,
    sources: NegativeSources,
) -> pl.DataFrame:
    """``schemas.WINDOWS``, without the layer."""
    n_activating = len(drawn.row)
    common = pl.DataFrame(
        {
            "latent": (drawn.latent + latents.start).astype(np.uint32),
            "split": pl.Series(SPLITS, dtype=pl.String)[drawn.split],
            "is_activating": np.arange(len(drawn.latent)) < n_activating,
            "window_id": grid.window_id[drawn.window],
            "context": grid.context[drawn.window].astype(np.uint32),
            "start": grid.start[drawn.window].astype(np.uint16),
            "rank": drawn.rank,
        }
    )
    activating = common[:n_activating].with_columns(
        pl.Series("negative_kind", [None] * n_activating, dtype=pl.String),
        pl.Series("quantile", drawn.quantile.astype(np.uint8)),
        pl.Series("max_activation", active.maximum[drawn.row]),
        _position_activations(drawn, firing, active, grid),
        pl.lit(None, dtype=pl.UInt32).alias("neighbour"),
        pl.lit(None, dtype=pl.List(pl.Float32)).alias("neighbour_activations"),
    )
    silent = common[n_activating:].with_columns(
        pl.Series("negative_kind", config.negative_kinds, dtype=pl.String)[drawn.kind],
        *_of_neighbours(drawn, sources),
        *(
            pl.lit(None, dtype=activating.schema[name]).alias(name)
            for name in ("quantile", "max_activation", "activations")
        ),
    )
    return pl.concat([activating, silent.select(activating.columns)])


def _of_neighbours(drawn: DrawnWindows, sources: NegativeSources) -> list[pl.Series]:
    """Who fires in each non-activating window that was drawn for it, and how; else null."""
    wanted = pl.Series(drawn.source)
    found = (
        NEIGHBOUR_WINDOWS.empty()
        if sources.neighbour_windows is None
        else (sources.neighbour_windows)
    )
    rows = wanted.set(wanted < 0, None).cast(pl.UInt32)
    return [
        found["latent"].gather(rows).alias("neighbour"),
        found["activations"].gather(rows).alias("neighbour_activations"),
    ]


def _position_activations(
    drawn: DrawnWindows, firing: FiringTokens, active: ActiveWindows, grid: WindowGrid
) -> pl.Series:
    """One list per activating window: the activation at each position, 0 where silent."""
    n_tokens = active.n_tokens[drawn.row]
    slot = np.repeat(np.arange(len(drawn.row)), n_tokens)
    within = np.arange(len(slot)) - np.repeat(np.cumsum(n_tokens) - n_tokens, n_tokens)
    token = active.first[drawn.row][slot] + within
    dense = np.zeros((len(drawn.row), grid.window_len), dtype=np.float32)
    dense[slot, firing.position[token] % grid.window_len] = firing.activation[token]
    return pl.Series(
        "activations", dense, dtype=pl.Array(pl.Float32, grid.window_len)
    ).arr.to_list()
