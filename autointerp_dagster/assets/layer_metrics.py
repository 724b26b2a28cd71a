"""Medians, floors, intervals and counts over the latents of each layer."""

from collections.abc import Iterator

import dagster as dg
import polars as pl

from autointerp_dagster.core.metrics import HEADLINE, layer_metrics_of
from autointerp_dagster.core.schemas import LATENT_METRICS, LATENTS, LAYER_METRICS, MAIN_VARIANT
from autointerp_dagster.partitions import stage_asset
from autointerp_dagster.resources.plots import preview
from autointerp_dagster.resources.store import Commit, StoreResource
from autointerp_dagster.study import Study


def build_layer_metrics(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""

    @stage_asset(study, "layer_metrics")
    def layer_metrics(
        context: dg.AssetExecutionContext, store: StoreResource
    ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
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
                medians = _medians(metrics)
                shown = {"medians": preview(medians, medians.height)}
                summary = {"n_metrics": metrics.height, **_named(medians)}
                stage.commit(layer, Commit([blob], summary, stage.all_complete(layer), shown=shown))
            yield from stage.report()

    return layer_metrics


def _medians(metrics: pl.DataFrame) -> pl.DataFrame:
    """Of each scorer's headline metric, over all windows: what the terminal shows too."""
    headline = pl.DataFrame({"scorer": [*HEADLINE], "metric": [*HEADLINE.values()]})
    medians = metrics.filter(variant=MAIN_VARIANT, statistic="median")
    return medians.join(headline, on=["scorer", "metric"], how="semi")


def _named(medians: pl.DataFrame) -> dict[str, float]:
    """Medians of the explanations of the latents themselves; Dagster plots numbers over time."""
    own = medians.filter((pl.col("subject") == "own") & pl.col("value").is_not_null())
    return {
        " ".join(filter(None, ("median", row["scorer"], row["explainer"]))): row["value"]
        for row in own.iter_rows(named=True)
    }
