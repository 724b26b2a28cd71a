"""Every activation above zero of every latent, from one forward pass over the token dataset."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import dagster as dg
import polars as pl

from autointerp_dagster.adapters.datasets import read_dataset
from autointerp_dagster.adapters.spool import CachedLayers, cache_layers
from autointerp_dagster.adapters.subject_models import SubjectModel
from autointerp_dagster.core.schemas import ACTIVATIONS, FIRING_COUNTS
from autointerp_dagster.core.sparse_coders import SparseCoder
from autointerp_dagster.core.types import Cell, LayerKey, Progress, WholeStudy
from autointerp_dagster.partitions import stage_asset
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.resources.plots import histogram
from autointerp_dagster.resources.preflight import check_study, stages_of_run
from autointerp_dagster.resources.progress import ProgressDisplay
from autointerp_dagster.resources.store import OUTSIDE_CODER, Commit, StageRun, StoreResource
from autointerp_dagster.study import Study


def build_activation_cache(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""

    @stage_asset(study, "activation_cache")
    def activation_cache(
        context: dg.AssetExecutionContext,
        store: StoreResource,
        models: SubjectModels,
        coders: Coders,
        progress: ProgressDisplay,
    ) -> Iterator[dg.MaterializeResult]:
        model = models.of(study)
        external = {
            "subject_model": lambda _: model.identity(),
            "sparse_coders": lambda layer: coders.identity(study, layer),
        }
        with store.stage(context, study, "activation_cache", external=external) as stage:
            layers = sorted({cell.layer for cell in stage.pending_cells()})
            loaded = {layer: coders.of(study, layer) for layer in layers}
            if layers:  # what comes next is dear: what would fail after it had better fail now
                check_study(study, stages_of_run(context, study))
            # Encoding is paid for whole layers, so every range of them is committed.
            cells = stage.pending_cells([cell for cell in study.cells if cell.layer in loaded])
            if cells:
                sparse = {layer: coder.coder for layer, coder in loaded.items()}
                _run(stage, cells, model, sparse, progress.on(context))
            yield from stage.report()

    return activation_cache


def _run(
    stage: StageRun,
    cells: Sequence[Cell],
    model: SubjectModel,
    coders: Mapping[LayerKey, SparseCoder],
    progress: Progress,
) -> None:
    """One forward pass for all cells."""
    dataset = read_dataset(stage.store, stage.input("token_dataset", WholeStudy()))
    ranges = {layer: [cell.range for cell in cells if cell.layer == layer] for layer in coders}
    with (
        tempfile.TemporaryDirectory(prefix="autointerp-spool-") as folder,
        cache_layers(model, dataset, coders, ranges, Path(folder), progress) as cached,
    ):
        for cell in cells:
            _commit(stage, cell, cached, model.execution)


def _commit(
    stage: StageRun, cell: Cell, cached: CachedLayers, execution: dict[str, object]
) -> None:
    counts = cached.firing_counts(cell.layer)
    if cell.range.start >= counts.height:
        stage.commit(cell, Commit([], {}, status=OUTSIDE_CODER, execution=execution))
        return
    activations = cached.cell(cell.layer, cell.range)
    blobs = [
        stage.store.put_table(ACTIVATIONS, activations),
        stage.store.put_table(FIRING_COUNTS, counts),
    ]
    mine = counts.slice(cell.range.start, cell.range.stop - cell.range.start)
    alive = mine.filter(mine["n_tokens"] > 0)
    summary = {
        "n_nonzeros": activations.height,
        "n_latents": mine.height,
        "n_alive": alive.height,
        "dead_share": 1 - alive.height / mine.height,
        "median_firing_tokens": alive.select(pl.col("n_tokens").cast(float).median()).item(),
    }
    plot = histogram(alive["n_tokens"], "tokens on which a latent fires", log=True)
    stage.commit(cell, Commit(blobs, summary, execution=execution, shown={"firing_tokens": plot}))
