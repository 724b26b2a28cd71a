"""Scores of each latent by each explainer and scorer, with intervals and floors."""

from collections.abc import Iterator, Mapping

import dagster as dg
import polars as pl

from autointerp_dagster.core.config import LabelScorerConfig, ScorerConfig
from autointerp_dagster.core.metrics import HEADLINE, class_sizes, latent_metrics_of
from autointerp_dagster.core.schemas import (
    EXPLANATIONS,
    LATENT_METRICS,
    LATENTS,
    SELECTION,
    VERDICTS,
    WINDOWS,
)
from autointerp_dagster.core.types import Cell
from autointerp_dagster.partitions import stage_asset
from autointerp_dagster.resources.plots import histogram, preview
from autointerp_dagster.resources.store import Commit, StageRun, StoreResource
from autointerp_dagster.study import Study


def build_latent_metrics(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""

    @stage_asset(study, "latent_metrics")
    def latent_metrics(
        context: dg.AssetExecutionContext, store: StoreResource
    ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        with store.stage(context, study, "latent_metrics") as stage:
            for cell in stage.pending_cells():
                metrics = _metrics_of(study, stage, cell)
                blob = stage.store.put_table(LATENT_METRICS, metrics)
                shown = {"preview": preview(metrics.filter(metrics["variant"] == "all"))}
                shown |= _histograms(metrics)
                summary = {"n_metrics": metrics.height}
                stage.commit(cell, Commit([blob], summary, stage.all_complete(cell), shown=shown))
            yield from stage.report()

    return latent_metrics


def _metrics_of(study: Study, stage: StageRun, cell: Cell) -> pl.DataFrame:
    asked = {name: study.scorer_config(name) for name in study.scorers.asked}
    return latent_metrics_of(
        cell.layer,
        stage.table("explanations", cell, SELECTION.name),
        stage.tables("explanations", cell, EXPLANATIONS),
        {name: stage.tables(f"score_{name}", cell, VERDICTS) for name in asked},
        asked,
        study.metrics,
        stage.table("latent_records", cell, LATENTS.name),
        study.sampling,
        _sizes_of(asked, stage, cell) if study.scoring is not None else None,
    )


def _sizes_of(
    asked: Mapping[str, ScorerConfig], stage: StageRun, cell: Cell
) -> dict[str, pl.DataFrame]:
    windows = stage.table("latent_records", cell, WINDOWS.name)
    return {
        name: class_sizes(windows, config.n_examples)
        for name, config in asked.items()
        if isinstance(config, LabelScorerConfig)
    }


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
