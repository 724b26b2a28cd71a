from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from metric_builders import make_metric, make_metrics
from scipy import stats

from autointerp_dagster.core.config import MetricsConfig
from autointerp_dagster.core.metrics.compare import StudyDifference, compared_studies, holm
from autointerp_dagster.core.metrics.resampling import expansion
from autointerp_dagster.core.schemas import LATENT_METRICS

CONFIG = MetricsConfig(n_bootstrap=1000)


def scores(*values: float | None, **columns: Any) -> list[dict[str, Any]]:
    return [make_metric(latent, value, **columns) for latent, value in enumerate(values)]


def against(
    baseline: list[dict[str, Any]], other: list[dict[str, Any]], config: MetricsConfig = CONFIG
) -> list[StudyDifference]:
    return compared_studies(make_metrics(baseline), {"second": make_metrics(other)}, config)


def random_study(seed: int, n: int = 12) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        make_metric(latent, float(rng.random()), subject=subject, scorer=scorer, explainer=name)
        for latent in range(n)
        for subject in ("own", "other")
        for scorer in ("detection", "fuzzing")
        for name in ("default", "top_tokens")
    ]


def test_a_difference_is_the_other_study_minus_the_baseline_over_the_latents_of_both() -> None:
    # Pairs: .7 - .5, .9 - .6, .7 - .6; latent 3 has a value in the baseline only.
    (row,) = against(scores(0.5, 0.6, 0.6, 0.1), scores(0.7, 0.9, 0.7, None))
    assert row.difference == pytest.approx(0.2)
    assert (row.n_pairs, row.n_baseline, row.n_study) == (3, 4, 3)
    assert row.p == pytest.approx(stats.wilcoxon([0.2, 0.3, 0.1]).pvalue)
    reach = 0.1 * expansion(3, 0.95)
    assert (row.lo, row.hi) == pytest.approx((0.2 - reach, 0.2 + reach))
    assert (row.study, row.scorer, row.metric) == ("second", "detection", "balanced_accuracy")


def test_medians_are_given_over_the_pairs_and_over_each_studys_own_latents() -> None:
    (row,) = against(scores(0.5, 0.6, 0.7, 0.9, 1.0), scores(0.7, 0.8, 0.9))
    assert (row.paired_median_baseline, row.paired_median_study) == (0.6, 0.8)
    assert (row.median_baseline, row.median_study) == (0.7, 0.8)


def test_lifts_over_the_floor_are_compared_latent_by_latent() -> None:
    # Lifts: .2, .3 against .1, .5; latent 2 has no floor in the baseline.
    first = scores(0.7, 0.9, 0.8) + scores(0.5, 0.6, subject="other")
    second = scores(0.7, 0.9, 0.9) + scores(0.6, 0.4, 0.1, subject="other")
    rows = {row.measure: row for row in against(first, second)}
    assert list(rows) == ["score", "lift"]
    assert rows["lift"].difference == pytest.approx(0.05)
    assert (rows["lift"].n_pairs, rows["lift"].n_study) == (2, 3)


def test_latents_are_paired_within_their_hookpoint() -> None:
    first = scores(0.5, 0.6) + scores(0.9, 0.9, hookpoint="layers.2")
    second = scores(0.6, 0.7) + scores(0.9, 0.9, hookpoint="layers.3")
    (row,) = against(first, second)
    assert (row.n_pairs, row.n_baseline) == (2, 4)
    assert row.difference == pytest.approx(0.1)


def test_explainers_scorers_and_coders_are_compared_each_with_its_namesake() -> None:
    first = [
        *scores(0.5, 0.6),
        *scores(0.5, 0.6, explainer="first_only"),
        *scores(0.5, 0.6, coder="random"),
        *scores(0.5, 0.6, scorer="embedding", metric="auroc"),
    ]
    second = [
        *scores(0.6, 0.7),
        *scores(0.5, 0.6, explainer="second_only"),
        *scores(0.3, 0.4, coder="random"),
        *scores(0.5, 0.6, scorer="fuzzing"),
    ]
    rows = against(first, second)
    assert [(row.coder, row.explainer, row.scorer) for row in rows] == [
        ("random", "default", "detection"),
        ("sae", "default", "detection"),
    ]
    assert [row.difference for row in rows] == pytest.approx([-0.2, 0.1])


def test_a_scorer_without_explanations_is_compared_and_has_no_lift() -> None:
    columns = {"scorer": "intruder", "metric": "accuracy", "explainer": None}
    (row,) = against(scores(0.2, 0.4, **columns), scores(0.4, 0.8, **columns))
    assert (row.explainer, row.measure) == (None, "score")
    assert row.difference == pytest.approx(0.3)


def test_slices_and_other_metrics_are_not_compared() -> None:
    rows = scores(0.5, 0.6, variant="quantile=0") + scores(0.5, 0.6, metric="auroc")
    assert against(rows, rows) == []


def test_one_pair_has_a_difference_without_interval_and_none_has_nothing() -> None:
    (one,) = against(scores(0.5, None), scores(0.7, 0.9))
    assert one.difference == pytest.approx(0.2)
    assert (one.lo, one.p, one.p_holm, one.n_pairs) == (None, None, None, 1)
    (none,) = against(scores(0.5, None), scores(None, 0.9))
    assert (none.difference, none.paired_median_study, none.n_pairs) == (None, None, 0)
    assert (none.median_baseline, none.median_study) == (0.5, 0.9)


def test_a_study_against_itself_differs_by_nothing() -> None:
    rows = against(random_study(0), random_study(0))
    assert {(row.difference, row.lo, row.hi, row.p) for row in rows} == {(0.0, 0.0, 0.0, 1.0)}


def test_the_interval_covers_a_known_shift() -> None:
    rng = np.random.default_rng(3)
    base = rng.random(200)
    shifted = base + 0.05 + rng.normal(0, 0.1, 200)
    (row,) = against(scores(*base.tolist()), scores(*shifted.tolist()))
    assert row.lo is not None
    assert row.hi is not None
    assert row.lo < 0.05 < row.hi
    # The pairs' interval: half-width near 1.96 * .1 / sqrt(200).
    assert row.hi - row.lo == pytest.approx(2 * 1.96 * 0.1 / np.sqrt(200), rel=0.15)


def test_exchanging_two_studies_changes_signs_alone() -> None:
    there, back = (
        against(random_study(0), random_study(1)),
        against(random_study(1), random_study(0)),
    )
    assert len(there) == len(back) == 8
    for one, other in zip(there, back, strict=True):
        assert one.difference == pytest.approx(-(other.difference or 0))
        assert (one.lo, one.hi) == pytest.approx((-(other.hi or 0), -(other.lo or 0)))
        assert one.p == pytest.approx(other.p)


def test_neither_order_of_rows_nor_of_the_other_studies_changes_a_result() -> None:
    first, second, third = (make_metrics(random_study(seed)) for seed in range(3))
    rows = compared_studies(first, {"b": second, "c": third}, CONFIG)
    mixed = [frame.sample(fraction=1, shuffle=True, seed=7) for frame in (first, second, third)]
    again = compared_studies(mixed[0], {"c": mixed[2], "b": mixed[1]}, CONFIG)
    assert [row.study for row in rows] == ["b"] * 8 + ["c"] * 8
    assert sorted(rows, key=str) == sorted(again, key=str)


def test_another_study_beside_changes_only_the_adjusted_p() -> None:
    first, second, third = (make_metrics(random_study(seed)) for seed in range(3))
    alone = compared_studies(first, {"b": second}, CONFIG)
    beside = compared_studies(first, {"b": second, "c": third}, CONFIG)[: len(alone)]
    assert [row._replace(p_holm=None) for row in alone] == [
        row._replace(p_holm=None) for row in beside
    ]
    assert all((b.p_holm or 0) >= (a.p_holm or 0) for a, b in zip(alone, beside, strict=True))


def test_a_value_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        against(scores(0.5), scores(float("inf")))


def test_empty_tables_have_no_differences() -> None:
    assert compared_studies(LATENT_METRICS.empty(), {"b": LATENT_METRICS.empty()}, CONFIG) == []


def test_holm_by_hand() -> None:
    # Ascending .01, .02, .04: times 3, 2, 1 = .03, .04, .04.
    assert holm(np.array([0.04, 0.01, 0.02])) == pytest.approx([0.04, 0.03, 0.04])


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_never_lowers_a_p_keeps_their_order_and_stays_below_bonferroni(p: list[float]) -> None:
    given_p = np.array(p, dtype=np.float64)
    adjusted = holm(given_p)
    assert (adjusted >= given_p).all()
    assert (adjusted <= np.minimum(1.0, given_p * max(len(p), 1)) + 1e-12).all()
    frame = pl.DataFrame({"p": given_p, "adjusted": adjusted}).sort("p", "adjusted")
    assert frame["adjusted"].is_sorted()
