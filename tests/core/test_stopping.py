import dataclasses
import json
from collections import Counter, defaultdict

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_builders import BLOCK, VOCABULARY, make_record
from scipy import stats

from autointerp_dagster.core.config import (
    AdaptiveConfig,
    DetectionConfig,
    FuzzingConfig,
    MetricsConfig,
)
from autointerp_dagster.core.latent_records import LatentRecord
from autointerp_dagster.core.llm import Completion
from autointerp_dagster.core.metrics import latent_metrics_of
from autointerp_dagster.core.metrics.sequences import class_sizes, sequence_estimates
from autointerp_dagster.core.prompts import read_question
from autointerp_dagster.core.schemas import EXPLANATIONS
from autointerp_dagster.core.scorers import Job, ScoringTask, detection, fuzzing, verdicts_frame
from autointerp_dagster.core.scorers.adaptive import in_rounds
from autointerp_dagster.core.scorers.running import judge
from autointerp_dagster.core.scorers.stopping import (
    BET_HORIZON,
    LARGEST_BET,
    ClassWeights,
    Limits,
    balanced_limits,
    confidence_sequence,
    is_sure,
    prompt_mean,
)
from autointerp_dagster.core.types import LatentId, LayerKey

ADAPTIVE = AdaptiveConfig(target_halfwidth=0.18, min_prompts=4)
EVEN = ClassWeights(1.0, 1.0)


# --- the sequence


def test_without_prompts_nothing_is_refuted():
    assert confidence_sequence(np.array([]), 0.95) == Limits(0.0, 1.0)


def test_the_sequence_equals_a_plain_loop_over_prompts_and_candidate_means():
    rng = np.random.default_rng(0)
    means = rng.integers(0, 6, size=12) / 5
    sizes = np.array([5.0] * 11 + [2.0])

    def refuted_as_too_low(values, m):
        capital, total, weight, spread, variance = 1.0, 0.5, 1.0, 0.25, 0.25
        for i, (x, size) in enumerate(zip(values, sizes, strict=True)):
            bet = min(np.sqrt(2 * np.log(2 / 0.05) / (variance * BET_HORIZON)), LARGEST_BET / m)
            capital *= 1 + size / 5 * bet * (x - m)
            if capital >= 2 / 0.05:
                return True
            total, weight = total + size / 5 * x, weight + size / 5
            spread += size / 5 * (x - total / weight) ** 2
            variance = spread / (i + 2)
        return False

    grid = [i / 500 for i in range(1, 500)]
    lo = max([m for m in grid if refuted_as_too_low(means, m)], default=0.0)
    hi = 1 - max([m for m in grid if refuted_as_too_low(1 - means, m)], default=0.0)
    assert confidence_sequence(means, 0.95, sizes) == Limits(lo, hi)


@given(st.lists(st.integers(0, 5), max_size=30), st.sampled_from([0.8, 0.95]))
@settings(max_examples=60, deadline=None)
def test_limits_only_ever_narrow_mirror_and_widen_with_confidence(counts, confidence):
    means = np.array(counts, dtype=np.float64) / 5
    before, after = (confidence_sequence(m, confidence) for m in (means[:-1], means))
    assert 0 <= before.lo <= after.lo <= after.hi <= before.hi <= 1
    mirrored = confidence_sequence(1 - means, confidence)
    assert mirrored == pytest.approx((1 - after.hi, 1 - after.lo))
    surer = confidence_sequence(means, 0.99)
    assert surer.lo <= after.lo + 1e-12
    assert surer.hi >= after.hi - 1e-12


def test_a_mean_outside_0_and_1_is_refused():
    with pytest.raises(ValueError, match=r"wanted all in \[0, 1\]"):
        confidence_sequence(np.array([0.5, np.nan]), 0.95)
    with pytest.raises(ValueError, match=r"wanted all in \[0, 1\]"):
        confidence_sequence(np.array([1.2]), 0.95)


def test_prompts_that_contradict_each_other_cannot_turn_the_limits_round():
    means = np.array([1.0] * 60 + [0.0] * 400)
    lo, hi = confidence_sequence(means, 0.95)
    assert lo == hi


def test_an_interval_is_sure_at_exactly_twice_the_target():
    assert is_sure(Limits(0.25, 0.75), 0.25)
    assert not is_sure(Limits(0.25, 0.76), 0.25)


# --- balance


def test_with_equal_classes_a_prompts_mean_is_its_share_of_right_answers():
    right = np.array([True, True, True, False, True])
    activating = np.array([True, True, False, False, False])
    assert prompt_mean(right, activating, EVEN) == pytest.approx(0.8)
    assert ClassWeights.of_counts(100, 100) == EVEN


def test_with_unequal_classes_the_mean_over_all_prompts_is_balanced_accuracy():
    # 20 activating with sensitivity .75, 80 silent with specificity .5: balanced accuracy .625
    activating = np.array([True] * 20 + [False] * 80)
    right = np.array([True] * 15 + [False] * 5 + [True] * 40 + [False] * 40)
    weights = ClassWeights.of_counts(20, 80)
    assert weights == (2.5, 0.625)
    order = np.random.default_rng(0).permutation(100)
    means = [prompt_mean(right[some], activating[some], weights) for some in order.reshape(20, 5)]
    assert all(0 <= mean <= 1 for mean in means)
    assert 0.5 + weights.largest * (np.mean(means) - 0.5) == pytest.approx(0.625)
    limits = balanced_limits(np.array(means), np.full(20, 5.0), weights, 0.95)
    assert limits.lo < 0.625 < limits.hi


def test_a_missing_class_has_no_weights():
    assert ClassWeights.of_counts(0, 9) is ClassWeights.of_counts(9, 0) is None


def answers_of(rng, accuracy, n_activating, n_silent, correlation):
    """Right or wrong of every window of a latent, and its class, shuffled into prompts of five."""
    activating = rng.permutation(np.arange(n_activating + n_silent) < n_activating)
    prompt = np.arange(len(activating)) // 5
    chance = np.where(activating, *accuracy)
    if correlation:
        mood = rng.normal(size=prompt[-1] + 1)[prompt]
        noise = np.sqrt(correlation) * mood + np.sqrt(1 - correlation) * rng.normal(size=len(mood))
        return noise < stats.norm.ppf(chance), activating, prompt
    return rng.random(len(chance)) < chance, activating, prompt


def stopped(rng, accuracy, n_activating=100, n_silent=100, correlation=0.0):
    """Limits at the stopping time, and after how many windows it came."""
    right, activating, prompt = answers_of(rng, accuracy, n_activating, n_silent, correlation)
    weights = ClassWeights.of_counts(n_activating, n_silent)
    means = np.array(
        [
            prompt_mean(right[prompt == p], activating[prompt == p], weights)
            for p in range(prompt[-1] + 1)
        ]
    )
    sizes = np.bincount(prompt).astype(np.float64)
    for n in range(ADAPTIVE.min_prompts, len(means) + 1):
        limits = balanced_limits(means[:n], sizes[:n], weights, 0.95)
        if is_sure(limits, ADAPTIVE.target_halfwidth):
            break
    return limits, sizes[:n].sum()


@pytest.mark.parametrize(
    ("accuracy", "n_activating", "n_silent", "correlation"),
    [
        ((0.75, 0.75), 100, 100, 0.0),
        ((0.5, 0.5), 100, 100, 0.1),
        ((0.95, 0.4), 100, 100, 0.1),
        ((0.98, 0.98), 100, 100, 0.0),
        ((0.9, 0.5), 23, 100, 0.1),
    ],
)
def test_the_truth_is_within_the_limits_at_the_stopping_time(
    accuracy, n_activating, n_silent, correlation
):
    rng = np.random.default_rng(7)
    truth = sum(accuracy) / 2
    found = [stopped(rng, accuracy, n_activating, n_silent, correlation) for _ in range(120)]
    covered = np.mean([limits.lo <= truth <= limits.hi for limits, _ in found])
    assert covered >= 0.95
    if n_activating == n_silent:
        assert np.mean([n for _, n in found]) < 0.6 * 200


# --- rounds


class Judge:
    """Right by chance, decided by the texts alone; may fail or run out of money."""

    identity = "judge"

    def __init__(self, truth, *, turned=False, budget=None, broken=(), accuracy=0.8):
        self.truth, self.turned, self.budget, self.broken = truth, turned, budget, broken
        self.accuracy = accuracy
        self.rounds = []

    def answer(self, requests):
        drawn = list(requests)
        self.rounds.append(drawn)
        for request in drawn[::-1] if self.turned else drawn:
            yield request, self.completion(request)

    def completion(self, request):
        if self.budget is not None:
            self.budget -= 1
            if self.budget < 0:
                return Completion("none", None, reason="budget")
        explanation, windows = read_question(request.messages[-1].content)
        if any(word in windows[0] for word in self.broken):
            return Completion("prose", "I would rather not", reason="unparsable")
        labels = []
        for text in windows:
            seed = abs(hash_of(explanation + text.replace("<<", "").replace(">>", "")))
            is_right = np.random.default_rng(seed).random() < self.accuracy
            labels.append(int(self.truth(text) == is_right))
        return Completion("call", json.dumps(labels))


def hash_of(text):
    return int.from_bytes(text.encode(), "little") % (2**61 - 1)


def is_activating(text):
    """By the numbers of ``make_windows``: 3500 and above fire."""
    number = int(text.replace("<<", "").replace(">>", "").split("w")[1].split()[0])
    return number >= 3500


def own(index):
    latent = LatentId("sae", "layers.3", index)
    return ScoringTask(latent, "default", "own", index, f"number {index}")


def job_of(index, *, floor=False, n=60):
    record = make_record(n_test=n, n_negative=n, latent=LatentId("sae", "layers.3", index))
    other = dataclasses.replace(
        own(index), subject="other", explanation_of=index + 1000, text="something else"
    )
    return Job(record, (own(index), other) if floor else (own(index),))


def scored(jobs, llm, *, scorer=detection, config=None, adaptive=ADAPTIVE):
    config = config or DetectionConfig(top_logprobs=0)
    verdicts = judge(scorer, jobs, config, VOCABULARY, llm, lambda _: BLOCK, adaptive)
    return verdicts_frame(verdicts)


def test_adaptive_verdicts_are_those_of_the_first_prompts_of_fixed_scoring():
    jobs = [job_of(i) for i in range(5)]
    fixed = scored(jobs, Judge(is_activating), adaptive=None)
    some = scored(jobs, Judge(is_activating))
    assert fixed.height == 5 * 120
    assert some.height < 0.8 * fixed.height
    last = some.group_by("latent").agg(last=pl.col("turn").max())
    first = fixed.join(last, on="latent").filter(pl.col("turn") <= pl.col("last")).drop("last")
    assert some.equals(first)
    assert fixed["turn"].max() == 23


def test_a_latent_stops_at_the_first_prompt_after_the_minimum_at_which_it_is_sure():
    frame = scored([job_of(i) for i in range(4)], Judge(is_activating))
    for _, rows in frame.group_by("latent"):
        n = rows["turn"].max() + 1
        widths = []
        for k in (n - 1, n):
            part = rows.filter(pl.col("turn") < k)
            right = part["prediction"] == part["is_activating"]
            means = part.with_columns(right=right).group_by("turn").agg(pl.col("right").mean())
            lo, hi = confidence_sequence(means.sort("turn")["right"].to_numpy(), 0.95)
            widths.append(hi - lo)
        assert widths[1] <= 0.36 < widths[0]


def test_chunks_order_of_jobs_and_order_of_answers_change_nothing():
    jobs = [job_of(i, floor=i % 2 == 0) for i in range(7)]
    expected = scored(jobs, Judge(is_activating))
    assert scored(jobs[::-1], Judge(is_activating, turned=True)).equals(expected)
    parts = [scored([job], Judge(is_activating)) for job in jobs]
    assert pl.concat(parts).equals(expected)

    def prompts_of(job, task):
        return detection.prompts_of(
            job.record, task, DetectionConfig(top_logprobs=0), VOCABULARY, BLOCK
        )

    for n in (1, 3):
        rows = in_rounds(detection, jobs, prompts_of, Judge(is_activating), ADAPTIVE, 0.95, n)
        assert verdicts_frame(rows).equals(expected)


def test_jobs_are_drawn_as_earlier_ones_stop():
    drawn = []

    def jobs():
        for i in range(6):
            drawn.append(i)
            yield job_of(i)

    def prompts_of(job, task):
        return detection.prompts_of(job.record, task, DetectionConfig(), VOCABULARY, BLOCK)

    verdicts = in_rounds(detection, jobs(), prompts_of, Judge(is_activating), ADAPTIVE, 0.95, 2)
    next(verdicts)
    assert drawn == [0, 1]
    assert len({v.latent for v in verdicts}) == 6


def test_floors_are_asked_exactly_the_prompts_that_the_own_explanation_used():
    frame = scored([job_of(i, floor=True) for i in range(3)], Judge(is_activating))
    windows = defaultdict(set)
    for row in frame.iter_rows(named=True):
        windows[row["latent"], row["subject"]].add((row["window_id"], row["turn"]))
    assert len(windows) == 6
    for latent in range(3):
        assert windows[latent, "own"] == windows[latent, "other"]


def test_other_variants_are_asked_the_same_turns_and_do_not_decide():
    config = FuzzingConfig(variants=("active",), top_logprobs=0)
    windows = []
    for w in make_record(n_test=60, n_negative=60).windows:
        values = np.roll(w.activations, int(w.rank) % 6)
        windows.append(dataclasses.replace(w, activations=values))
    record: LatentRecord = make_record(windows, latent=LatentId("sae", "layers.3", 0))
    jobs = [Job(record, (own(0),))]
    both = scored(jobs, Judge(is_activating), scorer=fuzzing, config=config)
    main = scored(jobs, Judge(is_activating), scorer=fuzzing, config=FuzzingConfig(top_logprobs=0))
    assert both.filter(variant="all").equals(main)
    active = both.filter(variant="active")
    assert active.height > 0
    assert active["turn"].max() == main["turn"].max()


def test_a_failed_prompt_counts_as_asked_and_says_nothing():
    jobs = [job_of(0)]
    plain = scored(jobs, Judge(is_activating))
    first = plain.filter(pl.col("turn") == 1)["window_id"].to_list()
    words = {f" w{w >> 16} " for w in first}
    failing = scored(jobs, Judge(is_activating, broken=words))
    failed = failing.filter(pl.col("status") == "failed")
    assert failed["turn"].unique().to_list() == [1]
    assert set(failed["reason"]) == {"unparsable"}
    assert failing["turn"].max() >= plain["turn"].max()


def test_a_judge_that_never_answers_in_the_format_is_asked_everything():
    frame = scored([job_of(0)], Judge(is_activating, broken=("some",)))
    assert frame.height == 120
    assert set(frame["reason"]) == {"unparsable"}


def test_a_spent_budget_ends_a_latent_and_a_restart_goes_on_as_if_nothing_had_happened():
    jobs = [job_of(0), job_of(1)]
    cut = scored(jobs, Judge(is_activating, budget=11))
    assert Counter(cut["reason"].drop_nulls())["budget"] > 0
    assert cut.filter(pl.col("status") == "ok")["turn"].n_unique() <= 6
    refused = cut.filter(reason="budget").group_by("latent").agg(pl.col("turn").n_unique())
    assert refused["turn"].to_list() == [1, 1]
    whole = scored(jobs, Judge(is_activating))
    answered = cut.filter(status="ok")
    assert answered.join(whole, on=["latent", "window_id"], how="anti").height == 0


@pytest.mark.parametrize(("n_test", "n_negative"), [(1, 0), (1, 1), (0, 3), (0, 0)])
def test_tiny_latents_are_asked_what_there_is(n_test, n_negative):
    record = make_record(n_test=n_test, n_negative=n_negative, latent=own(0).latent)
    frame = scored([Job(record, (own(0),))], Judge(is_activating))
    assert frame.height == n_test + n_negative


@pytest.mark.parametrize(("n_negative", "stops"), [(60, True), (30, True), (29, False)])
def test_a_latent_with_very_unequal_classes_is_asked_everything(n_negative, stops):
    latent = own(0).latent
    job = Job(make_record(n_test=60, n_negative=n_negative, latent=latent), (own(0),))
    frame = scored([job], Judge(is_activating, accuracy=1.0), adaptive=ADAPTIVE)
    frame = frame.with_columns(call_id=pl.col("turn").cast(pl.String))
    assert (frame.height < 60 + n_negative) is stops
    sizes = class_sizes(windows_table([job]), None)
    assert sequence_estimates(frame, sizes, 0.95).height == stops
    # The ordinary interval stands where there is no sequence; either way there is one row.
    here = {"latent": [0], "is_floor": [False], "coder": ["sae"], "hookpoint": ["layers.3"]}
    selection = pl.DataFrame(here, schema_overrides={"latent": pl.UInt32})
    asked = {"detection": DetectionConfig()}
    metrics = latent_metrics_of(
        LayerKey("sae", "layers.3"), selection, EXPLANATIONS.empty(), {"detection": frame}, asked,
        MetricsConfig(), class_sizes={"detection": sizes},
    )  # fmt: skip
    found = metrics.filter(variant="all", metric="balanced_accuracy").row(0, named=True)
    assert found["value"] == 1
    if not stops:
        assert found["lo"] > 0.9


# --- metrics


def windows_table(jobs):
    rows = [
        {
            "latent": job.record.latent.index,
            "split": w.split,
            "is_activating": w.is_activating,
            "window_id": w.window_id,
        }
        for job in jobs
        for w in job.record.windows
    ]
    return pl.DataFrame(rows, schema_overrides={"latent": pl.UInt32, "window_id": pl.UInt64})


def test_estimates_have_the_limits_that_stopped_the_latent():
    jobs = [job_of(i, floor=True) for i in range(3)]
    frame = scored(jobs, Judge(is_activating))
    sizes = class_sizes(windows_table(jobs), None)
    assert sizes.rows() == [(0, 60, 60), (1, 60, 60), (2, 60, 60)]
    table = sequence_estimates(frame.sample(fraction=1, shuffle=True, seed=1), sizes, 0.95)
    assert table.select("latent", "subject").rows() == [
        (i, subject) for i in range(3) for subject in ("other", "own")
    ]
    assert set(table["status"]) == {"ok"}
    own_rows = table.filter(subject="own")
    assert ((own_rows["hi"] - own_rows["lo"]) <= 0.36).all()
    assert (table["lo"] <= table["value"]).all()
    assert (table["value"] <= table["hi"]).all()
    row = own_rows.row(0, named=True)
    rows = frame.filter(latent=0, subject="own")
    rates = rows.group_by("is_activating").agg(
        (pl.col("prediction") == pl.col("is_activating")).mean()
    )
    assert row["value"] == pytest.approx(rates["prediction"].mean())
    assert (row["n"], row["n_failed"], row["variant"]) == (rows.height, 0, "all")


def test_why_there_is_no_estimate_is_said():
    jobs = [job_of(0), job_of(1)]
    frame = scored(jobs[:1], Judge(is_activating, broken=("some",)))
    refused = scored(jobs[1:], Judge(is_activating, budget=0))
    tiny = Job(make_record(n_test=2, latent=own(2).latent), (own(2),))
    one_class = scored([tiny], Judge(is_activating))
    sizes = class_sizes(windows_table([*jobs, tiny]), 50)
    assert sizes["n_activating"].to_list() == [50, 50, 2]
    table = sequence_estimates(pl.concat([frame, refused, one_class]), sizes, 0.95)
    assert table["status"].to_list() == ["failed", "unasked", "missing_class"]
    assert table.select("value", "lo", "hi").null_count().row(0) == (3, 3, 3)
    assert table["n_failed"].to_list() == [120, 20, 0]
    assert sequence_estimates(frame.clear(), sizes, 0.95).height == 0
    with pytest.raises(ValueError, match="no class sizes"):
        sequence_estimates(frame, sizes.clear(), 0.95)
