import math
from typing import Any

import numpy as np
import polars as pl
import pytest
from metric_builders import LAYER, answers, make_explanations, make_selection, make_verdicts
from scipy import stats

from autointerp_dagster.core.config import MetricsConfig, SamplingConfig
from autointerp_dagster.core.config.scoring import DetectionConfig
from autointerp_dagster.core.metrics import intervals, latent_metrics_of
from autointerp_dagster.core.metrics.estimates import Estimate, Verdicts
from autointerp_dagster.core.metrics.weighting import Judged, weighted_estimates

CONFIG = MetricsConfig()


def measure(
    rows: list[dict[str, Any]], rate: float | None, sampling: SamplingConfig | None = None
) -> pl.DataFrame:
    return latent_metrics_of(
        LAYER,
        make_selection([0]),
        make_explanations([0]),
        {"detection": make_verdicts(rows)},
        {"detection": DetectionConfig()},
        CONFIG,
        pl.DataFrame({"latent": [0], "window_firing_rate": [rate]}, {
            "latent": pl.UInt32, "window_firing_rate": pl.Float64}),
        sampling,
    )  # fmt: skip


def row(frame: pl.DataFrame, metric: str, subject: str = "own") -> dict[str, Any]:
    return frame.row(
        by_predicate=(pl.col("metric") == metric) & (pl.col("subject") == subject)
        & (pl.col("variant") == "all"),
        named=True,
    )  # fmt: skip


def judged(activating: str, silent: str, **columns: Any) -> list[dict[str, Any]]:
    rows = answers(0, activating, silent, **columns)
    for verdict in rows:
        if not verdict["is_activating"]:
            verdict.setdefault("negative_kind", "random")
    return rows


def test_precision_and_f1_at_the_firing_rate_are_those_worked_out_by_hand() -> None:
    # s = 3/4, f = 1/4, r = 1/10: precision .075 / (.075 + .225) = .25; F1 = 2 * .25 * .75 / 1.
    frame = measure(judged("1110", "1000"), 0.1)
    assert row(frame, "precision_weighted")["value"] == pytest.approx(0.25)
    assert row(frame, "f1_weighted")["value"] == pytest.approx(0.375)
    assert row(frame, "precision_weighted")["n"] == 8
    assert "recall_weighted" not in set(frame["metric"])


def test_only_random_negatives_count() -> None:
    hard = judged("", "1111", negative_kind="neighbour")
    for index, verdict in enumerate(hard):
        verdict["window_id"] = 100 + index
    with_hard = measure(judged("1110", "1000") + hard, 0.1)
    assert row(with_hard, "precision_weighted")["value"] == pytest.approx(0.25)
    assert row(with_hard, "specificity")["value"] == pytest.approx(3 / 8)


def test_negatives_of_wholly_silent_contexts_stand_for_no_silent_windows_of_the_corpus() -> None:
    rows = judged("1110", "1000", quantile=0)
    frame = measure(
        rows, 0.1, SamplingConfig(silent_scope="context", strategy="mix", n_quantiles=1)
    )
    for name in ("precision_weighted", "f1_weighted"):
        found = row(frame, name)
        assert (found["value"], found["lo"], found["status"]) == (None, None, "undefined")
    assert row(frame, "recall_weighted")["value"] == 0.75
    assert row(frame, "precision")["status"] == "ok"


def test_where_windows_judged_are_as_rare_as_in_the_corpus_nothing_changes() -> None:
    frame = measure(judged("1110", "1000"), 0.5)
    for weighted, plain in (("precision_weighted", "precision"), ("f1_weighted", "f1")):
        assert row(frame, weighted)["value"] == pytest.approx(row(frame, plain)["value"])


def test_a_hundred_clean_negatives_cannot_resolve_a_false_positive_rate_of_a_thousandth() -> None:
    # Nobody was called activating falsely, yet f may be as large as z^2 / (100 + z^2) = 3.7 %:
    # at a rate of .1 % nearly all that is called activating might be false.
    frame = measure(judged("1" * 80 + "0" * 20, "0" * 100), 0.001)
    found = row(frame, "precision_weighted")
    assert found["value"] == 1
    assert 0.01 < found["lo"] < 0.03
    assert found["hi"] == 1


def test_without_random_negatives_the_weighted_metrics_are_null() -> None:
    frame = measure(judged("1110", "1000", negative_kind="neighbour"), 0.1)
    for metric in ("precision_weighted", "f1_weighted"):
        found = row(frame, metric)
        assert (found["value"], found["lo"], found["status"]) == (None, None, "missing_class")


@pytest.mark.parametrize("rate", [None, 0.0])
def test_a_latent_whose_rate_is_unknown_has_no_weighted_metrics(rate: float | None) -> None:
    found = row(measure(judged("1110", "1000"), rate), "precision_weighted")
    assert (found["value"], found["status"]) == (None, "undefined")


def test_a_latent_that_fires_in_every_window_is_always_called_rightly() -> None:
    assert row(measure(judged("1110", "1000"), 1.0), "precision_weighted")["value"] == 1


def test_nothing_called_activating_has_no_precision_and_no_f1() -> None:
    frame = measure(judged("0000", "0000"), 0.1)
    assert row(frame, "precision_weighted")["status"] == "undefined"
    assert (row(frame, "f1_weighted")["value"], row(frame, "f1_weighted")["lo"]) == (0, 0)


def test_all_failed_and_a_single_window_have_their_rows() -> None:
    assert row(measure(judged("xx", "xx"), 0.1), "f1_weighted")["status"] == "failed"
    single = row(measure(judged("1", "0" * 20), 0.1), "precision_weighted")
    assert single["value"] == 1
    assert 0 <= single["lo"] < 0.4


def test_under_mix_recall_is_the_mean_over_quantiles() -> None:
    # Quantile 0: 4 of 4 right; quantile 1: 1 of 2. Plain 5/6, weighted 3/4.
    rows = judged("111110", "0000")
    for verdict in rows[:6]:
        verdict["quantile"] = int(verdict["window_id"] >= 4)
    frame = measure(rows, 0.5, SamplingConfig(strategy="mix", n_quantiles=2))
    assert row(frame, "sensitivity")["value"] == pytest.approx(5 / 6)
    recall = row(frame, "recall_weighted")
    assert recall["value"] == pytest.approx(0.75)
    assert recall["lo"] < 0.75 < recall["hi"]
    # f = 0: precision 1; F1 = 2 * .75 / 1.75.
    assert row(frame, "f1_weighted")["value"] == pytest.approx(1.5 / 1.75)
    even = measure(rows, 0.5, SamplingConfig(strategy="quantiles", n_quantiles=2))
    assert row(even, "f1_weighted")["value"] == pytest.approx(2 * (5 / 6) / (11 / 6))


def test_under_top_the_recall_of_quantiles_never_judged_is_unknown() -> None:
    rows = judged("1111", "0000")
    for verdict in rows[:4]:
        verdict["quantile"] = 0
    frame = measure(rows, 0.5, SamplingConfig(strategy="top", n_quantiles=2))
    for metric in ("recall_weighted", "precision_weighted", "f1_weighted"):
        assert (row(frame, metric)["value"], row(frame, metric)["status"]) == (None, "undefined")


def test_floors_are_weighted_too() -> None:
    rows = judged("1110", "1000") + judged("0000", "1000", subject="other")
    frame = measure(rows + judged("1110", "1110", subject="random"), 0.1)
    assert row(frame, "precision_weighted", "other")["value"] == 0
    assert row(frame, "precision_weighted", "random")["value"] == pytest.approx(0.1)


def test_ratio_interval_equals_its_formula_by_hand() -> None:
    # .2 [.1, .4] over .8 [.6, .9]: lo = .15 / (.16 + sqrt(.0256 - .03 * .63)) where
    # .1 * (.4 - .1) = .03; hi = (.16 + sqrt(.0256 - 0 * .6)) / .6, as .4 * (.4 - .4) = 0.
    lo, hi = intervals.ratio_interval(
        np.array([0.2]),
        intervals.Interval(np.array([0.1]), np.array([0.4])),
        np.array([0.8]),
        intervals.Interval(np.array([0.6]), np.array([0.9])),
    )
    assert lo[0] == pytest.approx((0.16 - math.sqrt(0.0256 - 0.03 * 0.63)) / 0.63)
    assert hi[0] == pytest.approx(0.32 / 0.6)


def test_ratio_to_nothing_has_no_upper_limit() -> None:
    zero, nothing = np.array([0.0]), intervals.Interval(np.array([0.0]), np.array([0.2]))
    lo, hi = intervals.ratio_interval(np.array([0.5]), nothing, zero, nothing)
    assert lo[0] == 0
    assert hi[0] == np.inf


def covers(estimate: Estimate, truth: float) -> float:
    lo, hi = estimate.interval
    known = ~np.isnan(estimate.value)
    return float(np.mean(((lo <= truth) & (truth <= hi))[known]))


def weighted_coverage(
    rates: tuple[float, float], firing: float, correlation: float, per_prompt: int, n_judges: int
) -> dict[str, float]:
    """Coverage for 100 + 100 windows; a prompt's ease moves both of its rates (Gaussian copula)."""
    rng = np.random.default_rng([int(r * 1000) for r in rates] + [per_prompt])
    n = 200
    truth = rng.permuted(np.tile(np.arange(n) < n // 2, (n_judges, 1)), axis=1).ravel()
    n_prompts = n // per_prompt
    prompt = (np.arange(n) // per_prompt + n_prompts * np.arange(n_judges)[:, None]).ravel()
    ease = rng.normal(size=n_prompts * n_judges)[prompt] * math.sqrt(correlation)
    ease += rng.normal(size=len(prompt)) * math.sqrt(1 - correlation)
    is_right = ease < stats.norm.ppf(np.where(truth, rates[0], 1 - rates[1]))
    verdicts = Verdicts(
        group=np.repeat(np.arange(n_judges), n),
        prompt=prompt,
        is_activating=truth,
        prediction=truth == is_right,
        is_predicted=np.ones(len(truth), bool),
        score=np.full(len(truth), np.nan),
        is_failed=np.zeros(len(truth), bool),
        is_unasked=np.zeros(len(truth), bool),
        n_groups=n_judges,
    )
    band = np.zeros(len(truth), np.int64)
    found = weighted_estimates(Judged(verdicts, band, 1, np.full(n_judges, firing)), 0.95)
    s, f = rates
    called = firing * s / (firing * s + (1 - firing) * f)
    expected = {"precision_weighted": called, "f1_weighted": 2 * called * s / (called + s)}
    return {name: covers(found[name], value) for name, value in expected.items()}


GRID = [((s, f), r) for s in (0.6, 0.8, 0.95) for f in (0.02, 0.1, 0.3) for r in (0.01, 0.1)]


@pytest.mark.slow
@pytest.mark.parametrize("per_prompt", [1, 5, 20])
@pytest.mark.parametrize("correlation", [0.0, 0.1])
@pytest.mark.parametrize("metric", ["precision_weighted", "f1_weighted"])
def test_weighted_intervals_cover_94_to_98_5_percent(
    metric: str, correlation: float, per_prompt: int
) -> None:
    coverages = [
        weighted_coverage(rates, firing, correlation, per_prompt, 2000)[metric]
        for rates, firing in GRID
    ]
    assert 0.94 <= np.mean(coverages) <= 0.985, coverages


@pytest.mark.parametrize("per_prompt", [5, 20])
@pytest.mark.parametrize("correlation", [0.0, 0.1])
def test_weighted_intervals_cover_about_as_often_as_they_say(
    correlation: float, per_prompt: int
) -> None:
    found = [weighted_coverage((0.8, f), 0.05, correlation, per_prompt, 400) for f in (0.05, 0.2)]
    for metric in ("precision_weighted", "f1_weighted"):
        assert 0.92 <= np.mean([each[metric] for each in found]) <= 0.995
