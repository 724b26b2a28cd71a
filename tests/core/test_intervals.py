import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from autointerp_dagster.core.metrics import intervals, resampling
from autointerp_dagster.core.metrics.estimates import (
    Estimate,
    Verdicts,
    auroc_estimate,
    prediction_estimates,
)
from autointerp_dagster.core.metrics.grouped import Answers, prompts_of, ranking_of

CONFIDENCE = 0.95


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def simulated(
    rng: np.random.Generator,
    n_judges: int,
    n_per_class: int,
    windows_per_prompt: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group, prompt and class of the windows of many judges, in shuffled order."""
    n = 2 * n_per_class
    classes = np.tile(np.arange(n) < n_per_class, (n_judges, 1))
    classes = rng.permuted(classes, axis=1)
    n_prompts = math.ceil(n / windows_per_prompt)
    prompt = np.arange(n) // windows_per_prompt + n_prompts * np.arange(n_judges)[:, None]
    group = np.repeat(np.arange(n_judges), n)
    return group, prompt.ravel(), classes.ravel()


def verdicts(
    group: np.ndarray,
    prompt: np.ndarray,
    is_activating: np.ndarray,
    *,
    prediction: np.ndarray | None = None,
    score: np.ndarray | None = None,
) -> Verdicts:
    n = len(group)
    return Verdicts(
        group=group,
        prompt=prompt,
        is_activating=is_activating,
        prediction=np.zeros(n, bool) if prediction is None else prediction,
        is_predicted=np.full(n, prediction is not None),
        score=np.full(n, np.nan) if score is None else score,
        is_failed=np.zeros(n, bool),
        is_unasked=np.zeros(n, bool),
        n_groups=int(group.max()) + 1,
    )


def covers(estimate: Estimate, truth: float) -> float:
    lo, hi = estimate.interval
    return float(np.mean((lo <= truth) & (truth <= hi)))


def accuracy_coverage(
    accuracy: float, correlation: float, n_per_class: int, windows_per_prompt: int, n_judges: int
) -> float:
    """Coverage of balanced accuracy if each prompt has an accuracy of its own (beta-binomial)."""
    rng = np.random.default_rng([int(accuracy * 1000), n_per_class, windows_per_prompt])
    group, prompt, truth = simulated(rng, n_judges, n_per_class, windows_per_prompt)
    of_prompt = np.full(int(prompt.max()) + 1, accuracy)
    if correlation:
        spread = (1 - correlation) / correlation
        of_prompt = rng.beta(accuracy * spread, (1 - accuracy) * spread, len(of_prompt))
    is_right = rng.random(len(group)) < of_prompt[prompt]
    judged = verdicts(group, prompt, truth, prediction=truth == is_right)
    return covers(prediction_estimates(judged, CONFIDENCE)["balanced_accuracy"], accuracy)


def auroc_coverage(
    auroc: float, correlation: float, n_per_class: int, windows_per_prompt: int, n_judges: int
) -> float:
    """Coverage of the area if scores are normal, with a part that a prompt's windows share."""
    rng = np.random.default_rng([int(auroc * 1000), n_per_class, windows_per_prompt])
    group, prompt, truth = simulated(rng, n_judges, n_per_class, windows_per_prompt)
    shared = rng.normal(size=int(prompt.max()) + 1)[prompt] * np.where(truth, 1, -1)
    noise = math.sqrt(1 - correlation) * rng.normal(size=len(group))
    distance = stats.norm.ppf(auroc) * math.sqrt(2)
    score = noise + math.sqrt(correlation) * shared + distance * truth
    return covers(auroc_estimate(verdicts(group, prompt, truth, score=score), CONFIDENCE), auroc)


ACCURACIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
AUROCS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


@pytest.mark.slow
@pytest.mark.parametrize("n_per_class", [50, 100])
@pytest.mark.parametrize("windows_per_prompt", [1, 5, 20])
@pytest.mark.parametrize("correlation", [0.0, 0.1])
def test_balanced_accuracy_intervals_cover_94_to_98_5_percent(
    correlation: float, windows_per_prompt: int, n_per_class: int
) -> None:
    coverages = [
        accuracy_coverage(accuracy, correlation, n_per_class, windows_per_prompt, 5000)
        for accuracy in ACCURACIES
    ]
    assert 0.94 <= np.mean(coverages) <= 0.985, coverages


@pytest.mark.slow
@pytest.mark.parametrize("n_per_class", [50, 100])
@pytest.mark.parametrize("windows_per_prompt", [1, 5, 20])
@pytest.mark.parametrize("correlation", [0.0, 0.1])
def test_auroc_intervals_cover_94_to_99_5_percent(
    correlation: float, windows_per_prompt: int, n_per_class: int
) -> None:
    coverages = [
        auroc_coverage(auroc, correlation, n_per_class, windows_per_prompt, 3000)
        for auroc in AUROCS
    ]
    assert 0.94 <= np.mean(coverages) <= 0.995, coverages


@pytest.mark.parametrize("windows_per_prompt", [1, 5, 20])
@pytest.mark.parametrize("correlation", [0.0, 0.1])
def test_intervals_cover_the_truth_about_as_often_as_they_say(
    correlation: float, windows_per_prompt: int
) -> None:
    # 400 judges at each of two values: the standard error of the mean coverage is 0.8 %.
    accuracies = [
        accuracy_coverage(value, correlation, 50, windows_per_prompt, 400) for value in (0.6, 0.85)
    ]
    aurocs = [auroc_coverage(v, correlation, 50, windows_per_prompt, 400) for v in (0.6, 0.85)]
    assert 0.92 <= np.mean(accuracies) <= 0.995
    assert 0.92 <= np.mean(aurocs) <= 0.999


def test_wilson_equals_scipy_when_answers_are_independent() -> None:
    for hits, n in [(0, 10), (3, 10), (10, 10), (57, 100), (1, 1)]:
        oracle = stats.binomtest(hits, n).proportion_ci(CONFIDENCE, method="wilson")
        lo, hi = intervals.wilson(floats(hits / n), floats(n), CONFIDENCE)
        assert (lo[0], hi[0]) == pytest.approx((oracle.low, oracle.high), abs=1e-12)


def test_wilson_without_answers_is_unknown() -> None:
    lo, hi = intervals.wilson(floats(math.nan), floats(0), CONFIDENCE)
    assert np.isnan(lo[0])
    assert np.isnan(hi[0])


def test_mover_combines_the_distances_to_both_limits() -> None:
    # Mean (.8 + .6) / 2 = .7; below sqrt(.3**2 + .4**2) / 2 = .25; above sqrt(.12**2 + .05**2) / 2
    # = .065.
    lo, hi = intervals.mover_mean(
        floats(0.8),
        intervals.Interval(floats(0.5), floats(0.92)),
        floats(0.6),
        intervals.Interval(floats(0.2), floats(0.65)),
    )
    assert (lo[0], hi[0]) == pytest.approx((0.45, 0.765))


def test_one_window_in_each_prompt_leaves_the_size_as_it_is() -> None:
    size = intervals.effective_size(floats(30), floats(1.3), floats(30), floats(1), CONFIDENCE)
    assert size[0] == 30


def test_a_single_prompt_is_worth_one_answer() -> None:
    size = intervals.effective_size(floats(30), floats(math.nan), floats(1), floats(30), CONFIDENCE)
    assert size[0] == pytest.approx(1)


def test_no_answers_have_no_size() -> None:
    size = intervals.effective_size(floats(0), floats(math.nan), floats(0), floats(1), CONFIDENCE)
    assert size[0] == 0


def test_effective_size_charges_for_few_prompts() -> None:
    # 10 prompts of 20: assumed 1 + .1 * 19 = 2.9; (2 + .075 * 2.9) / 1.075 = 2.06279; freedom
    # 9 * 1.075 = 9.675; n = 200 / (2.06279 * (t / z)**2).
    t = stats.t.ppf(0.975, 9.675) / stats.norm.ppf(0.975)
    size = intervals.effective_size(floats(200), floats(2), floats(10), floats(20), CONFIDENCE)
    assert size[0] == pytest.approx(200 / ((2 + 0.075 * 2.9) / 1.075 * t * t))


def test_design_effect_is_the_variance_of_prompt_sums_over_that_of_answers() -> None:
    # Prompts (1, 1), (0, 0), (1, 0): p = 1/2, residuals .5 each. Prompt sums 1, -1, 0: 3/2 * 2 = 3;
    # independent: 6 * .25 = 1.5; design effect 2.
    hit = np.array([1, 1, 0, 0, 1, 0], dtype=bool)
    answers = Answers(np.zeros(6, int), np.array([0, 0, 1, 1, 2, 2]), np.ones(6, bool), 1)
    prompts = prompts_of(answers, (hit - 0.5) / 6)
    assert prompts.design_effect[0] == pytest.approx(2)
    assert prompts.n_prompts[0] == 3
    assert prompts.max_design_effect[0] == pytest.approx(2)


def test_design_effect_of_answers_that_are_all_right_is_unknown() -> None:
    answers = Answers(np.zeros(4, int), np.array([0, 0, 1, 1]), np.ones(4, bool), 1)
    assert np.isnan(prompts_of(answers, np.zeros(4)).design_effect[0])


@pytest.mark.parametrize("seed", range(5))
def test_auroc_equals_scikit_learn_with_ties_and_several_groups(seed: int) -> None:
    rng = np.random.default_rng(seed)
    group = rng.integers(0, 4, 200)
    truth = rng.random(200) < 0.4
    score = rng.integers(0, 6, 200) + 2.0 * truth
    answers = Answers(group, np.arange(200), truth, 4)
    ranking = ranking_of(answers, score)
    for g in range(4):
        here = group == g
        assert ranking.auroc[g] == pytest.approx(roc_auc_score(truth[here], score[here]))
        assert ranking.influence[here].sum() == pytest.approx(0, abs=1e-12)


def test_auroc_influence_is_the_change_when_a_window_is_left_out() -> None:
    # Jackknife: leaving window i of class size n out moves the area by -influence * n / (n - 1).
    rng = np.random.default_rng(3)
    truth = np.arange(30) < 12
    score = rng.normal(size=30) + truth
    ranking = ranking_of(Answers(np.zeros(30, int), np.arange(30), truth, 1), score)
    for i in range(30):
        keep = np.arange(30) != i
        n = truth.sum() if truth[i] else (~truth).sum()
        moved = roc_auc_score(truth[keep], score[keep]) - ranking.auroc[0]
        assert moved == pytest.approx(-ranking.influence[i] * n / (n - 1))


def test_auroc_limits_are_where_the_estimate_is_just_within_reach() -> None:
    auroc, n, m = floats(0.8, 0.55), floats(40, 10), floats(30, 80)
    lo, hi = intervals.auroc_interval(auroc, n, m, CONFIDENCE)
    for limit in (lo, hi):
        reach = np.abs(limit - auroc) / np.sqrt(intervals.auroc_variance(limit, n, m))
        assert reach == pytest.approx(stats.norm.ppf(0.975), rel=1e-6)
    assert np.all((lo < auroc) & (auroc < hi))


def test_a_perfect_auroc_has_a_lower_limit_below_one() -> None:
    lo, hi = intervals.auroc_interval(floats(1, 0), floats(20, 20), floats(20, 20), CONFIDENCE)
    assert 0.7 < lo[0] < 0.95
    assert hi[0] == pytest.approx(1)
    assert lo[1] == 0
    assert hi[1] == pytest.approx(1 - lo[0])


def test_p_above_is_the_score_test_that_wilson_inverts() -> None:
    # 70 of 100 against .6: z = .1 / sqrt(.24 / 100) = 2.04124.
    lo, _ = intervals.wilson(floats(0.7), floats(100), CONFIDENCE)
    p = intervals.p_above(floats(0.7), lo, 0.6, CONFIDENCE)
    assert p[0] == pytest.approx(stats.norm.sf(0.1 / math.sqrt(0.24 / 100)))


def test_p_above_is_under_half_the_error_rate_just_when_the_limit_is_above_the_cut() -> None:
    value = np.linspace(0, 1, 101)
    for lo in (
        intervals.wilson(value, np.full(101, 37.0), CONFIDENCE).lo,
        intervals.auroc_interval(value, np.full(101, 20.0), np.full(101, 9.0), CONFIDENCE).lo,
    ):
        p = intervals.p_above(value, lo, 0.6, CONFIDENCE)
        assert np.array_equal(p < 0.025, lo > 0.6)


def test_p_above_of_a_value_at_its_limit_says_on_which_side_of_the_cut_it_is() -> None:
    at = floats(0, 0.5, 0.6, 0.7, 1)
    p = intervals.p_above(at, at, 0.6, CONFIDENCE)
    assert p == pytest.approx([1, 1, 1, 0.025, 0.025])
    assert np.isfinite(intervals.benjamini_hochberg(p)).all()


def test_p_above_of_an_unknown_value_is_unknown() -> None:
    unknown = floats(math.nan)
    assert np.isnan(intervals.p_above(unknown, unknown, 0.6, CONFIDENCE)[0])


def test_benjamini_hochberg_adjusts_by_hand() -> None:
    # Sorted .01 .02 .04 .5: .01*4/1 = .04, .02*4/2 = .04, .04*4/3 = .05333, .5.
    adjusted = intervals.benjamini_hochberg(floats(0.5, 0.01, 0.04, 0.02))
    assert adjusted == pytest.approx([0.5, 0.04, 0.16 / 3, 0.04])
    assert len(intervals.benjamini_hochberg(floats())) == 0


def test_benjamini_hochberg_refuses_a_p_value_that_is_not_one() -> None:
    with pytest.raises(ValueError, match="Drop nulls"):
        intervals.benjamini_hochberg(floats(0.1, math.nan))


def test_mcnemar_equals_the_exact_binomial_test() -> None:
    first, second = np.array([0, 1, 5, 12, 3]), np.array([0, 0, 5, 2, 9])
    p = intervals.mcnemar_p(first, second)
    assert p[0] == 1  # never differ
    for i in range(1, 5):
        oracle = stats.binomtest(int(first[i]), int(first[i] + second[i])).pvalue
        assert p[i] == pytest.approx(oracle)


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_bootstrap_medians_follow_those_of_real_resamples(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n)
    fast = resampling.bootstrap_medians(values, 20_000, np.random.default_rng(0))
    drawn = np.random.default_rng(1).integers(0, n, (20_000, n))
    plain = np.median(values[drawn], axis=1)
    # Same distribution: the two-sample Kolmogorov-Smirnov distance at this size is about .01.
    assert stats.ks_2samp(fast, plain).statistic < 0.025


def test_bootstrap_means_use_the_latents_that_have_a_value() -> None:
    values = np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, np.nan]])
    means = resampling.bootstrap_means(values, 500, np.random.default_rng(0))
    known = means[~np.isnan(means[:, 0]), 0]
    assert known.min() == 1
    assert known.max() == 3
    assert np.isnan(means[:, 1]).all()
    assert resampling.percentile_interval(means[:, 0], CONFIDENCE)[0] == 1
    assert resampling.bootstrap_means(values[:0], 5, np.random.default_rng(0)).shape == (5, 2)


def test_bootstrap_mean_spreads_like_the_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=(200, 1))
    means = resampling.bootstrap_means(values, 4000, np.random.default_rng(1))
    assert means.std() == pytest.approx(values.std() / math.sqrt(200), rel=0.05)


def test_row_correlations_equal_scipy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 20)), rng.normal(size=(3, 20))
    rows = resampling.pearson(a, b)
    assert rows == pytest.approx([stats.pearsonr(a[i], b[i]).statistic for i in range(3)])
    assert np.isnan(resampling.pearson(np.ones((1, 4)), b[:1, :4])[0])
