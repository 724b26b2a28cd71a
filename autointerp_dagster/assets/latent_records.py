"""What the explainer and the judge may see of each latent: windows with their split, statistics."""

from collections.abc import Iterator

import dagster as dg

from autointerp_dagster.adapters.datasets import read_dataset
from autointerp_dagster.core.latent_records import latent_records_of, record_counts
from autointerp_dagster.core.schemas import ACTIVATIONS, FIRING_COUNTS, LATENTS, WINDOWS
from autointerp_dagster.core.types import WholeStudy
from autointerp_dagster.core.windows import window_grid
from autointerp_dagster.partitions import stage_asset
from autointerp_dagster.resources.plots import preview
from autointerp_dagster.resources.progress import ProgressDisplay
from autointerp_dagster.resources.store import Commit, StoreResource
from autointerp_dagster.study import Study


def build_latent_records(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""

    @stage_asset(study, "latent_records")
    def latent_records(
        context: dg.AssetExecutionContext, store: StoreResource, progress: ProgressDisplay
    ) -> Iterator[dg.MaterializeResult]:
        with store.stage(context, study, "latent_records") as stage:
            pending = stage.pending_cells()
            dataset = read_dataset(stage.store, stage.input("token_dataset", WholeStudy()))
            grid = window_grid(dataset, study.sampling) if pending else None
            bar = progress.on(context)
            for cell in bar(pending, total=len(pending), description="records", unit="cells"):
                counts = stage.table("activation_cache", cell, FIRING_COUNTS.name)
                tables = latent_records_of(
                    stage.table("activation_cache", cell, ACTIVATIONS.name),
                    counts,
                    dataset,
                    cell.layer,
                    range(cell.range.start, min(cell.range.stop, counts.height)),
                    study.sampling,
                    grid,
                )
                blobs = [
                    stage.store.put_table(LATENTS, tables.latents),
                    stage.store.put_table(WINDOWS, tables.windows),
                ]
                shown = {"preview": preview(tables.latents.filter(tables.latents["n_test"] > 0))}
                stage.commit(cell, Commit(blobs, record_counts(tables)._asdict(), shown=shown))
            yield from stage.report()

    return latent_records
