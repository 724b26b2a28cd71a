"""Medians, floors, intervals and counts over the latents of each layer."""

from collections.abc import Iterator

import dagster as dg

from autointerp_dagster.core.metrics import layer_metrics_of
from autointerp_dagster.core.schemas import LATENT_METRICS, LATENTS, LAYER_METRICS
from autointerp_dagster.partitions import stage_asset
from autointerp_dagster.resources.plots import preview
from autointerp_dagster.resources.store import Commit, StoreResource
from autointerp_dagster.study import Study


def build_layer_metrics(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""

    @stage_asset(study, "layer_metrics")
    def layer_metrics(
        context: dg.AssetExecutionContext, store: StoreResource
    ) -> Iterator[dg.MaterializeResult]:
        with store.stage(context, study, "layer_metrics") as stage:
            for layer in stage.pending_layers():
                metrics = layer_metrics_of(
                    layer,
                    stage.table("latent_records", layer, LATENTS.name),
                    stage.table("latent_metrics", layer, LATENT_METRICS.name),
                    study.metrics,
                    study.adaptive_scorers,
                )
                blob = stage.store.put_table(LAYER_METRICS, metrics)
                shown = {"preview": preview(metrics.filter(metrics["variant"] == "all"))}
                summary = {"n_metrics": metrics.height}
                stage.commit(layer, Commit([blob], summary, stage.all_complete(layer), shown=shown))
            yield from stage.report()

    return layer_metrics
