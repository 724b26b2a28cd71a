"""What the explainer and the judge may see of each latent: windows with their split, statistics."""

from collections.abc import Iterator

import dagster as dg

from autointerp_dagster.partitions import stage_asset
from autointerp_dagster.resources.plots import preview
from autointerp_dagster.resources.progress import ProgressDisplay
from autointerp_dagster.resources.recording import stored_records
from autointerp_dagster.resources.store import Commit, StoreResource
from autointerp_dagster.study import Study


def build_latent_records(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""

    @stage_asset(study, "latent_records")
    def latent_records(
        context: dg.AssetExecutionContext, store: StoreResource, progress: ProgressDisplay
    ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        with store.stage(context, study, "latent_records") as stage:
            pending = stage.pending_cells()
            made = stored_records(stage, study, pending)
            bar = progress.on(context)
            for cell, stored in bar(made, total=len(pending), description="records", unit="cells"):
                seen = stored.latents.filter(stored.latents["n_test"] > 0)
                shown = {"preview": preview(seen)}
                stage.commit(cell, Commit(stored.blobs, stored.counts._asdict(), shown=shown))
            yield from stage.report()

    return latent_records
