"""The activation cache stage: one pass for many layers, then cell by cell into the store."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from autointerp_dagster.adapters.cache import (
    CachedLayers,
    PassIdentity,
    cache_layers,
    default_spool_dir,
)
from autointerp_dagster.adapters.coder_files import LoadedCoder
from autointerp_dagster.adapters.datasets import read_dataset
from autointerp_dagster.adapters.rebuilding import rebuilt_by
from autointerp_dagster.adapters.shards import write_shard
from autointerp_dagster.adapters.subject_models import SubjectModel
from autointerp_dagster.core.activation_statistics import StatisticsBuilder
from autointerp_dagster.core.checks import Rebuilt
from autointerp_dagster.core.config import FileCoderConfig
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.schemas import FIRING_COUNTS, LATENT_STATISTICS
from autointerp_dagster.core.sparse_coders import GroupMax, TopK
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import Cell, LayerKey, Progress, WholeStudy
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.plots import histogram
from autointerp_dagster.resources.promoting import promoted_by_decoder
from autointerp_dagster.resources.store import OUTSIDE_CODER, Commit, StageRun
from autointerp_dagster.study import Study

_DECIDING = ("device", "hardware", "batch_size", "torch", "transformers")
"""Of a model's execution: what may change the last bits, so that a pass is not gone on with."""


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Caching:
    """The cells of one step; encoding is paid for whole layers, so they share one pass."""

    stage: StageRun
    study: Study
    model: SubjectModel
    coders: Coders
    progress: Progress

    def commit_layers(self, layers: Iterable[LayerKey]) -> None:
        """Commits every pending cell of some layers, each as soon as it is sorted.

        A pass that was killed goes on; what another left finished is only sorted and stored.
        """
        loaded = {layer: self.coders.of(self.study, layer) for layer in layers}
        cells = [cell for cell in self.study.cells if cell.layer in loaded]
        pending = self.stage.pending_cells(cells)
        if not pending:
            return
        for layer, found in loaded.items():
            logger.info("%s: %s", layer, found.about)
            for note in found.notes:
                logger.warning("%s: %s", layer, note)
        manifest = self.stage.input("token_dataset", WholeStudy())
        dataset = read_dataset(self.stage.store, manifest)
        rebuilt = self._rebuilt(dataset, loaded)
        with self._cached(pending, dataset, loaded, manifest.content_hash) as cached:
            shown = self.progress(
                pending, total=len(pending), description="storing", unit="range of latents"
            )
            for cell in shown:
                commit = self._commit(cell, cached, dataset, loaded[cell.layer])
                self.stage.commit(cell, _with(commit, rebuilt.get(cell.layer)))
                cached.discard([cell])
            cached.discard(self._stored(cached.cells()))

    def _rebuilt(
        self, dataset: TokenDataset, loaded: Mapping[LayerKey, LoadedCoder]
    ) -> dict[LayerKey, Rebuilt]:
        """Of each coder from files: what it makes of a sample, and what its files say of that."""
        coders = self.study.coders
        mine = {k: f for k, f in loaded.items() if isinstance(coders[k.coder], FileCoderConfig)}
        measured = rebuilt_by(self.model, dataset, {k: found.placed for k, found in mine.items()})
        return {
            layer: one._replace(**{_l0_of(mine[layer]): mine[layer].expected_l0})
            for layer, one in measured.items()
        }

    def _cached(
        self,
        cells: Sequence[Cell],
        dataset: TokenDataset,
        loaded: Mapping[LayerKey, LoadedCoder],
        dataset_hash: str,
    ) -> CachedLayers:
        layers = sorted({cell.layer for cell in cells})
        subject = {
            "stage": [self.stage.stage.name, self.stage.stage.version],
            "subject_model": self.model.identity(),
            "dtype": self.model.config.dtype,
            "dataset": dataset_hash,
            **{name: self.model.execution[name] for name in _DECIDING},
        }
        return cache_layers(
            self.model,
            dataset,
            {layer: loaded[layer].placed for layer in layers},
            {layer: [cell.range for cell in cells if cell.layer == layer] for layer in layers},
            default_spool_dir(),
            self.progress,
            PassIdentity(subject, {layer: self._identity(layer, loaded) for layer in layers}),
        )

    def _identity(self, layer: LayerKey, loaded: Mapping[LayerKey, LoadedCoder]) -> str:
        """Of a coder in a pass: one that is compiled may give other last bits."""
        is_compiled = getattr(self.study.coders[layer.coder], "compiled", False)
        return loaded[layer].identity + (" compiled" if is_compiled else "")

    def _stored(self, cells: Iterable[Cell]) -> list[Cell]:
        """Those that the store has, e.g. of a run that was killed before it was done with them."""
        mine = set(self.study.cells)
        return [cell for cell in cells if cell in mine and self.stage.made(cell) is not None]

    def _commit(
        self,
        cell: Cell,
        cached: CachedLayers,
        dataset: TokenDataset,
        loaded: LoadedCoder,
    ) -> Commit:
        counts = cached.firing_counts(cell.layer)
        execution = {**self.model.execution, **cached.execution(cell.layer)}
        execution["coder_files"] = loaded.record
        mine = counts.slice(cell.range.start, cell.range.stop - cell.range.start)
        if mine.is_empty():
            return Commit([], {}, status=OUTSIDE_CODER, execution=execution)
        latents = range(cell.range.start, cell.range.start + mine.height)
        builder = StatisticsBuilder(dataset, latents)
        frames = _observed(cached.frames(cell.layer, cell.range), builder)
        store = self.stage.store
        blobs = write_shard(store, frames, mine["n_tokens"].to_numpy().astype(np.int64))
        promoted = None
        if self.study.logit_lens:
            promoted = promoted_by_decoder(self.model, loaded.coder, cell.layer, latents)
        statistics = builder.table(cell.layer, *(promoted or (None, None)))
        _refuse_lost(cell, statistics, mine, cached.folder)
        blobs.append(store.put_table(FIRING_COUNTS, counts))
        blobs.append(store.put_table(LATENT_STATISTICS, statistics))
        summary, plots = _shown(mine)
        n_kept = dataset.tokens.size - dataset.first_visible * dataset.contexts.height
        summary["l0"] = int(counts["n_tokens"].sum()) / max(n_kept, 1)
        return Commit(blobs, summary, execution=execution, shown=plots)


def _l0_of(loaded: LoadedCoder) -> str:
    """Whether L0 is what its files say, or what its activation bounds it by."""
    is_bound = isinstance(getattr(loaded.coder, "activation", None), TopK | GroupMax)
    return "most_l0" if is_bound else "expected_l0"


def _with(commit: Commit, rebuilt: Rebuilt | None) -> Commit:
    if rebuilt is None or commit.status == OUTSIDE_CODER:
        return commit
    told = {} if rebuilt.fvu is None else {"fvu": rebuilt.fvu}
    return replace(commit, rebuilt=rebuilt, summary={**commit.summary, **told})


def _observed(frames: Iterable[pl.DataFrame], builder: StatisticsBuilder) -> Iterator[pl.DataFrame]:
    for frame in frames:
        builder.add(frame)
        yield frame


def _refuse_lost(cell: Cell, statistics: pl.DataFrame, counts: pl.DataFrame, folder: Path) -> None:
    """What was spooled must be what was counted while the model ran."""
    for column in ("n_tokens", "n_contexts", "max_activation"):
        found, counted = statistics[column], counts[column]
        differ = found.ne_missing(counted).arg_true()
        if differ.len():
            i = int(differ[0])
            raise StoreError(
                f"{cell}: {column} of latent {cell.range.start + i} is {found[i]} in the spool, "
                f"wanted {counted[i]} as counted. The spool is damaged: remove {folder} and run "
                "again."
            )


def _shown(counts: pl.DataFrame) -> tuple[dict[str, Any], dict[str, Any]]:
    """Counts for people, and a plot."""
    alive = counts.filter(counts["n_tokens"] > 0)
    summary = {
        "n_nonzeros": int(counts["n_tokens"].sum()),
        "n_latents": counts.height,
        "n_alive": alive.height,
        "dead_share": 1 - alive.height / counts.height,
        "median_firing_tokens": alive.select(pl.col("n_tokens").cast(float).median()).item(),
    }
    plot = histogram(alive["n_tokens"], "tokens on which a latent fires", log=True)
    return summary, {"firing_tokens": plot}
