import math
from typing import Any

import numpy as np
import polars as pl
import pytest
from metric_builders import make_metric, make_metrics
from polars.testing import assert_frame_equal
from scipy import stats

from autointerp_dagster.core.config import MetricsConfig
from autointerp_dagster.core.metrics import judge_is_too_weak, study_metrics_of
from autointerp_dagster.core.metrics.resampling import expansion
from autointerp_dagster.core.schemas import LATENT_METRICS

CONFIG = MetricsConfig(n_bootstrap=1000)
COMPARED = ("comparison", "a", "b", "explainer", "scorer", "statistic")


def study(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return study_metrics_of(make_metrics(rows), CONFIG)


def row(frame: pl.DataFrame, *key: str | None) -> dict[str, Any]:
    wanted = zip(COMPARED, key, strict=True)
    return frame.row(
        by_predicate=pl.all_horizontal(*(pl.col(k).eq_missing(pl.lit(v)) for k, v in wanted)),
        named=True,
    )


def floors(own: list[float], other: list[float], **columns: Any) -> list[dict[str, Any]]:
    return [
        make_metric(latent, value, subject=subject, **columns)
        for subject, values in (("own", own), ("other", other))
        for latent, value in enumerate(values)
    ]


def test_own_against_other_is_paired_over_floor_latents_of_all_layers() -> None:
    # Differences .2, .3 in one layer, .1 in the other: mean .2; latent 2 has no other.
    rows = floors([0.8, 0.9, 0.1], [0.6, 0.6]) + floors([0.7], [0.6], hookpoint="layers.2")
    found = row(study(rows), "subject", "own", "other", "default", "detection", "mean_difference")
    assert found["value"] == pytest.approx(0.2)
    assert found["n"] == 3
    reach = 0.1 * expansion(3, 0.95)
    assert (found["lo"], found["hi"]) == pytest.approx((0.2 - reach, 0.2 + reach))
    assert found["p"] == pytest.approx(stats.wilcoxon([0.2, 0.3, 0.1]).pvalue)


def test_each_coder_is_compared_alone_too() -> None:
    rows = floors([0.8, 0.9], [0.6, 0.6]) + floors([0.5, 0.6], [0.6, 0.6], coder="random")
    frame = study(rows)
    sae = row(frame, "subject", "sae/own", "sae/other", "default", "detection", "mean_difference")
    random = row(
        frame, "subject", "random/own", "random/other", "default", "detection", "mean_difference"
    )
    assert (sae["value"], random["value"]) == pytest.approx((0.25, -0.05))


def test_a_judge_that_tells_own_from_other_is_not_too_weak() -> None:
    rng = np.random.default_rng(0)
    own, other = rng.normal(0.7, 0.05, 30), rng.normal(0.5, 0.05, 30)
    frame = study(floors(own.tolist(), other.tolist()))
    assert judge_is_too_weak(frame, "detection", "default") is False


def test_a_judge_that_guesses_is_too_weak() -> None:
    values = np.random.default_rng(1).normal(0.5, 0.05, (2, 30)).tolist()
    assert judge_is_too_weak(study(floors(*values)), "detection", "default") is True


def test_without_floors_nobody_knows_whether_the_judge_is_too_weak() -> None:
    frame = study([make_metric(0, 0.8), make_metric(1, 0.9)])
    found = row(frame, "subject", "own", "other", "default", "detection", "mean_difference")
    assert (found["value"], found["n"]) == (None, 0)
    assert judge_is_too_weak(frame, "detection", "default") is None
    assert judge_is_too_weak(frame, "fuzzing", "default") is None


def test_a_judge_that_says_the_same_of_everything_has_no_difference() -> None:
    frame = study(floors([0.5] * 5, [0.5] * 5))
    found = row(frame, "subject", "own", "other", "default", "detection", "mean_difference")
    assert (found["value"], found["lo"], found["hi"], found["p"]) == (0, 0, 0, 1)
    assert judge_is_too_weak(frame, "detection", "default") is True


def test_explainers_are_paired_over_the_latents_that_both_have() -> None:
    # Latents 0 and 1: .9 - .8 and .7 - .4, mean .2; latent 2 only one of them explained.
    rows = [make_metric(i, v) for i, v in enumerate([0.9, 0.7, 0.1])]
    rows += [make_metric(i, v, explainer="top_tokens") for i, v in enumerate([0.8, 0.4, None])]
    found = row(
        study(rows), "explainer", "default", "top_tokens", None, "detection", "mean_difference"
    )
    assert found["value"] == pytest.approx(0.2)
    assert found["n"] == 2


def test_scorers_are_correlated_over_latents_as_scipy_does() -> None:
    rng = np.random.default_rng(0)
    first = rng.random(25).round(1)
    second = first + rng.random(25)
    rows = [make_metric(i, v) for i, v in enumerate(first)]
    rows += [
        make_metric(i, v / 2, scorer="embedding", metric="auroc") for i, v in enumerate(second)
    ]
    frame = study(rows)
    for statistic, oracle in (("spearman", stats.spearmanr), ("pearson", stats.pearsonr)):
        found = row(frame, "scorer", "detection", "embedding", "default", None, statistic)
        assert found["value"] == pytest.approx(oracle(first, second).statistic)
        assert found["p"] == pytest.approx(oracle(first, second).pvalue)
        assert found["lo"] < found["value"] < found["hi"]
        assert found["n"] == 25


def test_a_constant_score_correlates_with_nothing() -> None:
    rows = [make_metric(i, 0.5) for i in range(5)]
    rows += [make_metric(i, i / 5, scorer="fuzzing") for i in range(5)]
    found = row(study(rows), "scorer", "detection", "fuzzing", "default", None, "spearman")
    assert (found["value"], found["lo"], found["p"], found["n"]) == (None, None, None, 5)


def test_layers_are_compared_by_their_medians() -> None:
    rows = [make_metric(i, v) for i, v in enumerate([0.5, 0.6, 0.7])]
    rows += [make_metric(i, v, hookpoint="layers.2") for i, v in enumerate([0.8, 0.9])]
    names = ("layer", "sae@layers.1", "sae@layers.2", "default", "detection", "median_difference")
    found = row(study(rows), *names)
    assert found["value"] == pytest.approx(0.6 - 0.85)
    assert found["n"] == 5
    reach = 0.1 * expansion(3, 0.95) + 0.05 * expansion(2, 0.95)
    assert (found["lo"], found["hi"]) == pytest.approx((-0.25 - reach, -0.25 + reach))


def coders(**values: list[float]) -> list[dict[str, Any]]:
    """Values by ``<coder>_<layer>``."""
    return [
        make_metric(i, value, coder=name[:-2], hookpoint=f"layers.{name[-1]}")
        for name, of in values.items()
        for i, value in enumerate(of)
    ]


def test_coders_are_compared_within_each_layer_that_both_have() -> None:
    # Medians .8 - .5 = .3 at layers.1, .6 - .5 = .1 at layers.2: mean .2; layers.3 has one coder.
    rows = coders(
        sae_1=[0.7, 0.8, 0.9], neurons_1=[0.4, 0.5, 0.6], sae_2=[0.5, 0.6, 0.7],
        neurons_2=[0.4, 0.5, 0.6], sae_3=[0.1, 0.1],
    )  # fmt: skip
    names = ("coder", "neurons", "sae", "default", "detection", "median_difference")
    found = row(study(rows), *names)
    assert found["value"] == pytest.approx(-0.2)
    assert found["n"] == 12
    # U = 0 of 9 at layers.1; at layers.2 the pairs .5/.5 and .6/.6 tie and .6 > .5: U = 2.
    above = [
        stats.mannwhitneyu(a, b, alternative="greater", method="asymptotic", use_continuity=False)
        for a, b in (([0.4, 0.5, 0.6], [0.7, 0.8, 0.9]), ([0.4, 0.5, 0.6], [0.5, 0.6, 0.7]))
    ]
    assert [test.statistic for test in above] == [0, 2]
    z = sum(stats.norm.isf(test.pvalue) for test in above) / math.sqrt(2)
    assert found["p"] == pytest.approx(2 * stats.norm.sf(abs(z)))
    furthest = 2 * 0.1 * expansion(3, 0.95)  # every sample's median at its end, in both layers
    assert -0.2 - furthest < found["lo"] < -0.2 < found["hi"] < -0.2 + furthest


def test_coders_that_share_one_layer_differ_as_the_layers_do() -> None:
    rows = coders(sae_1=[0.7, 0.8, 0.9], random_1=[0.5, 0.5, 0.6])
    frame = study(rows)
    by_coder = row(frame, "coder", "random", "sae", "default", "detection", "median_difference")
    names = ("layer", "random@layers.1", "sae@layers.1", "default", "detection")
    by_layer = row(frame, *names, "median_difference")
    for column in ("value", "lo", "hi", "p", "n"):
        assert by_coder[column] == by_layer[column]


def test_coders_without_a_common_layer_are_not_compared() -> None:
    frame = study(coders(sae_1=[0.7, 0.8], neurons_2=[0.5, 0.5]))
    assert frame.filter(pl.col("comparison") == "coder").is_empty()


def test_coders_of_which_one_has_a_single_latent_have_no_interval() -> None:
    frame = study(coders(sae_1=[0.7], neurons_1=[0.5, 0.6]))
    found = row(frame, "coder", "neurons", "sae", "default", "detection", "median_difference")
    assert found["value"] == pytest.approx(0.55 - 0.7)
    assert (found["lo"], found["p"]) == (None, None)


def test_the_p_of_coders_is_uniform_where_they_do_not_differ() -> None:
    rng = np.random.default_rng(3)
    config = MetricsConfig(n_bootstrap=100)
    found = []
    for _ in range(200):
        values = {f"{c}_{layer}": rng.random(9).tolist() for c in ("sae", "pca") for layer in "123"}
        frame = study_metrics_of(make_metrics(coders(**values)), config)
        names = ("coder", "pca", "sae", "default", "detection", "median_difference")
        found.append(row(frame, *names)["p"])
    assert stats.kstest(found, "uniform").pvalue > 0.01


@pytest.mark.parametrize("n", [4, 5])
def test_a_judge_with_fewer_than_five_floors_is_not_judged(n: int) -> None:
    rng = np.random.default_rng(0)
    own, other = rng.normal(0.9, 0.01, n), rng.normal(0.5, 0.01, n)
    frame = study(floors(own.tolist(), other.tolist()))
    assert judge_is_too_weak(frame, "detection", "default") is (None if n == 4 else False)


@pytest.mark.parametrize("n", [4, 5, 8])
def test_few_latents_correlate_within_wide_limits_or_none(n: int) -> None:
    first = [i / 10 for i in range(n)]
    rows = [make_metric(i, v) for i, v in enumerate(first)]
    rows += [make_metric(i, v**2, scorer="fuzzing") for i, v in enumerate(first)]
    found = row(study(rows), "scorer", "detection", "fuzzing", "default", None, "spearman")
    assert found["value"] == pytest.approx(1)
    if n < 5:
        assert (found["lo"], found["hi"]) == (None, None)
    else:
        # Fisher's z of 1 - .5 / n, Bonett and Wright's standard error.
        r = 1 - 0.5 / n
        reach = stats.norm.ppf(0.975) * math.sqrt((1 + r * r / 2) / (n - 3))
        assert found["lo"] == pytest.approx(math.tanh(math.atanh(r) - reach))
        assert found["hi"] == pytest.approx(1)


def test_layers_that_share_neither_coder_nor_hookpoint_are_not_compared() -> None:
    rows = [
        make_metric(0, 0.5),
        make_metric(0, 0.5, coder="random"),
        make_metric(0, 0.5, coder="random", hookpoint="layers.2"),
    ]
    layers = study(rows).filter(pl.col("comparison") == "layer")
    assert layers.select("a", "b").rows() == [
        ("random@layers.1", "random@layers.2"),
        ("random@layers.1", "sae@layers.1"),
    ]


def test_only_headline_metrics_of_all_windows_are_compared() -> None:
    rows = floors([0.8, 0.9], [0.6, 0.6], metric="sensitivity")
    rows += floors([0.8, 0.9], [0.6, 0.6], variant="quantile=0")
    assert study(rows).is_empty()


def test_study_metrics_do_not_depend_on_the_order_of_rows() -> None:
    rng = np.random.default_rng(0)
    metrics = make_metrics(
        make_metric(
            latent, float(rng.random()), subject=subject, hookpoint=hookpoint, explainer=explainer,
            scorer=scorer,
        )
        for latent in range(12)
        for subject in ("own", "other")
        for hookpoint in ("layers.1", "layers.10")
        for explainer in ("default", "top_tokens")
        for scorer in ("detection", "fuzzing")
    )  # fmt: skip
    shuffled = metrics.sample(fraction=1, shuffle=True, seed=1)
    assert_frame_equal(
        study_metrics_of(shuffled, CONFIG), study_metrics_of(metrics, CONFIG), check_exact=True
    )


def test_an_empty_table_gives_an_empty_table() -> None:
    assert study_metrics_of(LATENT_METRICS.empty(), CONFIG).is_empty()


def test_a_value_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        study([make_metric(0, math.inf)])
