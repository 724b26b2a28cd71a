"""Comparisons across a whole study: own against other, explainers, scorers, layers.

Every comparison is of the scorers' headline metrics. Latents are the units: they are paired where
both sides scored the same latent, and resampled for the intervals.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Float64
from scipy import stats

from autointerp_dagster.core.config import MetricsConfig
from autointerp_dagster.core.metrics.families import FAMILIES, HEADLINE
from autointerp_dagster.core.metrics.layer import check_finite, paired_subjects
from autointerp_dagster.core.metrics.paired import mean_difference, p_value
from autointerp_dagster.core.metrics.resampling import (
    bootstrap_correlations,
    bootstrap_medians,
    correlation_interval,
    expansion,
    pearson,
    percentile_interval,
)
from autointerp_dagster.core.rng import latent_rng
from autointerp_dagster.core.schemas import MAIN_VARIANT, STUDY_METRICS

_LATENT = ["coder", "hookpoint", "latent"]

LEAST_FLOORS = 5
"""Pairs of own and floor below which nothing is said about a judge."""


def study_metrics_of(latent_metrics: pl.DataFrame, config: MetricsConfig) -> pl.DataFrame:
    """What the study says about its subjects, explainers, scorers and layers.

    - ``subject``, a ``own``, b ``other``, per explainer and scorer: ``mean_difference`` over the
      floor latents of all layers, and of each coder alone (a ``<coder>/own``, b ``<coder>/other``);
      b ``random`` where there is such a subject. Not of scorers without explanations.
    - ``explainer``, per scorer: ``mean_difference`` over latents that both explained.
    - ``scorer``, per explainer: ``spearman`` and ``pearson`` over latents that both scored
      (scorer null; the two are a and b). A scorer without explanations is paired with the scorers
      of every explainer; two such ones with each other, explainer null.
    - ``layer``, per explainer and scorer: ``median_difference``, unpaired, between layers
      (``<coder>@<hookpoint>``) that share the coder or the hookpoint.
    - ``coder``, per explainer and scorer: ``median_difference``, unpaired, between coders (SAE,
      neurons, random): within each hookpoint where both have scores, then the mean over these.

    A difference is a minus b. Intervals are by bootstrap over latents, widened where these are few
    (:func:`.resampling.small_sample_interval`, :func:`.resampling.correlation_interval`: of a
    correlation null below five). p-values: of
    ``mean_difference`` Wilcoxon's signed-rank test (zeros split), of the correlations the test of
    none, of ``median_difference`` the Mann-Whitney test (of coders: one test a hookpoint, combined
    by Stouffer's method, weights the square roots of the latents); they are not adjusted. ``n``
    counts pairs, or the latents of both sides; with fewer than two, interval and p are null, with
    none the value is.

    Args:
        latent_metrics: ``LATENT_METRICS`` rows of all layers, any order.
        config: Confidence, resamples, seed.

    Returns:
        ``STUDY_METRICS``.

    Raises:
        ValueError: If a value is not finite.
    """
    check_finite(latent_metrics)
    main = headline_rows(latent_metrics).sort(_LATENT)
    own = main.filter(pl.col("subject") == "own")
    comparisons = [
        *_subjects(main, config),
        *_explainers(own, config),
        *_scorers(own, config),
        *_places(own, config),
    ]
    rows = pl.DataFrame(comparisons, schema=dict(STUDY_METRICS.columns), orient="row")
    return STUDY_METRICS.conform(rows.with_columns(pl.col("value", "lo", "hi", "p").fill_nan(None)))


def headline_rows(latent_metrics: pl.DataFrame) -> pl.DataFrame:
    """The few ``LATENT_METRICS`` rows that studies are compared by: headline metrics, all windows.

    :func:`study_metrics_of` takes them from any table; a caller with many tables need not keep the
    others in memory.
    """
    headline = pl.DataFrame(
        {"scorer": list(HEADLINE), "metric": list(HEADLINE.values())},
        schema={"scorer": pl.String, "metric": pl.String},
    )
    main = latent_metrics.filter(pl.col("variant") == MAIN_VARIANT)
    return main.join(headline, on=["scorer", "metric"], how="semi")


def judge_is_too_weak(study_metrics: pl.DataFrame, scorer: str, explainer: str) -> bool | None:
    """Whether a judge cannot tell a latent's own explanation from another's.

    Args:
        study_metrics: ``STUDY_METRICS``.
        scorer: Whose judge.
        explainer: Whose explanations.

    Returns:
        True unless the interval of own minus other, over all layers, lies above 0; None where
        nobody can tell: there are fewer than :data:`LEAST_FLOORS` pairs.
    """
    row = study_metrics.filter(
        (pl.col("comparison") == "subject")
        & (pl.col("a") == "own")
        & (pl.col("b") == "other")
        & (pl.col("scorer") == scorer)
        & (pl.col("explainer") == explainer)
        & (pl.col("statistic") == "mean_difference")
    )
    if not row.height or row["n"][0] < LEAST_FLOORS or row["lo"][0] is None:
        return None
    return bool(row["lo"][0] <= 0)


class _Row(NamedTuple):
    """In the order of ``STUDY_METRICS``."""

    comparison: str
    a: str
    b: str
    explainer: str | None
    scorer: str | None
    statistic: str
    value: float
    lo: float
    hi: float
    p: float
    n: int


def _names(frame: pl.DataFrame, column: str) -> list[str]:
    return frame[column].drop_nulls().unique().sort().to_list()


def _generator(config: MetricsConfig, *address: str | None) -> np.random.Generator:
    purpose = "study\0" + "\0".join(map(str, address))
    return latent_rng(config.seed, None, None, purpose)


def _mean_difference(
    difference: Float64[np.ndarray, " pair"],
    comparison: tuple[str, str, str, str | None, str | None],
    config: MetricsConfig,
) -> _Row:
    found = mean_difference(difference, config, _generator(config, *comparison))
    return _Row(*comparison, "mean_difference", *found)


def _subjects(main: pl.DataFrame, config: MetricsConfig) -> Iterator[_Row]:
    free = [name for name, family in FAMILIES.items() if not family.needs_explanation]
    main = main.filter(~pl.col("scorer").is_in(free))
    for floor in ("other", "random"):
        if floor == "other" or (main["subject"] == floor).any():
            yield from _against_floor(main, floor, config)


def _against_floor(main: pl.DataFrame, floor: str, config: MetricsConfig) -> Iterator[_Row]:
    on = [*_LATENT, "explainer", "scorer"]
    pairs = paired_subjects(main, on, floor).sort(on, nulls_last=True)
    asked = main.select("explainer", "scorer").unique().sort("explainer", "scorer", nulls_last=True)
    for explainer, scorer in asked.iter_rows():
        is_asked = pl.col("explainer").eq_missing(explainer) & (pl.col("scorer") == scorer)
        here = pairs.filter(is_asked)
        names = ("subject", "own", floor, explainer, scorer)
        yield _mean_difference(here["difference"].to_numpy(), names, config)
        for coder in _names(main, "coder"):
            names = ("subject", f"{coder}/own", f"{coder}/{floor}", explainer, scorer)
            difference = here.filter(pl.col("coder") == coder)["difference"]
            yield _mean_difference(difference.to_numpy(), names, config)


def _paired(first: pl.DataFrame, second: pl.DataFrame) -> pl.DataFrame:
    """``first`` and ``second``: values of the latents that have both, by latent."""
    return (
        first.select(*_LATENT, first="value")
        .join(second.select(*_LATENT, second="value"), on=_LATENT)
        .drop_nulls()
        .sort(_LATENT)
    )


def _explainers(own: pl.DataFrame, config: MetricsConfig) -> Iterator[_Row]:
    for scorer in _names(own, "scorer"):
        here = own.filter(pl.col("scorer") == scorer)
        for a, b in combinations(_names(here, "explainer"), 2):
            pairs = _paired(*(here.filter(pl.col("explainer") == name) for name in (a, b)))
            difference = (pairs["first"] - pairs["second"]).to_numpy()
            yield _mean_difference(difference, ("explainer", a, b, None, scorer), config)


def _scorers(own: pl.DataFrame, config: MetricsConfig) -> Iterator[_Row]:
    free = own.filter(pl.col("explainer").is_null())
    free_names = _names(free, "scorer")
    for explainer in [*_names(own, "explainer"), None]:
        here = free
        if explainer is not None:
            here = pl.concat([own.filter(pl.col("explainer") == explainer), free])
        for a, b in combinations(_names(here, "scorer"), 2):
            if explainer is not None and a in free_names and b in free_names:
                continue
            pairs = _paired(*(here.filter(pl.col("scorer") == name) for name in (a, b)))
            names = ("scorer", a, b, explainer, None)
            yield from _correlations(
                pairs["first"].to_numpy(), pairs["second"].to_numpy(), names, config
            )


def _correlations(
    first: Float64[np.ndarray, " latent"],
    second: Float64[np.ndarray, " latent"],
    comparison: tuple[str, str, str, str | None, str | None],
    config: MetricsConfig,
) -> Iterator[_Row]:
    n, unknown = len(first), float("nan")
    is_constant = n < 3 or not np.ptp(first) or not np.ptp(second)
    if is_constant:
        for statistic in ("spearman", "pearson"):
            yield _Row(*comparison, statistic, unknown, unknown, unknown, unknown, n)
        return
    rng = _generator(config, *comparison)
    replicates = bootstrap_correlations(first, second, config.n_bootstrap, rng)
    found = {
        "spearman": p_value(stats.spearmanr(first, second)),
        "pearson": p_value(stats.pearsonr(first, second)),
    }
    ranks = (stats.rankdata(first), stats.rankdata(second))
    for index, (statistic, p) in enumerate(found.items()):
        a, b = ranks if statistic == "spearman" else (first, second)
        value = float(pearson(a[None], b[None])[0])
        is_of_ranks = statistic == "spearman"
        lo, hi = correlation_interval(
            replicates[:, index], value, n, config.confidence, is_of_ranks=is_of_ranks
        )
        yield _Row(*comparison, statistic, value, lo, hi, p, n)


def _places(own: pl.DataFrame, config: MetricsConfig) -> Iterator[_Row]:
    """Layers, then coders, against each other."""
    groups = own.select("explainer", "scorer").unique().sort("explainer", "scorer", nulls_last=True)
    for explainer, scorer in groups.iter_rows():
        is_asked = pl.col("explainer").eq_missing(explainer) & (pl.col("scorer") == scorer)
        here = own.filter(is_asked)
        keys = here.select("coder", "hookpoint").unique().sort("coder", "hookpoint").rows()
        samples = {key: _layer_sample(here, key, explainer, scorer, config) for key in keys}
        for a, b in combinations(keys, 2):
            if a[0] == b[0] or a[1] == b[1]:
                names = ("layer", "@".join(a), "@".join(b), explainer, scorer)
                yield _median_difference([(samples[a], samples[b])], names, config)
        for a, b in combinations(_names(here, "coder"), 2):
            shared = [hookpoint for coder, hookpoint in keys if coder == a]
            pairs = [(samples[a, h], samples[b, h]) for h in shared if (b, h) in samples]
            if pairs:
                names = ("coder", a, b, explainer, scorer)
                yield _median_difference(pairs, names, config)


class _Sample(NamedTuple):
    values: Float64[np.ndarray, " latent"]
    medians: Float64[np.ndarray, " replicate"]


def _layer_sample(
    here: pl.DataFrame,
    key: tuple[str, str],
    explainer: str | None,
    scorer: str,
    config: MetricsConfig,
) -> _Sample:
    is_here = (pl.col("coder") == key[0]) & (pl.col("hookpoint") == key[1])
    values = here.filter(is_here)["value"].drop_nulls().to_numpy()
    rng = _generator(config, "layer", *key, explainer, scorer)
    return _Sample(values, bootstrap_medians(values, config.n_bootstrap, rng))


def _widened(sample: _Sample, confidence: float) -> Float64[np.ndarray, " replicate"]:
    median = np.median(sample.values)
    return median + expansion(len(sample.values), confidence) * (sample.medians - median)


def _median_difference(
    pairs: Sequence[tuple[_Sample, _Sample]],
    comparison: tuple[str, str, str, str | None, str | None],
    config: MetricsConfig,
) -> _Row:
    """Mean over the pairs of samples of the difference of their medians, where both have values."""
    unknown, statistic = float("nan"), "median_difference"
    known = [(a, b) for a, b in pairs if len(a.values) and len(b.values)]
    n = sum(len(a.values) + len(b.values) for a, b in known or pairs)
    if not known:
        return _Row(*comparison, statistic, unknown, unknown, unknown, unknown, n)
    value = float(np.mean([np.median(a.values) - np.median(b.values) for a, b in known]))
    if min(len(sample.values) for pair in known for sample in pair) < 2:
        return _Row(*comparison, statistic, value, unknown, unknown, unknown, n)
    # Each side's resamples as much wider as its own number of latents needs.
    apart = np.mean(
        [_widened(a, config.confidence) - _widened(b, config.confidence) for a, b in known], axis=0
    )
    lo, hi = percentile_interval(apart, config.confidence)
    return _Row(*comparison, statistic, value, lo, hi, _rank_test(known), n)


def _rank_test(pairs: Sequence[tuple[_Sample, _Sample]]) -> float:
    """The p-value of no difference in any pair; several Mann-Whitney tests are combined."""
    varied = [(a, b) for a, b in pairs if np.ptp(np.concatenate([a.values, b.values]))]
    if not varied:
        return 1.0
    if len(varied) == 1:
        a, b = varied[0]
        return p_value(stats.mannwhitneyu(a.values, b.values, method="asymptotic"))
    above = [
        p_value(
            stats.mannwhitneyu(
                a.values, b.values, alternative="greater", method="asymptotic", use_continuity=False
            )
        )
        for a, b in varied
    ]
    inside = np.clip(above, 1e-15, 1 - 1e-15)  # 0 and 1 together would have no sum
    weights = [np.sqrt(len(a.values) + len(b.values)) for a, b in varied]
    one_sided = p_value(stats.combine_pvalues(inside, method="stouffer", weights=weights))
    return min(1.0, 2 * min(one_sided, 1 - one_sided))
