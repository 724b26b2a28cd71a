"""What the negatives of a block of latents are drawn from, as the store has it."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow.compute as pc
from jaxtyping import Int32

from autointerp_dagster.adapters.manifests import Part
from autointerp_dagster.adapters.subject_models import choose_device
from autointerp_dagster.adapters.window_vectors import NEAREST, NearestWindows
from autointerp_dagster.core.negatives import NegativeSources, TokenWindows, token_windows
from autointerp_dagster.core.schemas import NEIGHBOUR_WINDOWS, NEIGHBOURS
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import Cell, WholeStudy
from autointerp_dagster.core.windows import WindowGrid, window_grid
from autointerp_dagster.resources.stage_inputs import StageInputs
from autointerp_dagster.study import Study

LATENTS_AT_ONCE = 2048
"""Latents whose neighbours' windows are in memory: with 10 neighbours of 64 windows of 32 tokens
at most 200 MB. The table, which costs a second, is read as often as a range holds so many."""


class _NeighboursOf(NamedTuple):
    """Neighbours of some latents of a cell, and the windows where they fire."""

    cell: Cell
    latents: range
    neighbours: pl.DataFrame
    windows: pl.DataFrame

    def covers(self, cell: Cell, latents: range) -> bool:
        """Whether all is here that a block needs."""
        is_inside = self.latents.start <= latents.start and latents.stop <= self.latents.stop
        return cell == self.cell and is_inside

    def of(self, latents: range) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Both tables of some of the latents."""
        is_mine = pl.col("latent").is_between(latents.start, latents.stop, closed="left")
        mine = self.neighbours.filter(is_mine)
        is_drawn_from = pl.col("latent").is_in(mine["neighbour"].unique().implode())
        return mine, self.windows.filter(is_drawn_from)


class RecordSources:
    """A corpus and what records are made from besides activations: one for all cells of a run.

    Everything is read when it is first needed, and only what a kind of the study needs.
    """

    def __init__(
        self,
        stage: StageInputs,
        study: Study,
        dataset: TokenDataset,
        grid: WindowGrid | None = None,
        latents_at_once: int = LATENTS_AT_ONCE,
    ) -> None:
        """Nothing is read yet.

        Args:
            stage: A run of ``latent_records``.
            study: Says which kinds.
            dataset: The corpus that ``stage`` reads.
            grid: Of ``dataset`` and the study's sampling; made here if null.
            latents_at_once: Of whose neighbours windows are read together, or a block if it is
                larger.
        """
        self.stage, self.study, self.dataset = stage, study, dataset
        self.grid = window_grid(dataset, study.sampling) if grid is None else grid
        self._latents_at_once = latents_at_once
        self._held: _NeighboursOf | None = None

    def of(self, cell: Cell, latents: range) -> NegativeSources:
        """The sources of a block of latents.

        Args:
            cell: Whose latents.
            latents: The block, absolute. Ask in order: neighbours are read for some blocks at once.

        Raises:
            StoreError: If an input was never materialized, or is damaged.
        """
        kinds = self.study.sampling.negative_kinds
        neighbours = windows = None
        if "neighbour" in kinds:
            if self._held is None or not self._held.covers(cell, latents):
                self._held = None  # free it before the next is read
                stop = max(latents.stop, latents.start + self._latents_at_once)
                self._held = self._neighbours(cell, range(latents.start, stop))
            neighbours, windows = self._held.of(latents)
        return NegativeSources(
            neighbours,
            windows,
            self._similar if "similar" in kinds else None,
            self._tokens if "same_token" in kinds else None,
            latents.start,
        )

    def _neighbours(self, cell: Cell, latents: range) -> _NeighboursOf:
        """By the study's first measure."""
        found, manifest = self.study.finds_neighbours, self.stage.input("neighbours", cell)
        assert found is not None, self.study.name  # a kind asks for them
        latent = pc.field("latent")
        is_mine = (latent >= latents.start) & (latent < latents.stop)
        is_mine &= pc.field("measure") == found.measures[0]
        neighbours = self.stage.store.table(manifest.blob(NEIGHBOURS.name), is_mine)
        others = neighbours["neighbour"].unique().to_arrow()
        windows = self.stage.store.table(manifest.blob(NEIGHBOUR_WINDOWS.name), latent.isin(others))
        return _NeighboursOf(cell, latents, neighbours, windows)

    @cached_property
    def _similar(self) -> NearestWindows:
        embedder = self.study.models.embedder
        device = "cpu" if embedder is None else choose_device(embedder.device)
        embedded = self.stage.input("window_embeddings", WholeStudy())

        def remembered(
            parameters: Mapping[str, Any], search: Callable[[], Int32[np.ndarray, "asked found"]]
        ) -> Int32[np.ndarray, "asked found"]:
            # the device decides between near-ties
            decides = {**parameters, "embedded": embedded.content_hash, "device": device}
            return self._remembered(decides, search)

        return NearestWindows.read(self.stage.store, embedded, self.grid, device, remembered)

    def _remembered(
        self, parameters: Mapping[str, Any], search: Callable[[], Int32[np.ndarray, "asked found"]]
    ) -> Int32[np.ndarray, "asked found"]:
        """What a run found before, of whatever cell, layer or study; else it is found and kept."""
        store = self.stage.store

        def made() -> Part:
            blob = store.put_tensors(NEAREST, {NEAREST: search()})
            return Part(name=NEAREST, fingerprint="", blob=blob)

        return store.tensors(self.stage.part(NEAREST, parameters, made).blob)[NEAREST]

    @cached_property
    def _tokens(self) -> TokenWindows:
        return token_windows(self.dataset, self.grid)
