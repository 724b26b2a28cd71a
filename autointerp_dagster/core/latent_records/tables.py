"""The stored tables of a range of latents.

1. The range's firing tokens are sorted and grouped into (latent, window).
2. Every latent gets statistics and a status; only those that are ``ok`` go on. What is drawn from
   are their windows, or the windows around their peaks; of a very frequent latent, a sample.
3. Train windows are drawn, activating and silent ones.
4. Select and test windows that nearly repeat a train window of the latent are dropped; the others
   are drawn.
"""

from typing import NamedTuple, get_args

import numpy as np
import polars as pl

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.latent_records.draw import draw_windows
from autointerp_dagster.core.latent_records.firing import (
    active_windows,
    count_by_split,
    firing_tokens,
)
from autointerp_dagster.core.latent_records.statistics import statistics_of
from autointerp_dagster.core.latent_records.window_rows import window_rows
from autointerp_dagster.core.negatives import NegativeSources
from autointerp_dagster.core.schemas import LATENTS, WINDOWS, LatentStatus
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


def record_counts(latents: pl.DataFrame, n_windows: int) -> RecordCounts:
    """How many latents have which status, and how many windows were drawn and dropped.

    Args:
        latents: ``schemas.LATENTS``.
        n_windows: Rows of ``schemas.WINDOWS`` that belong to them.
    """
    of = {name: int((latents["status"] == name).sum()) for name in get_args(LatentStatus)}
    n_near_duplicates = int(latents["n_near_duplicates"].sum())
    return RecordCounts(**of, n_windows=n_windows, n_near_duplicates=n_near_duplicates)


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
    ``windows``). ``n_near_duplicates`` are activating windows of select and test, all that are
    drawn from, because they nearly repeat a drawn window of an earlier split, plus silent ones that
    were passed over in their draw, for that or for an activating one of their own split; 0 unless
    the status is ``ok``, like ``n_negative_*``. All counts and ``quantile`` are of windows of the
    grid, in ``centred`` mode too. Dead latents have null ``max_activation`` and
    ``activation_quantiles`` (linear interpolation). ``top_tokens`` weigh all activating train
    windows, drawn or not; ties go to the smaller token id; empty without train windows.

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
    statistics = statistics_of(firing, active, firing_counts, dataset, grid, layer, latents, config)
    sources = NegativeSources() if sources is None else sources
    drawn = draw_windows(
        firing,
        active,
        statistics.is_ok,
        dataset,
        grid,
        layer,
        latents,
        config,
        statistics.top_token,
        sources,
    )
    check_splits(grid, drawn.window, drawn.split)
    is_silent = np.arange(len(drawn.latent)) >= len(drawn.chosen.row)
    n_negative = count_by_split(drawn.latent[is_silent], drawn.split[is_silent], len(latents))
    rows = statistics.table.with_columns(
        pl.Series("n_near_duplicates", drawn.n_near_duplicates),
        *(pl.Series(f"n_negative_{name}", n_negative[:, i]) for i, name in enumerate(SPLITS)),
    )
    windows = window_rows(drawn, firing, grid, latents, config, sources)
    return RecordTables(LATENTS.conform(rows, layer), WINDOWS.conform(windows, layer))
