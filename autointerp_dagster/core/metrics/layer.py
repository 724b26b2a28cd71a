"""Latents' metrics of one layer to distributions over its latents, floors and counts.

A layer is described by its latents, each weighing the same; verdicts are never pooled over latents.
"""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Float64

from autointerp_dagster.core.config import MetricsConfig
from autointerp_dagster.core.metrics.families import FAMILIES
from autointerp_dagster.core.metrics.intervals import benjamini_hochberg, p_above, wilson
from autointerp_dagster.core.metrics.latent import P_AGAINST
from autointerp_dagster.core.metrics.resampling import (
    bootstrap_means,
    bootstrap_medians,
    small_sample_interval,
)
from autointerp_dagster.core.rng import latent_rng
from autointerp_dagster.core.schemas import LATENT_STATUSES, LAYER_METRICS, MAIN_VARIANT
from autointerp_dagster.core.types import LayerKey

_GROUP = ["explainer", "scorer", "subject", "variant", "metric"]
_VALUES = ["statistic", "value", "lo", "hi", "n", "n_failed", "status"]

_OF_A_LATENT_ALONE = ["precision_weighted", "f1_weighted", *P_AGAINST.values()]
"""Metrics that no statistic over latents is made of. The weighted ones are ratios that one false
positive halves where a latent fires rarely: their mean over latents stays biased however many."""

_WITHOUT_LIFT = "se_nats"
"""A standard error, which is no score."""


def layer_metrics_of(
    layer: LayerKey,
    latents: pl.DataFrame,
    latent_metrics: pl.DataFrame,
    config: MetricsConfig,
    adaptive: Collection[str] = (),
) -> pl.DataFrame:
    """Statistics over the latents of one layer.

    For every explainer, scorer, subject, variant and metric: ``median`` and ``mean`` (intervals by
    bootstrap over latents, as estimates for the population that the latents were drawn from; null
    with fewer than two), ``q25`` and ``q75`` (no interval). Precision and F1 at the latents' own
    rates (:mod:`.weighting`) have no statistics: they are of one latent alone. ``n`` counts latents
    with a value, ``n_failed`` those with a row and no value; if no latent has a value the row has
    the commonest reason.

    ``lift_over_other`` (subject ``own``): mean over floor latents of own minus other, paired; so
    ``lift_over_random`` where there is such a subject. ``lift_over_chance``: the mean minus the
    value of guessing, for the headline metric of a scorer without explanations, which has no floor.
    ``share_interpretable`` (balanced accuracy or AUROC of an explanation, where it is the headline,
    subject ``own``): share of latents with a value whose true value is above
    ``interpretable_cut``, at ``false_discovery_rate`` among the latents of this layer, explainer
    and scorer (one-sided :func:`.intervals.p_above`, Benjamini-Hochberg); its interval is Wilson's
    over latents. Of a scorer in ``adaptive`` it is null (``undefined``): a latent that stops as
    soon as its interval is narrow enough never has a p-value small enough to be found among many.

    ``count`` (metric ``latents``): latents by variant ``all``, ``alive``, ``ok``, ``dead``,
    ``rare``, ``dense`` (scorer, explainer null), and ``explained`` and ``not_explained`` of those
    that a scorer was asked about, per explainer and with explainer null ("by any" and "by none").
    ``n`` is the number counted among.

    Args:
        layer: Whose tables they are.
        latents: ``LATENTS`` rows of all ranges, any order.
        latent_metrics: ``LATENT_METRICS`` rows of all ranges, any order.
        config: Confidence, cut, resamples, seed.
        adaptive: Scorers whose latents were asked until they were sure.

    Returns:
        ``LAYER_METRICS``.

    Raises:
        ValueError: If a table has rows of another layer or a value that is not finite.
    """
    check_finite(latent_metrics)
    is_here = (pl.col("coder") == layer.coder) & (pl.col("hookpoint") == layer.hookpoint)
    for name, frame in {"latents": latents, "latent_metrics": latent_metrics}.items():
        if not frame.select(is_here.all()).item():
            raise ValueError(f"layer_metrics of {layer}: {name} has rows of another layer.")
    metrics = latent_metrics.filter(~pl.col("metric").is_in(_OF_A_LATENT_ALONE))
    parts = [
        _distributions(layer, metrics, config),
        *(_lifts(layer, metrics, floor, config) for floor in P_AGAINST),
        _lifts_over_chance(layer, metrics, config),
        _interpretable(metrics, config, adaptive),
        _latent_counts(latents),
        _explained_counts(latent_metrics),
    ]
    rows = pl.concat([part.select(_GROUP + _VALUES) for part in parts], how="vertical_relaxed")
    return LAYER_METRICS.conform(rows, layer)


def check_finite(latent_metrics: pl.DataFrame) -> None:
    """Refuse a value that is neither a number nor null.

    Raises:
        ValueError: If ``value``, ``lo`` or ``hi`` is NaN or infinite.
    """
    for column in ("value", "lo", "hi"):
        if not latent_metrics[column].is_finite().all():
            raise ValueError(
                f"latent_metrics: column {column} has NaN or infinity, wanted numbers or null. "
                "A metric without a value is null, with a status that says why."
            )


class _Matrix(NamedTuple):
    names: pl.DataFrame
    """What each column is: one row per column, in order."""
    values: Float64[np.ndarray, "latent column"]
    """NaN where a latent has no value; latents ascending."""


def _matrix(rows: pl.DataFrame, column: str, names: list[str]) -> _Matrix:
    """Values of ``column`` by latent and by combination of ``names``."""
    found = rows.select(names).unique().sort(names, nulls_last=True).with_row_index("column")
    latents = rows.select("latent").unique().sort("latent").with_row_index("row")
    placed = rows.select("latent", *names, column).join(latents, on="latent")
    placed = placed.join(found, on=names, nulls_equal=True).drop_nulls(column)
    values = np.full((latents.height, found.height), np.nan)
    values[placed["row"].to_numpy(), placed["column"].to_numpy()] = placed[column].to_numpy()
    return _Matrix(found.drop("column"), values)


def _distributions(layer: LayerKey, metrics: pl.DataFrame, config: MetricsConfig) -> pl.DataFrame:
    matrix = _matrix(metrics, "value", _GROUP)
    means = bootstrap_means(
        matrix.values, config.n_bootstrap, _generator(config, layer, "layer-means")
    )
    columns = [column[~np.isnan(column)] for column in matrix.values.T]
    rows = []
    for index, (names, values) in enumerate(
        zip(matrix.names.iter_rows(named=True), columns, strict=True)
    ):
        # Groups differ in address, so that adding a scorer changes no other row.
        rng = _generator(config, layer, "layer-median", *names.values())
        medians = bootstrap_medians(values, config.n_bootstrap, rng)
        points = _points(values)
        limits = {
            statistic: small_sample_interval(
                replicates,
                points[statistic],
                len(values),
                config.confidence,
                _range(names["scorer"]),
            )
            for statistic, replicates in (("median", medians), ("mean", means[:, index]))
        }
        for statistic, value in points.items():
            lo, hi = limits.get(statistic, (float("nan"), float("nan")))
            rows.append((*names.values(), statistic, value, lo, hi, len(values)))
    table = _table(rows)
    return table.join(_reasons(metrics), on=_GROUP, nulls_equal=True, how="left").with_columns(
        pl.col("n_failed").fill_null(0),
        status=pl.when(pl.col("n") > 0).then(pl.lit("ok")).otherwise("status"),
    )


def _range(scorer: str | None) -> tuple[float, float]:
    """Between what a scorer's metrics lie."""
    family = None if scorer is None else FAMILIES.get(scorer)
    if family is None or family.kind == "nats":
        return -np.inf, np.inf
    return (-1.0, 1.0) if family.kind == "correlation" else (0.0, 1.0)


def _points(values: Float64[np.ndarray, " latent"]) -> dict[str, float]:
    if not len(values):
        return dict.fromkeys(("median", "q25", "q75", "mean"), float("nan"))
    q25, median, q75 = np.quantile(values, [0.25, 0.5, 0.75])
    # Summed in ascending order, so that the last bit does not depend on the order of latents.
    mean = np.sort(values).mean()
    return {"median": float(median), "q25": float(q25), "q75": float(q75), "mean": float(mean)}


def _reasons(metrics: pl.DataFrame) -> pl.DataFrame:
    """Latents without a value per group, and the commonest reason (ties: first by name)."""
    absent = metrics.filter(pl.col("value").is_null())
    tally = absent.group_by([*_GROUP, "status"]).agg(n=pl.len())
    ordered = tally.sort(["n", "status"], descending=[True, False])
    return ordered.group_by(_GROUP, maintain_order=True).agg(
        pl.col("status").first(), n_failed=pl.col("n").sum()
    )


def _lifts(
    layer: LayerKey, metrics: pl.DataFrame, floor: str, config: MetricsConfig
) -> pl.DataFrame:
    scores = metrics.filter(pl.col("metric") != _WITHOUT_LIFT)
    pairs = paired_subjects(scores, ["latent", "explainer", "scorer", "variant", "metric"], floor)
    names = ["explainer", "scorer", "variant", "metric"]
    matrix = _matrix(pairs, "difference", names)
    rows = []
    purpose = "layer-lift" if floor == "other" else f"layer-lift-{floor}"
    for key, column in zip(matrix.names.iter_rows(named=True), matrix.values.T, strict=True):
        # Unlike above each group draws for itself: few latents are floors, and which of them have
        # a pair may differ between scorers.
        rng = _generator(config, layer, purpose, *key.values())
        group = (key["explainer"], key["scorer"], "own", key["variant"], key["metric"])
        rows.append((*group, f"lift_over_{floor}", *_mean_of(column, config, rng)))
    return _table(rows).with_columns(status=pl.lit("ok"), n_failed=pl.lit(0))


def _lifts_over_chance(
    layer: LayerKey, metrics: pl.DataFrame, config: MetricsConfig
) -> pl.DataFrame:
    """Of scorers that ask about no explanation; guessing stands in for their floor."""
    rows = []
    for scorer, family in FAMILIES.items():
        if family.needs_explanation or family.chance is None:
            continue
        is_headline = (pl.col("scorer") == scorer) & (pl.col("metric") == family.headline)
        here = metrics.filter(is_headline).sort("latent").drop_nulls("value")
        for variant in here["variant"].unique().sort():
            values = here.filter(pl.col("variant") == variant)["value"].to_numpy()
            rng = _generator(config, layer, "layer-lift-chance", scorer, variant)
            group = (None, scorer, "own", variant, family.headline, "lift_over_chance")
            rows.append((*group, *_mean_of(values - family.chance, config, rng)))
    return _table(rows).with_columns(status=pl.lit("ok"), n_failed=pl.lit(0))


def _mean_of(
    column: Float64[np.ndarray, " latent"], config: MetricsConfig, rng: np.random.Generator
) -> tuple[float, float, float, int]:
    """Mean, limits and count of the latents that have a value."""
    known = column[~np.isnan(column)]
    means = bootstrap_means(known[:, None], config.n_bootstrap, rng)[:, 0]
    mean = float(known.mean())
    return mean, *small_sample_interval(means, mean, len(known), config.confidence), len(known)


def _generator(config: MetricsConfig, layer: LayerKey, *address: str | None) -> np.random.Generator:
    return latent_rng(config.seed, layer, None, "\0".join(map(str, address)))


def paired_subjects(metrics: pl.DataFrame, on: list[str], floor: str = "other") -> pl.DataFrame:
    """Latents with a value of their own and one of a floor, paired.

    Args:
        metrics: ``LATENT_METRICS`` rows.
        on: Columns that a pair shares.
        floor: The other subject: ``other`` or ``random``.

    Returns:
        ``on``, and ``difference``: own minus floor.
    """
    known = metrics.drop_nulls("value")
    own, other = (
        known.filter(pl.col("subject") == subject).select(*on, "value")
        for subject in ("own", floor)
    )
    pairs = own.join(other, on=on, suffix="_other", nulls_equal=True)
    return pairs.select(*on, difference=pl.col("value") - pl.col("value_other"))


def _interpretable(
    metrics: pl.DataFrame, config: MetricsConfig, adaptive: Collection[str]
) -> pl.DataFrame:
    unknown = float("nan")
    rows = []
    for scorer, family in FAMILIES.items():
        if not family.has_cut:
            continue
        metric = family.headline
        main = metrics.filter(
            (pl.col("scorer") == scorer)
            & (pl.col("metric") == metric)
            & (pl.col("variant") == MAIN_VARIANT)
            & (pl.col("subject") == "own")
        ).drop_nulls(["value", "lo"])
        for explainer in main["explainer"].unique().sort(nulls_last=True):
            own = main.filter(pl.col("explainer").eq_missing(explainer))
            group = (explainer, scorer, "own", MAIN_VARIANT, metric, "share_interpretable")
            if scorer in adaptive:
                rows.append((*group, unknown, unknown, unknown, own.height))
                continue
            value, lo = own["value"].to_numpy(), own["lo"].to_numpy()
            p = p_above(value, lo, config.interpretable_cut, config.confidence)
            passed = benjamini_hochberg(p) <= config.false_discovery_rate
            share, n = np.array([passed.mean()]), np.array([float(len(p))])
            interval = wilson(share, n, config.confidence)
            numbers = (float(share[0]), float(interval.lo[0]), float(interval.hi[0]))
            rows.append((*group, *numbers, len(p)))
    status = pl.when(pl.col("value").is_null()).then(pl.lit("undefined")).otherwise(pl.lit("ok"))
    return _table(rows).with_columns(status=status, n_failed=pl.lit(0))


def _latent_counts(latents: pl.DataFrame) -> pl.DataFrame:
    counts = {name: int((latents["status"] == name).sum()) for name in LATENT_STATUSES}
    counts["all"] = latents.height
    counts["alive"] = latents.height - counts["dead"]
    return _counts([(None, name, count, latents.height) for name, count in counts.items()])


def _explained_counts(latent_metrics: pl.DataFrame) -> pl.DataFrame:
    is_explained = (pl.col("status") != "no_explanation").any()
    latent_metrics = latent_metrics.drop_nulls("explainer")
    pairs = latent_metrics.group_by("explainer", "latent").agg(is_explained=is_explained)
    anyone = latent_metrics.group_by("latent").agg(is_explained=is_explained)
    rows = []
    for explainer in [None, *pairs["explainer"].drop_nulls().unique().sort()]:
        chosen = anyone if explainer is None else pairs.filter(pl.col("explainer") == explainer)
        n = int(chosen["is_explained"].sum())
        rows += [
            (explainer, "explained", n, chosen.height),
            (explainer, "not_explained", chosen.height - n, chosen.height),
        ]
    return _counts(rows)


def _counts(rows: list[tuple[str | None, str, int, int]]) -> pl.DataFrame:
    unknown = float("nan")
    return _table(
        [
            (explainer, None, None, variant, "latents", "count", float(count), unknown, unknown, n)
            for explainer, variant, count, n in rows
        ]
    ).with_columns(status=pl.lit("ok"), n_failed=pl.lit(0))


def _table(rows: list[tuple]) -> pl.DataFrame:
    names = [*_GROUP, "statistic", "value", "lo", "hi", "n"]
    numbers = {"value": pl.Float64, "lo": pl.Float64, "hi": pl.Float64, "n": pl.Int64}
    schema = {name: numbers.get(name, pl.String) for name in names}
    table = pl.DataFrame(rows, schema=schema, orient="row")
    return table.with_columns(pl.col("value", "lo", "hi").fill_nan(None))
