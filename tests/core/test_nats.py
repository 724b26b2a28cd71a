import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metric_builders import LAYER, make_verdict, make_verdicts
from scipy import stats

from autointerp_dagster.core.metrics.nats import nats_estimates
from autointerp_dagster.core.schemas import LATENT_METRICS

SCORES = st.floats(-50, 50, allow_nan=False)


def rows_of(scores, latent=0, **columns):
    return [
        make_verdict(latent, window, True, score=score, quantile=0, **columns)
        for window, score in enumerate(scores)
    ]


def failed(window, reason, latent=0):
    return make_verdict(latent, window, True, quantile=0, status="failed", reason=reason)


def estimates(rows, confidence=0.95):
    return nats_estimates(make_verdicts(rows), confidence)


def only(rows, metric, confidence=0.95):
    (row,) = estimates(rows, confidence).filter(pl.col("metric") == metric).to_dicts()
    return row


def test_mean_standard_error_and_interval_are_those_worked_out_by_hand():
    # 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7, standard error sqrt(7 / 3); t at .975 with
    # two degrees of freedom is 4.30265.
    mean, error = only(rows_of([1, 2, 6]), "mean_nats"), only(rows_of([1, 2, 6]), "se_nats")
    assert mean["value"] == 3
    assert error["value"] == pytest.approx(math.sqrt(7 / 3))
    assert mean["hi"] - 3 == pytest.approx(4.30265 * math.sqrt(7 / 3), rel=1e-5)
    assert 3 - mean["lo"] == pytest.approx(mean["hi"] - 3)
    assert (error["lo"], error["hi"]) == (None, None)
    assert {mean["status"], error["status"]} == {"ok"}
    assert (mean["n"], mean["n_failed"]) == (3, 0)


def test_of_a_single_score_the_mean_stands_without_an_interval():
    mean, error = only(rows_of([2.5]), "mean_nats"), only(rows_of([2.5]), "se_nats")
    assert (mean["value"], mean["lo"], mean["hi"], mean["status"]) == (2.5, None, None, "ok")
    assert (error["value"], error["status"], error["n"]) == (None, "too_few", 1)


@pytest.mark.parametrize(
    ("rows", "status", "n_failed"),
    [
        ([failed(0, "off_target"), failed(1, "off_target")], "failed", 2),
        ([failed(0, "budget"), failed(1, "deadline")], "unasked", 2),
        ([failed(0, "budget"), failed(1, "no_logprobs")], "failed", 2),
        (rows_of([None, None]), "no_score", 0),
    ],
)
def test_without_scores_there_is_a_reason_and_no_number(rows, status, n_failed):
    for metric in ("mean_nats", "se_nats"):
        row = only(rows, metric)
        assert [row[name] for name in ("value", "lo", "hi")] == [None, None, None]
        assert (row["status"], row["n"], row["n_failed"]) == (status, 0, n_failed)


def test_failed_verdicts_are_counted_and_do_not_count():
    row = only([*rows_of([1, 3]), failed(7, "no_logprobs")], "mean_nats")
    assert (row["value"], row["n"], row["n_failed"]) == (2, 2, 1)


def test_variants_subjects_explainers_and_latents_stay_apart():
    rows = [
        *rows_of([1, 1]),
        *rows_of([2, 2], variant="kl=3"),
        *rows_of([3, 3], subject="other"),
        *rows_of([4, 4], explainer="output"),
        *rows_of([5, 5], latent=1),
    ]
    means = estimates(rows).filter(pl.col("metric") == "mean_nats")
    assert sorted(means["value"]) == [1, 2, 3, 4, 5]
    assert means["n"].to_list() == [2] * 5


def test_no_verdicts_give_no_rows_and_all_rows_fit_the_table():
    assert estimates([]).height == 0
    frame = estimates([*rows_of([1, 3]), failed(0, "off_target", latent=1)])
    table = LATENT_METRICS.conform(frame.with_columns(scorer=pl.lit("intervention")), LAYER)
    assert table.height == 4


@given(st.lists(SCORES, min_size=2, max_size=30), st.floats(0.5, 0.99), st.randoms())
@settings(deadline=None, max_examples=50)
def test_the_interval_is_scipys_and_order_changes_no_bit(scores, confidence, random):
    frame = make_verdicts(rows_of(scores))
    places = list(range(len(scores)))
    random.shuffle(places)
    assert nats_estimates(frame[places], confidence).equals(nats_estimates(frame, confidence))
    row = only(rows_of(scores), "mean_nats", confidence)
    error = stats.sem(scores)
    assert row["value"] == pytest.approx(np.mean(scores), abs=1e-9)
    reach = stats.t.ppf((1 + confidence) / 2, len(scores) - 1) * error
    assert row["hi"] - row["lo"] == pytest.approx(2 * reach, abs=1e-9)
