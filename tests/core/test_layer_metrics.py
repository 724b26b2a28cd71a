import math
from typing import Any

import numpy as np
import polars as pl
import pytest
from metric_builders import LAYER, make_latents, make_metric, make_metrics
from polars.testing import assert_frame_equal
from scipy import stats

from autointerp_dagster.core.config import MetricsConfig
from autointerp_dagster.core.metrics import layer_metrics_of
from autointerp_dagster.core.schemas import LATENT_METRICS, LATENTS, METRIC_STATUSES
from autointerp_dagster.core.types import LayerKey

CONFIG = MetricsConfig(n_bootstrap=500)


def summarise(rows: list[dict[str, Any]], config: MetricsConfig = CONFIG) -> pl.DataFrame:
    return layer_metrics_of(LAYER, make_latents(["ok"] * 20), make_metrics(rows), config)


def row(frame: pl.DataFrame, statistic: str, **columns: Any) -> dict[str, Any]:
    wanted = {"statistic": statistic, "subject": "own", "variant": "all"} | columns
    return frame.row(by_predicate=pl.all_horizontal(*(pl.col(k) == v for k, v in wanted.items())),
                     named=True)  # fmt: skip


def test_statistics_over_latents_are_those_worked_out_by_hand() -> None:
    # .5 .6 .8 .9: median .7, q25 .575, q75 .825, mean .7; each latent weighs the same.
    frame = summarise(
        [make_metric(i, value, n=10**i) for i, value in enumerate([0.9, 0.5, 0.8, 0.6])]
    )
    found = {s: row(frame, s)["value"] for s in ("median", "q25", "q75", "mean")}
    assert found == pytest.approx({"median": 0.7, "q25": 0.575, "q75": 0.825, "mean": 0.7})
    assert (row(frame, "median")["n"], row(frame, "median")["n_failed"]) == (4, 0)
    for statistic in ("median", "mean"):
        found = row(frame, statistic)
        assert 0 <= found["lo"] < found["value"] < found["hi"] <= 1
    assert row(frame, "q25")["lo"] is None


def test_bootstrap_intervals_narrow_as_the_standard_error_does() -> None:
    values = np.random.default_rng(0).normal(0.7, 0.1, 400).clip(0, 1)
    found = row(summarise([make_metric(i, v) for i, v in enumerate(values)]), "mean")
    half = 1.96 * values.std() / math.sqrt(400)
    assert (found["hi"] - found["lo"]) / 2 == pytest.approx(half, rel=0.15)


def test_latents_without_a_value_are_counted_not_averaged() -> None:
    frame = summarise([make_metric(0, 0.8), make_metric(1, None), make_metric(2, None)])
    found = row(frame, "median")
    assert (found["value"], found["n"], found["n_failed"]) == (0.8, 1, 2)


def test_a_layer_without_any_value_has_the_commonest_reason() -> None:
    rows = [make_metric(i, None, status=s) for i, s in enumerate(["failed", "unasked", "unasked"])]
    found = row(summarise(rows), "median")
    assert (found["value"], found["lo"], found["n"], found["n_failed"], found["status"]) == (
        None, None, 0, 3, "unasked",
    )  # fmt: skip


def test_lift_is_the_mean_of_own_minus_other_over_the_same_latents() -> None:
    # Pairs: latent 0 .9 - .5, latent 1 .7 - .6: mean .25. Latent 2 has no other, 3 a failed one.
    rows = [make_metric(i, value) for i, value in enumerate([0.9, 0.7, 0.1, 0.2])]
    others = [(0, 0.5), (1, 0.6), (3, None)]
    rows += [make_metric(latent, value, subject="other") for latent, value in others]
    found = row(summarise(rows), "lift_over_other")
    assert found["value"] == pytest.approx(0.25)
    assert (found["n"], found["status"]) == (2, "ok")
    # A resample of two pairs holds one of them twice, or both; one degree of freedom.
    reach = 0.15 * math.sqrt(2) * stats.t.ppf(0.975, 1) / stats.norm.ppf(0.975)
    assert (found["lo"], found["hi"]) == pytest.approx((0.25 - reach, 0.25 + reach))


def test_one_latent_has_a_median_a_mean_and_a_lift_without_limits() -> None:
    frame = summarise([make_metric(0, 0.8), make_metric(0, 0.5, subject="other")])
    for statistic in ("median", "mean", "lift_over_other"):
        found = row(frame, statistic)
        assert (found["n"], found["lo"], found["hi"]) == (1, None, None)
        assert found["value"] is not None


@pytest.mark.parametrize("n", [2, 4, 10])
def test_intervals_over_few_latents_cover_the_mean_and_the_median(n: int) -> None:
    rng, config, n_layers = np.random.default_rng(n), MetricsConfig(n_bootstrap=300), 400
    # As if the layers were explainers: one call measures them all.
    rows = [
        make_metric(i, float(value), explainer=str(layer))
        for layer, values in enumerate(rng.normal(0.7, 0.05, (n_layers, n)))
        for i, value in enumerate(values)
    ]
    frame = summarise(rows, config).drop_nulls("lo")
    for statistic in ("mean", "median"):
        found = frame.filter(pl.col("statistic") == statistic)
        covers = (found["lo"] <= 0.7) & (found["hi"] >= 0.7)
        assert found.height == n_layers
        assert 0.91 <= covers.mean() <= 0.995  # type: ignore[operator]


def test_ratios_at_a_latents_own_rate_have_no_statistics_over_latents() -> None:
    names = ("precision_weighted", "f1_weighted")
    rows = [make_metric(i, 0.9, metric=name) for i in range(3) for name in names]
    rows += [make_metric(i, 0.5, metric=name, subject="other") for i in range(3) for name in names]
    frame = summarise([*rows, make_metric(0, 0.9, metric="recall_weighted")])
    assert set(frame["metric"]) == {"recall_weighted", "latents"}


def test_a_standard_error_has_no_lift() -> None:
    rows = [
        make_metric(i, 0.1, scorer="intervention", metric=metric, subject=subject)
        for i in range(3)
        for metric in ("mean_nats", "se_nats")
        for subject in ("own", "other")
    ]
    lifts = summarise(rows).filter(pl.col("statistic") == "lift_over_other")
    assert lifts["metric"].to_list() == ["mean_nats"]


def test_without_floors_there_is_no_lift() -> None:
    assert "lift_over_other" not in set(summarise([make_metric(0, 0.8)])["statistic"])


def test_interpretable_share_controls_false_discoveries_among_latents() -> None:
    # One-sided score tests of n = 100 against .6: sf(.1 / .04899) = .0206 for .7; .4191 for .61;
    # sf(4.08) for .8. Adjusted (of 4): .8 and .7 pass at .05 (.0206 * 4 / 2 = .0412).
    values = np.array([0.8, 0.7, 0.61, 0.3])
    limits = [stats.binomtest(round(v * 100), 100).proportion_ci(method="wilson") for v in values]
    rows = [
        make_metric(i, v, lo=limit.low, hi=limit.high)
        for i, (v, limit) in enumerate(zip(values, limits, strict=True))
    ]
    found = row(summarise(rows), "share_interpretable")
    assert (found["value"], found["n"]) == (0.5, 4)
    # Eight latents more at .3 make .7 a likely chance find: .0206 * 12 / 2 = .124.
    rows += [make_metric(i, 0.3, lo=limits[3].low, hi=limits[3].high) for i in range(4, 12)]
    found = row(summarise(rows), "share_interpretable")
    assert found["value"] == pytest.approx(1 / 12)


def test_the_interpretable_share_of_latents_that_stopped_when_sure_is_undefined() -> None:
    rows = [make_metric(i, 0.9, lo=0.7, hi=1.0) for i in range(5)]
    rows += [
        make_metric(i, 0.9, lo=0.8, hi=1.0, scorer="embedding", metric="auroc") for i in (0, 1)
    ]
    frame = layer_metrics_of(
        LAYER, make_latents(["ok"] * 5), make_metrics(rows), CONFIG, adaptive=("detection",)
    )
    shares = {r["scorer"]: r for r in frame.to_dicts() if r["statistic"] == "share_interpretable"}
    found = shares["detection"]
    assert (found["value"], found["lo"], found["hi"], found["status"]) == (
        None, None, None, "undefined",
    )  # fmt: skip
    assert (found["n"], shares["embedding"]["status"]) == (5, "ok")


@pytest.mark.parametrize(("value", "share"), [(0.6, 0.0), (1.0, 1.0)])
def test_a_value_at_its_own_lower_limit_is_cut_by_what_is_known(value: float, share: float) -> None:
    found = row(summarise([make_metric(0, value, lo=value, hi=1.0)]), "share_interpretable")
    assert (found["value"], found["status"]) == (share, "ok")


def test_counts_tell_alive_dead_rare_dense_and_explained_latents() -> None:
    latents = make_latents(["ok", "dead", "rare", "dense", "dead"])
    rows = [
        make_metric(0, 0.8),
        make_metric(1, None, status="no_explanation"),
        make_metric(1, None, explainer="top_tokens", status="not_run"),
        make_metric(2, None, status="no_explanation"),
    ]
    frame = layer_metrics_of(LAYER, latents, make_metrics(rows), CONFIG)
    counts = frame.filter(pl.col("statistic") == "count")
    found = {(e, v): (value, n) for e, v, value, n in
             counts.select("explainer", "variant", "value", "n").rows()}  # fmt: skip
    assert found == {
        (None, "all"): (5, 5),
        (None, "alive"): (3, 5),
        (None, "ok"): (1, 5),
        (None, "dead"): (2, 5),
        (None, "rare"): (1, 5),
        (None, "dense"): (1, 5),
        (None, "explained"): (2, 3),
        (None, "not_explained"): (1, 3),
        ("default", "explained"): (1, 3),
        ("default", "not_explained"): (2, 3),
        ("top_tokens", "explained"): (1, 1),
        ("top_tokens", "not_explained"): (0, 1),
    }
    assert set(counts["scorer"]) == {None}


def many_metrics(seed: int) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    return make_metrics(
        make_metric(
            latent, float(rng.random()) if rng.random() < 0.9 else None,
            scorer=scorer, metric=metric, subject=subject, lo=0.1, hi=0.9,
        )
        for latent in range(40)
        for scorer, metric in (("detection", "balanced_accuracy"), ("embedding", "auroc"))
        for subject in ("own", "other")
    )  # fmt: skip


def test_layer_metrics_do_not_depend_on_the_order_of_rows() -> None:
    latents, metrics = make_latents(["ok"] * 30 + ["dead"] * 10), many_metrics(0)
    metrics = metrics.with_columns(lo=pl.when(pl.col("value").is_not_null()).then("lo"))
    expected = layer_metrics_of(LAYER, latents, metrics, CONFIG)
    shuffled = layer_metrics_of(
        LAYER,
        latents.sample(fraction=1, shuffle=True, seed=1),
        metrics.sample(fraction=1, shuffle=True, seed=2),
        CONFIG,
    )
    assert_frame_equal(shuffled, expected, check_exact=True)
    assert set(expected["status"]) <= set(METRIC_STATUSES)


def test_adding_a_scorer_changes_no_row_of_another() -> None:
    latents, metrics = make_latents(["ok"] * 40), many_metrics(1)
    both = layer_metrics_of(LAYER, latents, metrics, CONFIG)
    alone = layer_metrics_of(
        LAYER, latents, metrics.filter(pl.col("scorer") == "embedding"), CONFIG
    )
    is_embedding = pl.col("scorer") == "embedding"
    assert_frame_equal(both.filter(is_embedding), alone.filter(is_embedding))


def test_empty_tables_give_counts_of_zero() -> None:
    frame = layer_metrics_of(LAYER, LATENTS.empty(), LATENT_METRICS.empty(), CONFIG)
    assert set(frame["statistic"]) == {"count"}
    assert frame["value"].sum() == 0


def test_a_value_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        summarise([make_metric(0, math.nan)])


def test_rows_of_a_layer_with_a_longer_name_are_refused() -> None:
    with pytest.raises(ValueError, match="another layer"):
        layer_metrics_of(
            LayerKey("sae", "layers.10"), LATENTS.empty(), make_metrics([make_metric(0, 1)]), CONFIG
        )
