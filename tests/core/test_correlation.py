import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from autointerp_dagster.core.metrics.correlation import correlation_estimates
from autointerp_dagster.core.metrics.slices import sliced
from autointerp_dagster.core.schemas import VERDICTS

FRACTION = 0.95


def row(predicted, actual, *, window_id=0, is_activating=True, reason=None, **fields):
    return {
        "coder": "sae",
        "hookpoint": "layers.3",
        "latent": 17,
        "explainer": "default",
        "subject": "own",
        "variant": "all",
        "window_id": window_id,
        "explanation_of": 17,
        "is_activating": is_activating,
        "quantile": 0 if is_activating else None,
        "negative_kind": None if is_activating else "random",
        "prediction": None,
        "probability": None,
        "score": None,
        "turn": window_id,
        "predicted": predicted,
        "actual": actual,
        "status": "ok" if reason is None else "failed",
        "reason": reason,
        "call_id": f"call-{window_id}",
    } | fields


def frame_of(*rows):
    numbered = [given | {"window_id": i} for i, given in enumerate(rows)]
    return pl.DataFrame(numbered, schema=dict(VERDICTS.columns))


def estimates_of(*rows, n_bootstrap=200, seed=0):
    return correlation_estimates(frame_of(*rows), FRACTION, n_bootstrap, seed)


def metric_of(estimates, metric):
    (found,) = estimates.filter(pl.col("metric") == metric).to_dicts()
    return found


def noisy(rng, n, slope=1.0, n_tokens=16, is_activating=True, **fields):
    """Windows that fire on a few tokens; some are missed as a whole."""
    rows = []
    for _ in range(n):
        fires = (rng.random(n_tokens) < 0.15) & is_activating
        actual = np.where(fires, rng.integers(1, 11), 0).astype(float)
        heard = slope * actual * (rng.random() < 0.7)
        predicted = np.clip(heard + np.where(rng.random(n_tokens) < 0.1, 4, 0), 0, 10)
        rows.append(row(predicted.tolist(), actual.tolist(), is_activating=is_activating, **fields))
    return rows


def test_tokens_of_all_windows_are_concatenated():
    # x = 1 2 3 4, y = 2 4 6 9: r = 11.5 / sqrt(5 * 26.75) = .99435
    # with (0, 0), (5, 0): x = 1 2 3 4 0 5, y = 2 4 6 9 0 0: 11.5 / sqrt(17.5 * 63.5)
    estimates = estimates_of(
        row([1.0, 2.0], [2.0, 4.0]),
        row([3.0, 4.0], [6.0, 9.0]),
        row([0.0, 5.0], [0.0, 0.0], is_activating=False),
    )
    activating, both = (metric_of(estimates, m) for m in ("r_activating", "r_all"))
    assert activating["value"] == pytest.approx(11.5 / np.sqrt(5 * 26.75))
    assert both["value"] == pytest.approx(11.5 / np.sqrt(17.5 * 63.5))
    assert (activating["n"], both["n"]) == (2, 3)
    assert (activating["n_failed"], activating["status"]) == (0, "ok")
    assert estimates.columns == [
        "latent", "explainer", "subject", "variant", "metric",
        "value", "lo", "hi", "n", "n_failed", "status",
    ]  # fmt: skip


@settings(max_examples=40)
@given(
    st.lists(
        st.lists(st.tuples(st.floats(0, 10, width=32), st.integers(0, 10)), min_size=1, max_size=6),
        min_size=1,
        max_size=6,
    )
)
def test_the_value_is_numpys_and_the_interval_holds_it(windows):
    rows = [row([x for x, _ in w], [float(y) for _, y in w]) for w in windows]
    found = metric_of(estimates_of(*rows, n_bootstrap=20), "r_activating")
    x, y = (np.array([pair[i] for w in windows for pair in w], dtype=np.float64) for i in (0, 1))
    if np.ptp(x) <= 1e-6 or np.ptp(y) == 0:
        assert (found["value"], found["lo"], found["hi"]) == (None, None, None)
        assert found["status"] == "undefined"
    else:
        assert found["value"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
        assert -1 <= found["lo"] <= found["value"] <= found["hi"] <= 1


@pytest.mark.parametrize(
    ("rows", "activating", "both"),
    [
        ([row([3.0, 3.0], [1.0, 2.0])], "undefined", "missing_class"),
        ([row([1.0, 3.0], [2.0, 2.0])], "undefined", "missing_class"),
        ([row([0.1, 0.1 + 1e-8], [1.0, 2.0])], "undefined", "missing_class"),
        ([row([1.0, 3.0], [0.0, 0.0], is_activating=False)], "missing_class", "missing_class"),
        ([row([], []), row([], [], is_activating=False)], "undefined", "undefined"),
        ([row(None, [1.0], reason="unparsable")], "failed", "failed"),
        ([row(None, [1.0], reason="budget")], "unasked", "unasked"),
        (
            [row(None, [1.0], reason="budget"), row(None, [1.0], reason="refused")],
            "failed",
            "failed",
        ),
        (
            [row(None, [1.0], reason="unparsable"), row([1.0, 2.0], [0, 0], is_activating=False)],
            "failed",
            "failed",
        ),
        (
            [row([3.0, 3.0], [1.0, 2.0]), row(None, [0.0], reason="budget", is_activating=False)],
            "undefined",
            "unasked",
        ),
    ],
)
def test_a_missing_value_has_its_reason_and_no_interval(rows, activating, both):
    estimates = estimates_of(*rows)
    assert metric_of(estimates, "r_activating")["status"] == activating
    assert metric_of(estimates, "r_all")["status"] == both
    assert estimates.select("value", "lo", "hi").null_count().row(0) == (2, 2, 2)


def test_failed_windows_are_counted_and_left_out():
    rows = [row([1.0, 2.0, 0.0], [1.0, 3.0, 0.0]), row(None, [9.0], reason="unparsable")]
    rows += [row(None, [0.0], reason="budget", is_activating=False)] * 2
    rows += [row([0.0], [0.0], is_activating=False)]
    estimates = estimates_of(*rows)
    activating, both = (metric_of(estimates, m) for m in ("r_activating", "r_all"))
    assert (activating["n"], activating["n_failed"]) == (1, 1)
    assert (both["n"], both["n_failed"], both["status"]) == (2, 3, "ok")
    assert activating["value"] == pytest.approx(np.corrcoef([1, 2, 0], [1, 3, 0])[0, 1])


def test_few_activating_windows_say_next_to_nothing_however_many_others_there_are():
    rng = np.random.default_rng(4)
    silent = noisy(rng, 60, is_activating=False)
    for n, is_open in ((1, True), (4, True), (5, False)):
        found = metric_of(estimates_of(*noisy(rng, n), *silent), "r_all")
        assert ((found["lo"], found["hi"]) == (-1, 1)) is is_open
        if not is_open:
            student = stats.t.ppf(0.975, 4)
            width = np.arctanh(min(found["hi"], 0.9999)) - np.arctanh(found["lo"])
            assert width > 2 * student / np.sqrt(65 * 4)


def test_slices_are_not_resampled():
    rows = noisy(np.random.default_rng(2), 12, quantile=0)
    rows += noisy(np.random.default_rng(3), 12, is_activating=False)
    frame = sliced(frame_of(*rows))
    one, other = (correlation_estimates(frame, FRACTION, 100, seed) for seed in (0, 1))
    limits = [f.sort("variant", "metric").select("variant", "lo", "hi") for f in (one, other)]
    is_slice = pl.col("variant") != "all"
    assert limits[0].filter(is_slice).equals(limits[1].filter(is_slice))
    assert not limits[0].filter(~is_slice).equals(limits[1].filter(~is_slice))


def test_one_window_says_nothing_about_others():
    found = metric_of(estimates_of(row([1.0, 2.0, 4.0], [1.0, 3.0, 2.0])), "r_activating")
    assert (found["lo"], found["hi"]) == (-1, 1)


def test_a_perfect_simulation_has_an_interval_that_narrows_with_windows():
    def lower(n):
        rows = [row([0.0, 10.0, 0.0, 3.0], [0.0, 10.0, 0.0, 3.0])] * n
        found = metric_of(estimates_of(*rows), "r_activating")
        assert found["value"] == pytest.approx(1)
        return found["lo"]

    few, many = lower(2), lower(100)
    assert few < 0.9 < many < 1


def test_groups_are_apart_and_do_not_depend_on_each_other_or_on_order():
    rng = np.random.default_rng(0)
    first = noisy(rng, 12)
    rows = first + noisy(rng, 12, slope=0.3, subject="other") + noisy(rng, 12, latent=4)
    rows += noisy(rng, 12, is_activating=False, explainer="top_tokens")
    frame = frame_of(*rows)
    estimates = correlation_estimates(frame, FRACTION, 100, 0)
    assert estimates.height == 8
    shuffled = frame.sample(fraction=1, shuffle=True, seed=3)
    assert correlation_estimates(shuffled, FRACTION, 100, 0).equals(estimates)
    alone = correlation_estimates(frame_of(*first), FRACTION, 100, 0)
    own = estimates.filter(latent=17, explainer="default", subject="own")
    assert own.equals(alone)


def test_another_seed_gives_another_interval_and_the_same_value():
    rows = noisy(np.random.default_rng(1), 12)
    one, other = (metric_of(estimates_of(*rows, seed=s), "r_activating") for s in (0, 1))
    assert one["value"] == other["value"]
    assert (one["lo"], one["hi"]) != (other["lo"], other["hi"])


def test_slices_have_rows_of_their_own():
    rng = np.random.default_rng(2)
    rows = noisy(rng, 6, quantile=0) + noisy(rng, 6, quantile=1)
    rows += noisy(rng, 6, is_activating=False)
    rows += noisy(rng, 6, is_activating=False, negative_kind="similar")
    found = correlation_estimates(sliced(frame_of(*rows)), FRACTION, 100, 0)
    assert {(r["variant"], r["metric"]): r["n"] for r in found.to_dicts()} == {
        ("all", "r_activating"): 12,
        ("all", "r_all"): 24,
        ("quantile=0", "r_activating"): 6,
        ("quantile=0", "r_all"): 18,
        ("quantile=1", "r_activating"): 6,
        ("quantile=1", "r_all"): 18,
        ("negatives=random", "r_all"): 18,
        ("negatives=similar", "r_all"): 18,
    }


def test_no_verdicts_give_no_rows():
    assert correlation_estimates(VERDICTS.empty(), FRACTION, 100, 0).is_empty()


@pytest.mark.parametrize(
    ("predicted", "actual"),
    [(None, [1.0]), ([1.0], None), ([1.0], [1.0, 2.0]), ([float("nan")], [1.0]), ([None], [1.0])],
)
def test_an_answered_row_without_two_whole_lists_is_an_error(predicted, actual):
    with pytest.raises(ValueError, match=r"latent 17, window 0: got an answered row"):
        estimates_of(row(predicted, actual))


def test_two_layers_are_an_error():
    frame = frame_of(row([1.0], [1.0]), row([1.0], [1.0], hookpoint="layers.4"))
    with pytest.raises(ValueError, match="verdicts of 2 layers"):
        correlation_estimates(frame, FRACTION, 100, 0)


def test_the_interval_covers_the_truth_where_whole_windows_are_missed():
    rng = np.random.default_rng(5)
    many = noisy(rng, 20_000)
    x, y = (np.concatenate([r[name] for r in many]) for name in ("predicted", "actual"))
    truth = np.corrcoef(x, y)[0, 1]
    rows = [r for latent in range(200) for r in noisy(rng, 30, latent=latent)]
    found = correlation_estimates(frame_of(*rows), FRACTION, 200, 0)
    found = found.filter(pl.col("metric") == "r_activating")
    covers = (found["lo"] <= truth) & (found["hi"] >= truth)
    # 200 latents: the standard error of a coverage of .95 is .015
    assert 0.92 <= covers.mean() <= 0.99
    assert (found["hi"] - found["lo"]).mean() < 0.5
