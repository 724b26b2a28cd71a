"""The neighbours stage: reading a layer's activations, searching, committing what was found."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from typing import Any

import numpy as np
import polars as pl

from autointerp_dagster.adapters.datasets import read_dataset
from autointerp_dagster.adapters.manifests import Manifest, Part
from autointerp_dagster.adapters.shards import ActivationShard
from autointerp_dagster.core.config import NeighboursConfig
from autointerp_dagster.core.neighbours import (
    CountedTokens,
    DrawnWindows,
    Incidence,
    Ranked,
    WindowDraw,
    cofiring_neighbours,
    cosine_neighbours,
    drawn_windows,
    neighbour_windows_table,
    neighbours_table,
)
from autointerp_dagster.core.schemas import (
    NEIGHBOUR_WINDOWS,
    NEIGHBOURS,
    NeighbourMeasure,
)
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import Cell, LayerKey, Progress, WholeStudy
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.plots import histogram, preview
from autointerp_dagster.resources.store import Commit, StageRun
from autointerp_dagster.study import Study

WINDOWS_AT_ONCE = 1 << 21
"""Windows of neighbours in memory: 64 of each of 32,768 latents, about 0.2 GB. So many more make
another pass over the layer."""


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """The activation cache of one layer: some ranges, one after another."""

    stage: StageRun
    manifests: tuple[Manifest, ...]
    """Of the ranges inside of the coder, in order."""
    progress: Progress

    def shards(self) -> Iterator[ActivationShard]:
        """One at a time, so that one is in memory."""
        for manifest in self.manifests:
            yield ActivationShard(self.stage.store, manifest)

    def frames(self, description: str) -> Iterator[pl.DataFrame]:
        """A pass over all latents in order.

        Raises:
            StoreError: If a shard is missing or damaged.
        """
        shards = self.progress(
            self.shards(), total=len(self.manifests), description=description, unit="ranges"
        )
        for shard in shards:
            yield from shard.frames()


@dataclass(frozen=True, slots=True)
class Neighbouring:
    """The cells of one step, layer by layer: what a layer's cells share is made once."""

    stage: StageRun
    study: Study
    config: NeighboursConfig
    coders: Coders
    progress: Progress
    windows_at_once: int = WINDOWS_AT_ONCE
    """At most, unless one cell has more: its neighbours times ``config.n_windows``."""

    def commit_cells(self) -> None:
        """Finds the neighbours of every pending cell and commits them.

        What is found of a cell is kept at once, so a run that was killed does not search for it
        again. Windows are drawn for some cells at a time, which are then committed.
        """
        pending = sorted(self.stage.pending_cells())
        for layer, cells in groupby(pending, key=lambda cell: cell.layer):
            self._commit_layer(layer, list(cells))

    def _commit_layer(self, layer: LayerKey, cells: Sequence[Cell]) -> None:
        dataset = read_dataset(self.stage.store, self.stage.input("token_dataset", WholeStudy()))
        activations = self._activations(cells[0])
        counted = CountedTokens.of(dataset, layer, self.config.max_tokens, self.study.sampling.seed)
        parts = self._searched(layer, cells, activations, counted)
        for group in self._groups(cells, parts):
            windows = self._windows(layer, group, activations, dataset)
            for cell, table in group.items():
                self._commit(cell, table, windows, counted.n_tokens)

    def _activations(self, cell: Cell) -> LayerActivations:
        """Of all ranges of the cell's layer."""
        manifests = self.stage.inputs("activation_cache", cell)
        inside = tuple(manifest for manifest in manifests if manifest.status == "ok")
        return LayerActivations(self.stage, inside, self.progress)

    def _searched(
        self,
        layer: LayerKey,
        cells: Sequence[Cell],
        activations: LayerActivations,
        counted: CountedTokens,
    ) -> dict[Cell, list[Part]]:
        """Of every cell a table for each measure; one that a killed run has found is not sought."""
        parts: dict[Cell, list[Part]] = {cell: [] for cell in cells}
        for measure in self.config.measures:
            search = cache(partial(self._search, layer, measure, activations, counted))
            shown = self.progress(
                cells, total=len(cells), description=f"{layer} {measure}", unit="ranges"
            )
            for cell in shown:
                named = {"cell": self.stage.fingerprint(cell), "measure": measure}
                make = partial(self._found, cell, measure, search)
                parts[cell].append(self.stage.part(NEIGHBOURS.name, named, make))
        return parts

    def _found(
        self, cell: Cell, measure: NeighbourMeasure, search: Callable[[], Callable[[Cell], Ranked]]
    ) -> Part:
        table = neighbours_table({measure: search()(cell)}, cell.layer)
        blob = self.stage.store.put_table(NEIGHBOURS, table)
        return Part(name=NEIGHBOURS.name, fingerprint="", blob=blob)

    def _groups(
        self, cells: Sequence[Cell], parts: Mapping[Cell, Sequence[Part]]
    ) -> Iterator[dict[Cell, pl.DataFrame]]:
        """The tables of so many cells that the windows of all their neighbours fit in memory."""
        group: dict[Cell, pl.DataFrame] = {}
        others = np.zeros(0, dtype=np.int64)
        for cell in cells:
            tables = [self.stage.store.table(part.blob) for part in parts[cell]]
            table = NEIGHBOURS.conform(pl.concat(tables))
            both = np.union1d(others, self._drawn_from(table))
            if group and len(both) * self.config.n_windows > self.windows_at_once:
                yield group
                group, both = {}, self._drawn_from(table)
            group[cell], others = table, both
        yield group

    def _search(
        self,
        layer: LayerKey,
        measure: NeighbourMeasure,
        activations: LayerActivations,
        counted: CountedTokens,
    ) -> Callable[[Cell], Ranked]:
        """Finds the neighbours of a cell of the layer."""
        n = self.config.n_neighbours
        n_latents = next(activations.shards()).firing_counts.height
        if measure == "cofiring":
            incidence = Incidence.of(
                lambda: activations.frames(f"{layer} firings"), n_latents, counted
            )
            return lambda cell: cofiring_neighbours(
                self._shard(cell).frames(), counted, incidence, n
            )
        coder = self.coders.of(self.study, layer).coder
        rows_of = coder.decoder_rows if measure == "decoder" else coder.encoder_rows
        return lambda cell: cosine_neighbours(rows_of, n_latents, self._latents(cell, n_latents), n)

    def _shard(self, cell: Cell) -> ActivationShard:
        return ActivationShard(self.stage.store, self.stage.input("activation_cache", cell))

    def _latents(self, cell: Cell, n_latents: int) -> range:
        return range(cell.range.start, min(cell.range.stop, n_latents))

    def _windows(
        self,
        layer: LayerKey,
        group: Mapping[Cell, pl.DataFrame],
        activations: LayerActivations,
        dataset: TokenDataset,
    ) -> DrawnWindows:
        """Of every latent that is a neighbour, by the measure that negatives are drawn by."""
        draw = WindowDraw(
            dataset,
            layer,
            self.study.sampling.window_len,
            self.config.n_windows,
            self.study.sampling.seed,
            np.unique(np.concatenate([self._drawn_from(table) for table in group.values()])),
        )
        return drawn_windows(activations.frames(f"{layer} windows"), draw)

    def _drawn_from(self, table: pl.DataFrame) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Ascending, each once."""
        first = table.filter(pl.col("measure") == self.config.measures[0])
        return first["neighbour"].unique().sort().to_numpy().astype(np.int64)

    def _commit(
        self, cell: Cell, table: pl.DataFrame, windows: DrawnWindows, n_tokens: int
    ) -> None:
        mine = windows.of(self._drawn_from(table))
        drawn = neighbour_windows_table(mine, self.study.sampling.window_len, cell.layer)
        blobs = [
            self.stage.store.put_table(NEIGHBOURS, table),
            self.stage.store.put_table(NEIGHBOUR_WINDOWS, drawn),
        ]
        nearest = table.filter(pl.col("rank") == 0)
        first = nearest.filter(pl.col("measure") == self.config.measures[0])
        shown = {
            "preview": preview(nearest.drop("coder", "hookpoint", "rank")),
            "nearest": histogram(first["value"], f"{self.config.measures[0]}, nearest neighbour"),
        }
        summary = summary_of(nearest, drawn, self.config.measures) | (
            {"n_tokens_counted": n_tokens} if "cofiring" in self.config.measures else {}
        )
        self.stage.commit(cell, Commit(blobs, summary, shown=shown))


def summary_of(
    nearest: pl.DataFrame, windows: pl.DataFrame, measures: Sequence[NeighbourMeasure]
) -> dict[str, Any]:
    """Counts for people.

    Args:
        nearest: The rows of rank 0 of ``schemas.NEIGHBOURS``.
        windows: ``schemas.NEIGHBOUR_WINDOWS``.
        measures: What was computed.
    """
    values = {m: nearest.filter(pl.col("measure") == m)["value"] for m in measures}
    return {
        "n_latents_with_neighbours": {m: len(found) for m, found in values.items()},
        "median_nearest": {m: found.median() for m, found in values.items()},
        "n_neighbours_drawn_from": windows["latent"].n_unique(),
        "n_windows": windows.height,
    }
