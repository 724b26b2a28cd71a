import math
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metric_builders import (
    LAYER,
    answers,
    make_explanations,
    make_selection,
    make_verdict,
    make_verdicts,
)
from polars.testing import assert_frame_equal
from scipy import stats
from sklearn import metrics as oracle

from autointerp_dagster.core.config import MetricsConfig
from autointerp_dagster.core.config.scoring import (
    DetectionConfig,
    EmbeddingConfig,
    FuzzingConfig,
    ScorerConfig,
)
from autointerp_dagster.core.metrics import HEADLINE, latent_metrics_of
from autointerp_dagster.core.schemas import METRIC_STATUSES, VERDICTS
from autointerp_dagster.core.types import LayerKey

CONFIG = MetricsConfig()


def measure(
    rows: list[dict[str, Any]], latents: tuple[int, ...] = (0,), floors: tuple[int, ...] = ()
) -> pl.DataFrame:
    return latent_metrics_of(
        LAYER,
        make_selection(latents, floors),
        make_explanations(latents),
        {"detection": make_verdicts(rows)},
        {"detection": DetectionConfig()},
        CONFIG,
    )


def row(frame: pl.DataFrame, metric: str, **columns: Any) -> dict[str, Any]:
    wanted = {"latent": 0, "subject": "own", "variant": "all", "metric": metric} | columns
    return frame.row(by_predicate=pl.all_horizontal(*(pl.col(k) == v for k, v in wanted.items())),
                     named=True)  # fmt: skip


def test_metrics_of_one_latent_are_those_worked_out_by_hand() -> None:
    # 3 of 4 activating and 1 of 4 silent windows called activating: TP 3, FN 1, FP 1, TN 3.
    frame = measure(answers(0, "1110", "1000"))
    assert row(frame, "sensitivity")["value"] == 0.75
    assert row(frame, "specificity")["value"] == 0.75
    assert row(frame, "balanced_accuracy")["value"] == 0.75
    assert row(frame, "precision")["value"] == 0.75
    assert row(frame, "f1")["value"] == pytest.approx(0.75)
    sizes = {m: row(frame, m)["n"] for m in ("sensitivity", "precision", "f1", "balanced_accuracy")}
    assert sizes == {"sensitivity": 4, "precision": 4, "f1": 8, "balanced_accuracy": 8}


def test_equal_classes_have_the_wilson_interval_of_the_share_of_right_answers() -> None:
    found = row(measure(answers(0, "1110", "1000")), "balanced_accuracy")
    wilson = stats.binomtest(6, 8).proportion_ci(0.95, method="wilson")
    assert (found["lo"], found["hi"]) == pytest.approx((wilson.low, wilson.high))


def test_unequal_classes_have_the_mover_interval_of_both_rates() -> None:
    # Sensitivity 3/4 and specificity 1/2, each with its own Wilson interval.
    found = row(measure(answers(0, "1110", "10")), "balanced_accuracy")
    rates = [stats.binomtest(3, 4), stats.binomtest(1, 2)]
    (a, b), (c, d) = (rate.proportion_ci(0.95, method="wilson") for rate in rates)
    assert found["value"] == pytest.approx(0.625)
    assert found["lo"] == pytest.approx(0.625 - math.hypot(0.75 - a, 0.5 - c) / 2)
    assert found["hi"] == pytest.approx(0.625 + math.hypot(b - 0.75, d - 0.5) / 2)


def test_windows_judged_in_one_prompt_widen_the_interval_when_they_err_together() -> None:
    together = "1" * 20 + "0" * 5 + "1" * 5
    narrow = row(measure(answers(0, together, together[::-1])), "sensitivity")
    wide = row(measure(answers(0, together, together[::-1], per_prompt=5)), "sensitivity")
    assert narrow["value"] == wide["value"]
    assert wide["lo"] < narrow["lo"] < narrow["hi"] < wide["hi"]


def test_f1_interval_is_wilsons_of_the_share_of_hits_among_positives() -> None:
    # TP 3, FN 1, FP 1: F* = 3/5, carried over by 2 F* / (1 + F*).
    found = row(measure(answers(0, "1110", "1000")), "f1")
    lo, hi = stats.binomtest(3, 5).proportion_ci(0.95, method="wilson")
    assert (found["lo"], found["hi"]) == pytest.approx((2 * lo / (1 + lo), 2 * hi / (1 + hi)))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 5)), min_size=1))
def test_metrics_equal_scikit_learn(windows: list[tuple[bool, bool, int]]) -> None:
    truth, said, score = (np.array(column) for column in zip(*windows, strict=True))
    frame = measure(
        [
            make_verdict(
                0, i, *truth[[i]].tolist(), prediction=bool(said[i]), score=float(score[i])
            )
            for i in range(len(windows))
        ]
    )
    values = {m: row(frame, m)["value"] for m in ("balanced_accuracy", "f1", "precision", "auroc")}
    if truth.all() or not truth.any():
        assert set(values.values()) == {None}
        return
    assert values["balanced_accuracy"] == pytest.approx(oracle.balanced_accuracy_score(truth, said))
    assert values["f1"] == pytest.approx(oracle.f1_score(truth, said))
    assert values["auroc"] == pytest.approx(oracle.roc_auc_score(truth, score))
    if said.any():
        assert values["precision"] == pytest.approx(oracle.precision_score(truth, said))
    else:
        assert values["precision"] is None


def test_precision_without_anything_called_activating_is_undefined() -> None:
    found = row(measure(answers(0, "00", "00")), "precision")
    assert (found["value"], found["status"], found["n"]) == (None, "undefined", 0)
    assert row(measure(answers(0, "00", "00")), "f1")["value"] == 0


def test_a_missing_class_gives_null_never_zero() -> None:
    frame = measure(answers(0, "110", ""))
    assert row(frame, "sensitivity")["value"] == pytest.approx(2 / 3)
    for metric in ("specificity", "balanced_accuracy", "precision", "f1"):
        found = row(frame, metric)
        assert (found["value"], found["lo"], found["hi"]) == (None, None, None)
        assert found["status"] == "missing_class"


def test_a_class_all_of_which_failed_is_failed_not_missing() -> None:
    frame = measure(answers(0, "xxx", "010"))
    found = dict(frame.filter(pl.col("variant") == "all").select("metric", "status").iter_rows())
    assert (found["sensitivity"], found["specificity"]) == ("failed", "ok")
    assert {found[name] for name in ("balanced_accuracy", "precision", "f1")} == {"failed"}
    frame = measure([*answers(0, "11", ""), *answers(0, "", "xx", reason="budget")])
    assert row(frame, "balanced_accuracy")["status"] == "unasked"
    assert row(frame, "specificity")["status"] == "unasked"


def test_failed_verdicts_are_left_out_and_counted() -> None:
    frame = measure(answers(0, "11x0", "xx00"))
    found = row(frame, "balanced_accuracy")
    # Sensitivity 2/3 (one of four failed), specificity 2/2.
    assert found["value"] == pytest.approx(5 / 6)
    assert (found["n"], found["n_failed"]) == (5, 3)
    assert (row(frame, "sensitivity")["n"], row(frame, "sensitivity")["n_failed"]) == (3, 1)
    assert (row(frame, "specificity")["n"], row(frame, "specificity")["n_failed"]) == (2, 2)


def test_a_latent_whose_verdicts_all_failed_has_rows_that_say_so() -> None:
    frame = measure(answers(0, "xx", "xx"))
    found = row(frame, "balanced_accuracy")
    assert (found["value"], found["n"], found["n_failed"], found["status"]) == (
        None, 0, 4, "failed",
    )  # fmt: skip
    assert set(frame["status"]) == {"failed"}


def test_a_latent_that_the_budget_cut_off_says_budget() -> None:
    frame = measure(answers(0, "xx", "xx", reason="budget"))
    assert set(frame["status"]) == {"unasked"}


def test_a_judge_without_log_probabilities_has_no_auroc_and_says_why() -> None:
    found = row(measure(answers(0, "10", "10")), "auroc")
    assert (found["value"], found["n"], found["n_failed"], found["status"]) == (
        None, 0, 0, "no_score",
    )  # fmt: skip


def test_metrics_are_never_pooled_over_latents() -> None:
    # Latent 0 is all right on 2 + 2 windows, latent 1 all wrong on 4 + 4; each keeps its own value.
    rows = answers(0, "11", "00") + answers(1, "0000", "1111")
    frame = measure(rows, (0, 1))
    assert row(frame, "balanced_accuracy")["value"] == 1
    assert row(frame, "balanced_accuracy", latent=1)["value"] == 0
    alone = measure(answers(1, "0000", "1111"), (1,))
    assert_frame_equal(frame.filter(pl.col("latent") == 1), alone)


def test_slices_take_a_quantile_or_a_kind_against_the_whole_other_class() -> None:
    rows = [
        make_verdict(0, 0, True, quantile=0, prediction=True, score=0.9),
        make_verdict(0, 1, True, quantile=1, prediction=False, score=0.2),
        make_verdict(0, 2, True, quantile=1, prediction=True, score=0.6),
        make_verdict(0, 3, False, negative_kind="random", prediction=False, score=0.1),
        make_verdict(0, 4, False, negative_kind="neighbour", prediction=True, score=0.7),
    ]
    frame = measure(rows)
    weak = {m: row(frame, m, variant="quantile=1")["value"]
            for m in ("sensitivity", "balanced_accuracy", "auroc")}  # fmt: skip
    # Quantile 1: scores .2, .6 against .1, .7: 2 of 4 pairs in order; specificity 1/2.
    assert weak == {"sensitivity": 0.5, "balanced_accuracy": 0.5, "auroc": 0.5}
    easy = {m: row(frame, m, variant="negatives=random")["value"]
            for m in ("specificity", "balanced_accuracy", "auroc")}  # fmt: skip
    assert easy["specificity"] == 1
    assert easy["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert easy["auroc"] == 1
    assert row(frame, "specificity", variant="negatives=neighbour")["value"] == 0
    sliced = frame.filter(pl.col("variant").str.contains("="))
    assert set(sliced["variant"]) == {
        "quantile=0", "quantile=1", "negatives=random", "negatives=neighbour",
    }  # fmt: skip
    assert "f1" not in set(sliced["metric"])


def test_a_further_variant_of_a_scorer_stays_apart() -> None:
    rows = answers(0, "11", "00") + answers(0, "10", "11", variant="active")
    frame = measure(rows)
    assert row(frame, "balanced_accuracy")["value"] == 1
    assert row(frame, "balanced_accuracy", variant="active")["value"] == 0.25


def test_own_and_other_are_measured_apart_and_compared_by_mcnemar() -> None:
    # Own right on all 8; other wrong on 5 of them: p = 2 * .5**5.
    rows = answers(0, "1111", "0000") + answers(0, "0001", "1100", subject="other")
    frame = measure(rows, floors=(0,))
    assert row(frame, "balanced_accuracy")["value"] == 1
    assert row(frame, "balanced_accuracy", subject="other")["value"] == 0.375
    found = row(frame, "p_against_other")
    assert found["value"] == pytest.approx(2 * 0.5**5)
    assert found["n"] == 8


def test_a_scorer_that_only_ranks_has_only_an_auroc() -> None:
    rows = [make_verdict(0, i, i < 2, score=[0.5, 0.1, 0.1, 0.0][i]) for i in range(4)]
    frame = latent_metrics_of(
        LAYER,
        make_selection([0]),
        make_explanations([0]),
        {"embedding": make_verdicts(rows)},
        {"embedding": EmbeddingConfig()},
        CONFIG,
    )
    # Pairs (.5, .1), (.5, 0), (.1, .1) half, (.1, 0): 3.5 of 4.
    assert frame.select("scorer", "metric", "value", "n").rows() == [
        ("embedding", "auroc", 0.875, 4)
    ]


def test_nothing_vanishes_and_every_absence_has_its_reason() -> None:
    verdicts = (
        answers(0, "11", "00") + answers(3, "11", "00") + answers(3, "1", "1", subject="other")
    )
    frame = latent_metrics_of(
        LAYER,
        make_selection([0, 1, 2, 3], floors=[0, 1, 3]),
        make_explanations([0, 1, 2, 3], failed=[1]),
        {"detection": make_verdicts(verdicts), "fuzzing": None},
        {"detection": DetectionConfig(), "fuzzing": FuzzingConfig()},
        CONFIG,
    )
    headline = frame.filter(
        (pl.col("variant") == "all") & (pl.col("metric") == "balanced_accuracy")
    )
    assert headline.select("latent", "scorer", "subject", "status").rows() == [
        (0, "detection", "other", "no_donor"),
        (0, "detection", "own", "ok"),
        (0, "fuzzing", "own", "not_run"),
        (1, "detection", "own", "no_explanation"),
        (1, "fuzzing", "own", "no_explanation"),
        (2, "detection", "own", "too_few"),
        (2, "fuzzing", "own", "not_run"),
        (3, "detection", "other", "ok"),
        (3, "detection", "own", "ok"),
        (3, "fuzzing", "own", "not_run"),
    ]
    assert set(frame["status"]) <= set(METRIC_STATUSES)
    assert frame.filter(pl.col("value").is_null() == (pl.col("status") == "ok")).is_empty()


def random_verdicts(seed: int, latents: int) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    rows = []
    for latent in range(latents):
        for explainer in ("default", "top_tokens"):
            signs = ["".join(rng.choice(list("110x"), 12)) for _ in range(2)]
            rows += answers(latent, *signs, per_prompt=5, explainer=explainer)
    for index, verdict in enumerate(rows):
        verdict["score"] = float(rng.integers(0, 4)) if verdict["status"] == "ok" else None
        verdict["quantile"] = index % 3 if verdict["is_activating"] else None
        verdict["negative_kind"] = None if verdict["is_activating"] else "random"
    return make_verdicts(rows)


def measure_range(verdicts: pl.DataFrame, latents: list[int]) -> pl.DataFrame:
    return latent_metrics_of(
        LAYER,
        make_selection(latents),
        make_explanations(latents, explainers=("default", "top_tokens")),
        {"detection": verdicts.filter(pl.col("latent").is_in(latents))},
        {"detection": DetectionConfig()},
        CONFIG,
    )


def test_metrics_do_not_depend_on_the_order_of_verdicts() -> None:
    verdicts = random_verdicts(0, 6)
    expected = measure_range(verdicts, list(range(6)))
    shuffled = measure_range(verdicts.sample(fraction=1, shuffle=True, seed=1), list(range(6)))
    assert_frame_equal(shuffled, expected, check_exact=True)


def test_metrics_do_not_depend_on_how_latents_are_cut_into_cells() -> None:
    latents = 300  # more than are sliced at a time
    verdicts = random_verdicts(1, latents)
    whole = measure_range(verdicts, list(range(latents)))
    cells = [list(range(0, 7)), list(range(7, 260)), list(range(260, latents))]
    parts = pl.concat([measure_range(verdicts, cell) for cell in cells])
    assert_frame_equal(parts, whole, check_exact=True)


def test_intervals_contain_their_value() -> None:
    frame = measure_range(random_verdicts(2, 20), list(range(20)))
    known = frame.drop_nulls("lo")
    assert known.height
    assert known.filter(~pl.col("value").is_between("lo", "hi")).is_empty()
    assert known.filter((pl.col("lo") < 0) | (pl.col("hi") > 1)).is_empty()


def test_empty_tables_give_an_empty_table() -> None:
    frame = latent_metrics_of(
        LAYER,
        make_selection([]),
        make_explanations([]),
        {"detection": VERDICTS.empty()},
        dict.fromkeys(HEADLINE, ScorerConfig()),
        CONFIG,
    )
    assert frame.is_empty()


def test_verdicts_without_rows_leave_every_latent_with_a_reason() -> None:
    frame = measure([], (0, 1))
    assert frame.select("latent", "status").rows() == [(0, "too_few"), (1, "too_few")]


def test_a_score_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        measure([make_verdict(0, 0, True, prediction=True, score=math.nan)])


def test_an_unknown_scorer_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="fuzing"):
        latent_metrics_of(
            LAYER, make_selection([]), make_explanations([]), {}, {"fuzing": ScorerConfig()}, CONFIG
        )


def test_verdicts_of_another_layer_or_cell_are_refused() -> None:
    verdicts = {"detection": make_verdicts(answers(0, "1", "0"))}
    selection, explanations = make_selection([0]), make_explanations([0])
    with pytest.raises(ValueError, match="another layer"):
        latent_metrics_of(
            LayerKey("sae", "layers.10"),
            selection,
            explanations,
            verdicts,
            {"detection": DetectionConfig()},
            CONFIG,
        )
    with pytest.raises(ValueError, match="not in the selection"):
        latent_metrics_of(
            LAYER,
            make_selection([1]),
            make_explanations([1]),
            verdicts,
            {"detection": DetectionConfig()},
            CONFIG,
        )


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32))
def test_limits_do_not_depend_on_what_calls_are_called(seed: int) -> None:
    draw = np.random.default_rng(seed)
    signs = ["".join(draw.choice(["0", "1", "x"], size=23, p=[0.4, 0.4, 0.2])) for _ in range(6)]
    rows = [
        answer
        for latent, activating, silent in zip(range(3), signs[:3], signs[3:], strict=True)
        for answer in answers(latent, activating, silent, per_prompt=4)
    ]
    for answer in rows:
        answer["score"] = None if answer["status"] == "failed" else draw.random()
    calls = sorted({answer["call_id"] for answer in rows})
    other = dict(zip(calls, (f"{i:05d}" for i in draw.permutation(len(calls))), strict=True))
    again = [answer | {"call_id": other[answer["call_id"]]} for answer in rows]
    assert measure(rows, latents=(0, 1, 2)).equals(measure(again, latents=(0, 1, 2)))
