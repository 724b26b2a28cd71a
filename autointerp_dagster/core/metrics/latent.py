"""Verdicts of one cell to metrics of its latents.

1. Each scorer's verdicts are measured as those of its family (:mod:`.families`); those of labels
   and rankings are first copied into the slices they belong to (:mod:`.slices`).
2. Each (latent, explainer, subject, slice) is a group; metrics are taken within groups, never over
   latents (:mod:`.estimates`, :mod:`.weighting`, :mod:`.trials`, :mod:`.correlation` and
   :mod:`.nats`).
3. Every latent that was to be measured and was not gets a row with the reason (:mod:`.asked`).
"""

from collections.abc import Iterator, Mapping

import polars as pl

from autointerp_dagster.core.config import MetricsConfig, SamplingConfig, ScorerConfig
from autointerp_dagster.core.metrics.asked import asked_pairs, missing_rows
from autointerp_dagster.core.metrics.correlation import correlation_estimates
from autointerp_dagster.core.metrics.estimates import auroc_estimate, prediction_estimates
from autointerp_dagster.core.metrics.families import FAMILIES
from autointerp_dagster.core.metrics.groups import groups_of, metric_rows, with_prompts
from autointerp_dagster.core.metrics.intervals import mcnemar_p
from autointerp_dagster.core.metrics.nats import nats_estimates
from autointerp_dagster.core.metrics.sequences import sequence_estimates
from autointerp_dagster.core.metrics.slices import sliced
from autointerp_dagster.core.metrics.trials import trial_estimates
from autointerp_dagster.core.metrics.weighting import weighted_rows
from autointerp_dagster.core.schemas import LATENT_METRICS, MAIN_VARIANT, VERDICTS
from autointerp_dagster.core.types import LayerKey

P_AGAINST: Mapping[str, str] = {"other": "p_against_other", "random": "p_against_random"}
"""By floor, the metric whose value is the exact McNemar p-value of a latent's own explanation
against the floor's, on the same windows."""

_BLOCK = 256
"""Latents whose verdicts are sliced at a time: bounds memory, changes no value."""


def latent_metrics_of(
    layer: LayerKey,
    selection: pl.DataFrame,
    explanations: pl.DataFrame,
    verdicts: Mapping[str, pl.DataFrame | None],
    scorers: Mapping[str, ScorerConfig],
    config: MetricsConfig,
    window_firing_rates: pl.DataFrame | None = None,
    sampling: SamplingConfig | None = None,
    class_sizes: Mapping[str, pl.DataFrame] | None = None,
) -> pl.DataFrame:
    """Metrics of every latent of a cell that a scorer was asked about, or why there is none.

    Args:
        layer: The cell's layer.
        selection: ``SELECTION`` rows of the cell's latents (not of the whole layer).
        explanations: ``EXPLANATIONS`` rows of the cell; its explainers are those asked for.
        verdicts: ``VERDICTS`` rows of the cell by scorer; None or absent: the scorer was not run.
        scorers: Parameters of the scorers that the study asks for, by name, each in
            :data:`.families.FAMILIES`. Their ``latents`` and ``explainers`` say which pairs were
            asked about; others have no row.
        config: How verdicts become numbers.
        window_firing_rates: ``LATENTS`` rows of the cell's latents, or these columns of them:
            ``latent``, ``window_firing_rate``. None: no metric is weighted.
        sampling: How the test windows were drawn (:func:`.weighting.weighted_rows`).
        class_sizes: Of scorers that stopped when sure, by name (:func:`.sequences.class_sizes`):
            their balanced accuracy gets limits that hold at such a stop.

    Returns:
        ``LATENT_METRICS``. ``n`` counts answered verdicts (for precision: those called activating),
        ``n_failed`` failed ones; a verdict without a score is not in ``auroc``'s ``n`` and not
        failed. A latent without verdicts has one row per explainer and scorer, of the headline
        metric: ``no_explanation``, else ``not_run``, else ``too_few``. A floor latent
        with verdicts of its own and none of another's has a row ``no_donor``. A scorer that needs
        no explanation has rows with a null explainer, and no floors.

    Raises:
        ValueError: If a scorer is unknown, a table is of another layer or has latents outside the
            selection, or a score is not finite.
    """
    _check(layer, selection, {"explanations": explanations, **verdicts}, scorers)
    parts = [LATENT_METRICS.empty().drop("coder", "hookpoint")]
    for scorer, asked in scorers.items():
        frame = verdicts.get(scorer)
        for block in () if frame is None else _blocks(frame):
            rows = [*_measured(block, scorer, config)]
            if class_sizes is not None and scorer in class_sizes:
                rows = _stopped(rows, block, class_sizes[scorer], config)
            if FAMILIES[scorer].kind == "labels" and window_firing_rates is not None:
                rows.append(weighted_rows(block, window_firing_rates, sampling, config.confidence))
            parts += [part.with_columns(scorer=pl.lit(scorer)) for part in rows]
        pairs = asked_pairs(selection, explanations, scorer, asked)
        parts.append(missing_rows(pairs, frame, scorer))
    columns = parts[0].columns
    rows = pl.concat([part.select(columns) for part in parts], how="vertical_relaxed")
    return LATENT_METRICS.conform(rows, layer)


def _check(
    layer: LayerKey,
    selection: pl.DataFrame,
    tables: Mapping[str, pl.DataFrame | None],
    scorers: Mapping[str, ScorerConfig],
) -> None:
    unknown = [scorer for scorer in scorers if scorer not in FAMILIES]
    if unknown:
        raise ValueError(f"latent_metrics: scorers {unknown}, wanted some of {sorted(FAMILIES)}.")
    is_here = (pl.col("coder") == layer.coder) & (pl.col("hookpoint") == layer.hookpoint)
    for name, frame in {"selection": selection, **tables}.items():
        if frame is None:
            continue
        if not frame.select(is_here.all()).item():
            raise ValueError(f"latent_metrics of {layer}: {name} has rows of another layer.")
        outside = frame.join(selection, on="latent", how="anti")
        if outside.height:
            raise ValueError(
                f"latent_metrics of {layer}: {name} has latents that are not in the selection, "
                f"e.g. {outside['latent'][0]}. Pass the selection of the same cell."
            )
        if "score" in frame.columns and not frame["score"].is_finite().all():
            raise ValueError(
                f"latent_metrics of {layer}: {name} has a score that is not finite. "
                "A verdict without one has null."
            )


def _blocks(frame: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """The verdicts of a few latents at a time, in their table's order."""
    latents = frame["latent"].unique().sort()
    for start in range(0, len(latents), _BLOCK):
        here = pl.col("latent").is_in(latents[start : start + _BLOCK].implode())
        yield with_prompts(frame.filter(here))


def _measured(block: pl.DataFrame, scorer: str, config: MetricsConfig) -> Iterator[pl.DataFrame]:
    """Metric rows of a block's latents; each part has the columns that it needs, and others."""
    kind, confidence = FAMILIES[scorer].kind, config.confidence
    match kind:
        case "trials":
            yield trial_estimates(block, confidence)
        case "correlation":
            slices = sliced(block).select(*VERDICTS.columns)
            yield correlation_estimates(slices, confidence, config.n_bootstrap, config.seed)
        case "nats":
            yield nats_estimates(block.select(*VERDICTS.columns), confidence)
        case "labels" | "ranking":
            yield from _sliced_rows(block, kind == "labels", confidence)


def _stopped(
    rows: list[pl.DataFrame], block: pl.DataFrame, sizes: pl.DataFrame, config: MetricsConfig
) -> list[pl.DataFrame]:
    """The rows of latents that stopped when sure, with limits that are valid then."""
    found = sequence_estimates(block.select(*VERDICTS.columns), sizes, config.confidence)
    is_replaced = (
        (pl.col("metric") == "balanced_accuracy")
        & (pl.col("variant") == MAIN_VARIANT)
        & pl.col("latent").is_in(found["latent"].unique().implode())
    )
    return [*(part.filter(~is_replaced) for part in rows), found]


def _sliced_rows(
    block: pl.DataFrame, has_labels: bool, confidence: float
) -> Iterator[pl.DataFrame]:
    groups = groups_of(sliced(block))
    estimates = {"auroc": auroc_estimate(groups.verdicts, confidence)}
    if has_labels:
        estimates |= prediction_estimates(groups.verdicts, confidence)
        for subject in P_AGAINST:
            yield _against(block, subject)
    for metric, estimate in estimates.items():
        yield _telling(metric_rows(groups.names, metric, estimate), metric)


def _telling(rows: pl.DataFrame, metric: str) -> pl.DataFrame:
    """Rows of one metric, for the slices that it says something about."""
    of_quantile = pl.col("variant").str.starts_with("quantile=")
    of_kind = pl.col("variant").str.starts_with("negatives=")
    if metric in ("precision", "f1"):
        return rows.filter(~of_quantile & ~of_kind)
    if metric == "sensitivity":
        return rows.filter(~of_kind)
    if metric == "specificity":
        return rows.filter(~of_quantile)
    return rows


def _against(block: pl.DataFrame, floor: str) -> pl.DataFrame:
    """McNemar's p-value per floor latent and explainer, over windows answered both times."""
    window = ["latent", "explainer", "window_id", "is_activating"]
    answered = block.filter(
        (pl.col("variant") == MAIN_VARIANT)
        & (pl.col("status") == "ok")
        & pl.col("prediction").is_not_null()
    ).with_columns(is_right=pl.col("prediction") == pl.col("is_activating"))
    own, other = (
        answered.filter(pl.col("subject") == subject).select(*window, "is_right")
        for subject in ("own", floor)
    )
    pairs = own.join(other, on=window, suffix="_other", nulls_equal=True)
    counts = (
        pairs.group_by("latent", "explainer")
        .agg(
            n=pl.len(),
            only_own=(pl.col("is_right") & ~pl.col("is_right_other")).sum().cast(pl.Int64),
            only_other=(~pl.col("is_right") & pl.col("is_right_other")).sum().cast(pl.Int64),
        )
        .sort("latent", "explainer", nulls_last=True)
    )
    p = mcnemar_p(counts["only_own"].to_numpy(), counts["only_other"].to_numpy())
    return counts.select(
        "latent",
        "explainer",
        "n",
        subject=pl.lit("own"),
        variant=pl.lit(MAIN_VARIANT),
        metric=pl.lit(P_AGAINST[floor]),
        value=pl.Series(p, dtype=pl.Float64),
        lo=pl.lit(None, pl.Float64),
        hi=pl.lit(None, pl.Float64),
        n_failed=pl.lit(0),
        status=pl.lit("ok"),
    )
