"""One study against others, paired over latents.

1. The headline metric of each scorer over all windows, subject ``own``: the score of a latent.
2. Where floors were measured: that minus the score with another latent's explanation, the lift.
3. A latent that both studies scored is a pair; differences of pairs are averaged and resampled.

The first study is the baseline. Coders are never pooled: a random coder is no more latents.
"""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Float64

from autointerp_dagster.core.config import MetricsConfig
from autointerp_dagster.core.metrics.families import FAMILIES, HEADLINE
from autointerp_dagster.core.metrics.layer import check_finite, paired_subjects
from autointerp_dagster.core.metrics.paired import mean_difference
from autointerp_dagster.core.rng import latent_rng
from autointerp_dagster.core.schemas import MAIN_VARIANT

Measure = Literal["score", "lift"]
"""``lift``: the score minus that with another latent's explanation, of the same latent."""

_LATENT = ["hookpoint", "latent"]
_GROUP = ["coder", "explainer", "scorer"]


class StudyDifference(NamedTuple):
    """A study against the baseline, for one coder, explainer and scorer."""

    study: str
    coder: str
    explainer: str | None
    """Null for a scorer that needs no explanation."""
    scorer: str
    metric: str
    """The scorer's headline metric."""
    measure: Measure
    difference: float | None
    """Mean over the pairs of this study minus the baseline; null without a pair."""
    lo: float | None
    """Of an interval by bootstrap over pairs (:func:`.paired.mean_difference`); null below two."""
    hi: float | None
    p: float | None
    """Of Wilcoxon's signed-rank test, two-sided."""
    p_holm: float | None
    """Adjusted by Holm among all rows of the same measure."""
    n_pairs: int
    n_baseline: int
    """Latents with a value in the baseline, paired or not."""
    n_study: int
    paired_median_baseline: float | None
    """Over the pairs alone."""
    paired_median_study: float | None
    median_baseline: float | None
    """Over all of the study's own latents."""
    median_study: float | None


def headline_values(latent_metrics: pl.DataFrame, measure: Measure) -> pl.DataFrame:
    """The score, or the lift, of each latent by each explainer and scorer.

    Args:
        latent_metrics: ``LATENT_METRICS`` rows, any order.
        measure: Which of the two. Scorers without explanations have no lift.

    Returns:
        ``coder``, ``explainer``, ``scorer``, ``hookpoint``, ``latent``, ``value``, sorted; latents
        without a value are absent.

    Raises:
        ValueError: If a value is not finite.
    """
    check_finite(latent_metrics)
    headline = pl.DataFrame(
        {"scorer": list(HEADLINE), "metric": list(HEADLINE.values())},
        schema={"scorer": pl.String, "metric": pl.String},
    )
    main = latent_metrics.filter(pl.col("variant") == MAIN_VARIANT)
    main = main.join(headline, on=["scorer", "metric"], how="semi")
    on = [*_GROUP, *_LATENT]
    if measure == "lift":
        explained = [name for name, family in FAMILIES.items() if family.needs_explanation]
        pairs = paired_subjects(main.filter(pl.col("scorer").is_in(explained)), on)
        found = pairs.rename({"difference": "value"})
    else:
        found = main.filter(pl.col("subject") == "own").drop_nulls("value").select(*on, "value")
    return found.sort(on, nulls_last=True)


def compared_studies(
    baseline: pl.DataFrame, studies: Mapping[str, pl.DataFrame], config: MetricsConfig
) -> list[StudyDifference]:
    """Each study against the baseline.

    Args:
        baseline: ``LATENT_METRICS`` rows of the first study, any order.
        studies: Those of the others by name. Latents are matched by coder, hookpoint and index:
            that these name the same latents is the caller's to check.
        config: Confidence, resamples, seed.

    Returns:
        By study in the order given; then scores before lifts, by scorer, explainer and coder; one
        row for each that both studies have latents with values of.

    Raises:
        ValueError: If a value is not finite.

    Source:
        Holm 1979 for ``p_holm``.
    """
    rows: list[StudyDifference] = []
    for measure in ("score", "lift"):
        first = headline_values(baseline, measure)
        found = [
            row
            for name, metrics in studies.items()
            for row in _differences(name, first, headline_values(metrics, measure), measure, config)
        ]
        rows += _adjusted(found)
    order = list(studies)
    return sorted(rows, key=lambda row: (order.index(row.study), row.measure != "score"))


def _differences(
    name: str, first: pl.DataFrame, second: pl.DataFrame, measure: Measure, config: MetricsConfig
) -> Iterator[StudyDifference]:
    groups = first.select(_GROUP).unique()
    shared = groups.join(second.select(_GROUP).unique(), on=_GROUP, nulls_equal=True)
    for coder, explainer, scorer in shared.sort(_GROUP[::-1], nulls_last=True).iter_rows():
        is_here = (
            (pl.col("coder") == coder)
            & pl.col("explainer").eq_missing(explainer)
            & (pl.col("scorer") == scorer)
        )
        a, b = (
            frame.filter(is_here).select(*_LATENT, "value").sort(_LATENT)
            for frame in (first, second)
        )
        pairs = a.join(b, on=_LATENT, suffix="_study").sort(_LATENT)
        difference = (pairs["value_study"] - pairs["value"]).to_numpy()
        # The same resamples for every study, so that no name and no order of studies matters.
        purpose = "\0".join(("compare", measure, coder, str(explainer), scorer))
        rng = latent_rng(config.seed, None, None, purpose)
        found = mean_difference(difference, config, rng)
        yield StudyDifference(
            study=name,
            coder=coder,
            explainer=explainer,
            scorer=scorer,
            metric=HEADLINE[scorer],
            measure=measure,
            difference=_known(found.value),
            lo=_known(found.lo),
            hi=_known(found.hi),
            p=_known(found.p),
            p_holm=None,
            n_pairs=found.n,
            n_baseline=a.height,
            n_study=b.height,
            paired_median_baseline=_median(pairs["value"]),
            paired_median_study=_median(pairs["value_study"]),
            median_baseline=_median(a["value"]),
            median_study=_median(b["value"]),
        )


def _median(values: pl.Series) -> float | None:
    return float(np.median(values.to_numpy())) if len(values) else None


def _known(number: float) -> float | None:
    return None if np.isnan(number) else number


def _adjusted(rows: list[StudyDifference]) -> list[StudyDifference]:
    tested = [index for index, row in enumerate(rows) if row.p is not None]
    p = np.array([rows[index].p for index in tested], dtype=np.float64)
    adjusted = dict(zip(tested, holm(p).tolist(), strict=True))
    return [row._replace(p_holm=adjusted.get(index)) for index, row in enumerate(rows)]


def holm(p: Float64[np.ndarray, " test"]) -> Float64[np.ndarray, " test"]:
    """p-values adjusted so that any false rejection has at most the chance of one test.

    Source:
        Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    order = np.argsort(p, kind="stable")
    stepped = p[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return adjusted
