"""Which latents of a cell are explained, and which of them a further stage takes."""

import numpy as np
import polars as pl

from autointerp_dagster.core.sampling import floor_order, select_latents
from autointerp_dagster.core.schemas import FIRING_COUNTS, SELECTION
from autointerp_dagster.core.types import Cell
from autointerp_dagster.resources.stage_inputs import StageInputs
from autointerp_dagster.study import Study


def selection_of(stage: StageInputs, study: Study, cell: Cell) -> pl.DataFrame:
    """``schemas.SELECTION``: the latents of a cell that are to be explained.

    They are chosen, and ranked, over the whole layer.

    Args:
        stage: One that is made from ``activation_cache``.
        study: Says which.
        cell: Whose rows are wanted.
    """
    counts = stage.table("activation_cache", cell, FIRING_COUNTS.name)
    chosen = select_latents(cell.layer, counts, study.latents)
    firing = counts.filter(pl.col("n_tokens") >= study.sampling.min_tokens)["latent"]
    likely = chosen[np.isin(chosen, firing.to_numpy())]  # the others are dead or rare
    order = floor_order(cell.layer, likely, study.floors)
    ranks = pl.DataFrame(
        {"latent": order, "rank": np.arange(len(order))},
        schema={"latent": pl.Int64, "rank": pl.UInt32},
    )
    mine = chosen[(chosen >= cell.range.start) & (chosen < cell.range.stop)]
    frame = pl.DataFrame({"latent": mine}, schema={"latent": pl.Int64})
    frame = frame.join(ranks, on="latent", how="left")
    is_floor = (pl.col("rank") < study.floors.sample).fill_null(value=False)
    return SELECTION.conform(frame.with_columns(is_floor=is_floor), cell.layer)
