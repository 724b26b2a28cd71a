"""Scores of each latent by each explainer and scorer, with intervals and floors."""

from collections.abc import Iterator

import dagster as dg
import polars as pl

from autointerp_dagster.core.metrics import HEADLINE, latent_metrics_of
from autointerp_dagster.core.schemas import (
    EXPLANATIONS,
    LATENT_METRICS,
    SELECTION,
    VERDICTS,
)
from autointerp_dagster.partitions import stage_asset
from autointerp_dagster.resources.plots import histogram, preview
from autointerp_dagster.resources.store import Commit, StoreResource
from autointerp_dagster.study import Study


def build_latent_metrics(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""

    @stage_asset(study, "latent_metrics")
    def latent_metrics(
        context: dg.AssetExecutionContext, store: StoreResource
    ) -> Iterator[dg.MaterializeResult]:
        with store.stage(context, study, "latent_metrics") as stage:
            for cell in stage.pending_cells():
                metrics = latent_metrics_of(
                    cell.layer,
                    stage.table("explanations", cell, SELECTION.name),
                    stage.tables("explanations", cell, EXPLANATIONS),
                    {
                        name: stage.tables(f"score_{name}", cell, VERDICTS)
                        for name in study.scorers.asked
                    },
                    study.scorers.asked,
                    study.metrics,
                )
                blob = stage.store.put_table(LATENT_METRICS, metrics)
                shown = {"preview": preview(metrics.filter(metrics["variant"] == "all"))}
                shown |= _histograms(metrics)
                summary = {"n_metrics": metrics.height}
                stage.commit(cell, Commit([blob], summary, stage.all_complete(cell), shown=shown))
            yield from stage.report()

    return latent_metrics


def _histograms(metrics: pl.DataFrame) -> dict[str, dg.MetadataValue]:
    """The headline metric of each scorer over the latents of the cell."""
    own = metrics.filter(
        (pl.col("variant") == "all") & (pl.col("subject") == "own") & pl.col("value").is_not_null()
    )
    return {
        f"{scorer}_{metric}": histogram(values["value"], f"{scorer}: {metric} of a latent")
        for scorer, metric in HEADLINE.items()
        for values in [own.filter((pl.col("scorer") == scorer) & (pl.col("metric") == metric))]
        if not values.is_empty()
    }
