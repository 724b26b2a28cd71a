"""Metrics of the scorers that are not detection or fuzzing, and of what each was asked about."""

import math
from typing import Any

import numpy as np
import polars as pl
import pytest
from metric_builders import (
    LAYER,
    answers,
    make_explanations,
    make_latents,
    make_metric,
    make_metrics,
    make_selection,
    make_verdict,
    make_verdicts,
)
from polars.testing import assert_frame_equal
from record_builders import make_window
from scipy import stats

from autointerp_dagster.core.config import MetricsConfig
from autointerp_dagster.core.config.scoring import (
    DetectionConfig,
    EmbeddingConfig,
    ExampleEmbeddingConfig,
    InterventionConfig,
    IntruderConfig,
    ScoredSample,
    ScorerConfig,
    ScorersConfig,
    SimulationConfig,
    SurprisalConfig,
)
from autointerp_dagster.core.metrics import (
    CHANCE,
    FAMILIES,
    HEADLINE,
    latent_metrics_of,
    layer_metrics_of,
    study_metrics_of,
)
from autointerp_dagster.core.schemas import METRIC_STATUSES
from autointerp_dagster.core.scorers import example_embedding
from autointerp_dagster.core.scorers.tasks import verdicts_frame
from autointerp_dagster.core.types import LatentId

CONFIG = MetricsConfig(n_bootstrap=300)


def measure(
    scorer: str,
    config: ScorerConfig,
    rows: list[dict[str, Any]] | None,
    latents: tuple[int, ...] = (0,),
    explainers: tuple[str, ...] = ("default",),
    floors: tuple[int, ...] = (),
) -> pl.DataFrame:
    return latent_metrics_of(
        LAYER,
        make_selection(latents, floors),
        make_explanations(latents, explainers=explainers),
        {scorer: None if rows is None else make_verdicts(rows)},
        {scorer: config},
        CONFIG,
    )


def values(frame: pl.DataFrame, metric: str) -> dict[str, float | None]:
    here = frame.filter((pl.col("metric") == metric) & (pl.col("subject") == "own"))
    return dict(here.select("variant", "value").iter_rows())


def trial(window: int, sign: str, **columns: Any) -> dict[str, Any]:
    """1: right, 0: wrong, x: failed."""
    answer = {
        "explainer": None,
        "prediction": None if sign == "x" else sign == "1",
        "status": "failed" if sign == "x" else "ok",
        "reason": "unparsable" if sign == "x" else None,
        "call_id": f"call-{window}",
    }
    return make_verdict(0, window, False, **(answer | columns))


def test_a_latent_with_further_variants_alone_has_a_row_that_says_so() -> None:
    rows = [trial(i, "1", variant="internal", quantile=0) for i in range(3)]
    frame = measure("intruder", IntruderConfig(internal=True), rows)
    found = frame.select("variant", "metric", "value", "status").rows()
    assert set(found) == {("internal", "accuracy", 1.0, "ok"), ("all", "accuracy", None, "too_few")}


def test_every_scorer_of_a_study_has_a_family() -> None:
    assert set(FAMILIES) == set(ScorersConfig.model_fields)
    assert HEADLINE == {
        "detection": "balanced_accuracy",
        "fuzzing": "balanced_accuracy",
        "surprisal": "auroc",
        "embedding": "auroc",
        "simulation": "r_activating",
        "intruder": "accuracy",
        "example_embedding": "auroc",
        "intervention": "mean_nats",
    }
    assert (CHANCE["fuzzing"], CHANCE["simulation"], CHANCE["intruder"]) == (0.5, 0, 0.2)
    assert CHANCE["intervention"] is None


def test_trials_are_the_share_answered_right_with_wilsons_interval() -> None:
    rows = [trial(i, sign, quantile=i % 2) for i, sign in enumerate("110111x")]
    rows += [trial(20 + i, sign, variant="internal", quantile=0) for i, sign in enumerate("10")]
    frame = measure("intruder", IntruderConfig(), rows)
    # Quantile 0: windows 0, 2, 4 (6 failed): 2 of 3; quantile 1: windows 1, 3, 5: 3 of 3.
    assert values(frame, "accuracy") == pytest.approx(
        {"all": 5 / 6, "quantile=0": 2 / 3, "quantile=1": 1, "internal": 0.5}
    )
    main = frame.row(by_predicate=pl.col("variant") == "all", named=True)
    assert (main["n"], main["n_failed"], main["explainer"]) == (6, 1, None)
    oracle = stats.binomtest(5, 6).proportion_ci(0.95, method="wilson")
    assert (main["lo"], main["hi"]) == pytest.approx((oracle.low, oracle.high))
    assert set(frame["metric"]) == {"accuracy"}


def test_trials_that_all_failed_are_null_with_the_reason() -> None:
    failed = measure("intruder", IntruderConfig(), [trial(i, "x") for i in range(3)])
    assert failed.select("value", "n", "n_failed", "status").rows() == [(None, 0, 3, "failed")]
    unasked = [trial(i, "x", reason="budget") for i in range(3)]
    assert measure("intruder", IntruderConfig(), unasked)["status"].to_list() == ["unasked"]


def test_wilson_of_independent_trials_covers_as_often_as_it_says() -> None:
    # Exact coverage over all counts of 20 trials; a score interval's mean over p is near nominal.
    n, shares = 20, [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    rows = [
        trial(i, "1" if i < hits else "0") | {"latent": hits}
        for hits in range(n + 1)
        for i in range(n)
    ]
    frame = measure("intruder", IntruderConfig(), rows, tuple(range(n + 1))).sort("latent")
    lo, hi = frame["lo"].to_numpy(), frame["hi"].to_numpy()
    coverage = [stats.binom.pmf(range(n + 1), n, p)[(lo <= p) & (p <= hi)].sum() for p in shares]
    assert 0.94 <= sum(coverage) / len(shares) <= 0.985


def test_a_scorer_without_explanations_has_one_row_per_latent_and_no_floors() -> None:
    frame = measure(
        "intruder",
        IntruderConfig(),
        [trial(0, "1")],
        latents=(0, 1),
        explainers=("default", "top_tokens"),
        floors=(0, 1),
    )
    assert frame.select("latent", "explainer", "subject", "metric", "status").rows() == [
        (0, None, "own", "accuracy", "ok"),
        (1, None, "own", "accuracy", "too_few"),
    ]
    frame = measure("example_embedding", ExampleEmbeddingConfig(), None, latents=(0, 1))
    assert frame.select("explainer", "metric", "status").unique().rows() == [
        (None, "auroc", "not_run")
    ]


def test_example_embedding_ranks_windows_under_a_null_explainer() -> None:
    latent = LatentId(LAYER.coder, LAYER.hookpoint, 0)
    cosines = {"p0": 0.4, "u0": 0.3, "p1": 0.2, "u1": 0.1, "near": 1.0, "far": -1.0}
    vector_of = {
        text: np.array([c, math.sqrt(1 - c * c)], np.float32) for text, c in cosines.items()
    }
    verdicts = []
    for q in (0, 1):
        p = make_window("a", [4.0], window_id=q, quantile=q)
        u = make_window("a", None, window_id=10 + q)
        asked = example_embedding.Round(q, p, u, f"p{q}", f"u{q}", ("near",), ("far",))
        verdicts += example_embedding.verdicts_of(latent, asked, vector_of)
    rows = verdicts_frame(verdicts).to_dicts()
    frame = measure("example_embedding", ExampleEmbeddingConfig(), rows)
    # All pairs: .4 > .3, .4 > .1, .2 < .3, .2 > .1. A round's silent window is of its quantile.
    found = values(frame, "auroc")
    assert (found["all"], found["quantile=0"], found["quantile=1"]) == (0.75, 1, 1)


def test_surprisal_per_token_is_a_ranking_of_its_own() -> None:
    rows = [make_verdict(0, i, i < 2, score=float(-i)) for i in range(4)]
    rows += [make_verdict(0, i, i < 2, score=float(i), variant="per_token") for i in range(4)]
    frame = measure("surprisal", SurprisalConfig(), rows)
    assert values(frame, "auroc") == {"all": 1, "per_token": 0}
    assert set(frame["metric"]) == {"auroc"}


def test_simulation_is_a_correlation_per_latent() -> None:
    shown = [[0.0, 5.0, 10.0], [2.0, 0.0, 7.0], [9.0, 1.0, 0.0]]
    rows = [
        make_verdict(0, i, i < 2, predicted=tokens, actual=tokens, quantile=0 if i < 2 else None)
        for i, tokens in enumerate(shown)
    ]
    frame = measure("simulation", SimulationConfig(), rows)
    assert values(frame, "r_activating")["all"] == pytest.approx(1)
    assert values(frame, "r_all")["all"] == pytest.approx(1)


def test_interventions_are_a_mean_in_nats_per_strength() -> None:
    rows = [make_verdict(0, i, True, score=float(i)) for i in range(3)]
    rows += [make_verdict(0, i, True, score=4.0 + i, variant="kl=3") for i in range(3)]
    frame = measure("intervention", InterventionConfig(), rows)
    assert values(frame, "mean_nats") == {"all": 1, "kl=3": 5}
    assert values(frame, "se_nats")["all"] == pytest.approx(3**-0.5)


@pytest.mark.parametrize("scorer", sorted(FAMILIES))
def test_all_failed_and_a_single_window_have_rows_with_a_reason(scorer: str) -> None:
    explainer = "default" if FAMILIES[scorer].needs_explanation else None
    broken = {"status": "failed", "reason": "unparsable", "explainer": explainer}
    rows = [make_verdict(0, i, i < 2, **broken) for i in range(4)]
    failed = measure(scorer, ScorerConfig(), rows)
    headline = failed.filter((pl.col("metric") == HEADLINE[scorer]) & (pl.col("variant") == "all"))
    assert headline.select("value", "n_failed", "status").row(0)[::2] == (None, "failed")
    single = {
        "explainer": explainer, "prediction": True, "score": 1.0, "predicted": [0.0, 3.0],
        "actual": [0.0, 4.0],
    }  # fmt: skip
    one = measure(scorer, ScorerConfig(), [make_verdict(0, 0, True, **single)])
    assert HEADLINE[scorer] in set(one["metric"])
    assert set(one["status"]) <= set(METRIC_STATUSES)
    assert one.filter(pl.col("value").is_null() == (pl.col("status") == "ok")).is_empty()


def test_pairs_that_a_scorer_was_not_asked_about_have_no_row() -> None:
    selection = make_selection([3, 5, 8]).with_columns(
        rank=pl.Series([1, 0, None], dtype=pl.UInt32)
    )
    explanations = make_explanations([3, 5, 8], explainers=("default", "output", "top_tokens"))
    frame = latent_metrics_of(
        LAYER,
        selection,
        explanations,
        {"detection": make_verdicts(answers(5, "11", "00", explainer="output"))},
        {
            "detection": DetectionConfig(latents=ScoredSample(sample=1), explainers=("output",)),
            "embedding": EmbeddingConfig(latents=(3,), explainers=("output", "default")),
            "intruder": IntruderConfig(latents=ScoredSample(sample=2)),
        },
        CONFIG,
    )
    pairs = frame.select("scorer", "latent", "explainer").unique().sort("scorer", "latent")
    assert set(pairs.rows()) == {
        ("detection", 5, "output"),
        ("embedding", 3, "default"),
        ("embedding", 3, "output"),
        ("intruder", 3, None),
        ("intruder", 5, None),
    }


def test_a_random_coders_explanation_is_one_more_subject() -> None:
    rows = answers(0, "11", "00") + answers(0, "10", "10", subject="random")
    frame = measure("detection", DetectionConfig(), rows)
    random = frame.filter((pl.col("subject") == "random") & (pl.col("variant") == "all"))
    assert dict(random.select("metric", "value").iter_rows())["balanced_accuracy"] == 0.5
    # Own right on two windows more: p = 2 * .5**2.
    assert values(frame, "p_against_random")["all"] == 0.5
    metrics = make_metrics(
        make_metric(latent, value, subject=subject)
        for subject, two in (("own", (0.9, 0.7)), ("random", (0.5, 0.5)))
        for latent, value in enumerate(two)
    )
    layer = layer_metrics_of(LAYER, make_latents(["ok"] * 2), metrics, CONFIG)
    lift = layer.row(by_predicate=pl.col("statistic") == "lift_over_random", named=True)
    assert (lift["value"], lift["n"]) == (pytest.approx(0.3), 2)
    study = study_metrics_of(metrics, CONFIG).filter(pl.col("b") == "random")
    assert study.select("a", "value").rows() == [("own", pytest.approx(0.3))]


def intruders(values: list[float], **columns: Any) -> list[dict[str, Any]]:
    given = {"scorer": "intruder", "metric": "accuracy", "explainer": None} | columns
    return [make_metric(i, value, **given) for i, value in enumerate(values)]


def test_a_layer_has_the_lift_over_chance_of_scorers_without_explanations() -> None:
    rows = [*intruders([0.6, 0.4]), make_metric(0, 0.8), make_metric(1, 0.9, lo=0.8, hi=0.95)]
    frame = layer_metrics_of(LAYER, make_latents(["ok"] * 2), make_metrics(rows), CONFIG)
    lifts = frame.filter(pl.col("statistic") == "lift_over_chance")
    assert lifts.select("scorer", "explainer", "n").rows() == [("intruder", None, 2)]
    assert lifts["value"][0] == pytest.approx(0.3)
    shares = frame.filter(pl.col("statistic") == "share_interpretable")
    assert shares["scorer"].to_list() == ["detection"]
    # An intruder says nothing of who was explained.
    counts = frame.filter(pl.col("variant") == "explained").select("explainer", "value", "n")
    assert counts.rows() == [("default", 2, 2), (None, 2, 2)]


def test_only_scores_of_an_explanation_on_a_common_scale_are_cut() -> None:
    assert {name for name, family in FAMILIES.items() if family.has_cut} == {
        "detection", "fuzzing", "surprisal", "embedding",
    }  # fmt: skip


def test_scorers_without_explanations_are_correlated_with_every_explainers() -> None:
    first, second, third = [0.1, 0.5, 0.4, 0.9], [0.2, 0.6, 0.4, 0.8], [0.9, 0.1, 0.3, 0.2]
    rows = intruders(first)
    rows += intruders(third, scorer="example_embedding", metric="auroc")
    for explainer in ("default", "top_tokens"):
        rows += [make_metric(i, value, explainer=explainer) for i, value in enumerate(second)]
    frame = study_metrics_of(make_metrics(rows), CONFIG)
    pairs = frame.filter(pl.col("comparison") == "scorer").filter(pl.col("statistic") == "spearman")
    assert set(pairs.select("a", "b", "explainer").rows()) == {
        ("detection", "intruder", "default"),
        ("detection", "intruder", "top_tokens"),
        ("detection", "example_embedding", "default"),
        ("detection", "example_embedding", "top_tokens"),
        ("example_embedding", "intruder", None),
    }
    found = pairs.filter((pl.col("b") == "intruder") & (pl.col("explainer") == "default"))
    assert found["value"][0] == pytest.approx(stats.spearmanr(second, first).statistic)
    assert frame.filter(pl.col("scorer") == "intruder").is_empty()


def test_layers_are_compared_by_scorers_without_explanations_too() -> None:
    rows = intruders([0.6, 0.8]) + intruders([0.3, 0.5], hookpoint="layers.2")
    frame = study_metrics_of(make_metrics(rows), CONFIG)
    assert frame.select("comparison", "explainer", "scorer", "value").rows() == [
        ("layer", None, "intruder", pytest.approx(0.3))
    ]


def test_metrics_of_all_families_do_not_depend_on_the_order_of_verdicts() -> None:
    for scorer, family in FAMILIES.items():
        explainer = "default" if family.needs_explanation else None
        rows = [
            make_verdict(
                latent, i, i < 4, explainer=explainer, prediction=i % 3 > 0, score=(i * 7 % 5) / 3,
                predicted=[float(i * 5 % 7), 1.0], actual=[float(i * 3 % 8), 0.0], quantile=i % 2,
                call_id=f"{latent}-{i // 2}",
            )
            for latent in range(3)
            for i in range(8)
        ]  # fmt: skip
        expected = measure(scorer, ScorerConfig(), rows, (0, 1, 2))
        assert_frame_equal(
            measure(scorer, ScorerConfig(), rows[::-1], (0, 1, 2)), expected, check_exact=True
        )
