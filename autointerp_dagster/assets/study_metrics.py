"""Over the whole study: own against floor, explainers, scorers, layers; what it all cost."""

from collections.abc import Iterator

import dagster as dg
import polars as pl

from autointerp_dagster.core.metrics import cost_rows, headline_rows, study_metrics_of
from autointerp_dagster.core.schemas import LATENT_METRICS, STUDY_METRICS
from autointerp_dagster.core.types import Place
from autointerp_dagster.partitions import stage_asset
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.embedders import Embedders
from autointerp_dagster.resources.matching import matched_rows
from autointerp_dagster.resources.metering import costs_behind
from autointerp_dagster.resources.plots import preview
from autointerp_dagster.resources.store import Commit, StageRun, StoreResource
from autointerp_dagster.study import Study


def build_study_metrics(study: Study) -> dg.AssetsDefinition:
    """The asset of one study."""

    @stage_asset(study, "study_metrics")
    def study_metrics(
        context: dg.AssetExecutionContext,
        store: StoreResource,
        coders: Coders,
        embedders: Embedders,
    ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        embedder = embedders.of(study) if study.matches_layers else None
        asked = {} if embedder is None else {"embedder": embedder.identity}
        external = {"sparse_coders": lambda layer: coders.identity(study, layer)}
        with store.stage(context, study, "study_metrics", models=asked, external=external) as stage:
            for place in stage.pending():
                compared = [study_metrics_of(_headlines(stage, place), study.metrics)]
                if embedder is not None:
                    compared.append(matched_rows(stage, study, coders, embedder))
                costs = cost_rows(costs_behind(stage, place))
                metrics = STUDY_METRICS.conform(pl.concat([*compared, costs]))
                blob = stage.store.put_table(STUDY_METRICS, metrics)
                shown = {"comparisons": preview(metrics)}
                summary = {"n_comparisons": metrics.height - costs.height}
                stage.commit(place, Commit([blob], summary, stage.all_complete(place), shown=shown))
            yield from stage.report()

    return study_metrics


def _headlines(stage: StageRun, place: Place) -> pl.DataFrame:
    """Of every cell, the rows that are compared; one cell at a time is in memory whole."""
    parts = [
        headline_rows(stage.store.table(manifest.blob(LATENT_METRICS.name)))
        for manifest in stage.inputs("latent_metrics", place)
        if manifest.status == "ok"
    ]
    return pl.concat([LATENT_METRICS.empty(), *parts])
