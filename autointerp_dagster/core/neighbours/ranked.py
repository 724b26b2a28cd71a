"""Neighbours in order, as arrays and as the stored table."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Float64, Int64

from autointerp_dagster.core.grouping import number_in_group
from autointerp_dagster.core.schemas import NEIGHBOURS, NeighbourMeasure
from autointerp_dagster.core.types import LayerKey


class Ranked(NamedTuple):
    """The neighbours of some latents, the nearest of each first."""

    latent: Int64[np.ndarray, " row"]
    """Ascending; a latent without neighbours has no row."""
    rank: Int64[np.ndarray, " row"]
    """From 0 without gaps."""
    neighbour: Int64[np.ndarray, " row"]
    """Never the latent itself."""
    value: Float64[np.ndarray, " row"]
    """In (0, 1], descending within a latent; equal values by ascending neighbour."""

    @classmethod
    def concat(cls, parts: list["Ranked"]) -> "Ranked":
        """Several blocks of latents as one; they must be in order of latents."""
        no_id, no_value = np.zeros(0, np.int64), np.zeros(0)
        columns = zip(Ranked(no_id, no_id, no_id, no_value), *parts, strict=True)
        return cls(*map(np.concatenate, columns))

    @classmethod
    def best(
        cls,
        latent: Int64[np.ndarray, " pair"],
        neighbour: Int64[np.ndarray, " pair"],
        value: Float64[np.ndarray, " pair"],
        n: int,
    ) -> "Ranked":
        """The ``n`` largest values of each latent; pairs in any order, each at most once."""
        order = np.lexsort((neighbour, -value, latent))
        latent, neighbour, value = latent[order], neighbour[order], value[order]
        rank = number_in_group(latent)
        is_kept = rank < n
        return cls(latent[is_kept], rank[is_kept], neighbour[is_kept], value[is_kept])


def neighbours_table(found: Mapping[NeighbourMeasure, Ranked], layer: LayerKey) -> pl.DataFrame:
    """``schemas.NEIGHBOURS`` of the latents of a cell, all measures."""
    frames = [
        pl.DataFrame(ranked._asdict()).with_columns(measure=pl.lit(measure))
        for measure, ranked in found.items()
    ]
    return NEIGHBOURS.conform(pl.concat(frames), layer)
