"""Adaptive scoring against fixed scoring of the same latents: windows saved, ranks, coverage.

A simulated judge whose errors are independent, or correlate by .1 within a prompt (a beta-binomial
chance per prompt). Latents differ in true accuracy with a standard deviation of .13 about .75; each
has 100 + 100 windows, shuffled into prompts of five. Fixed scoring asks all prompts, adaptive
scoring the first of the same prompts, until ``target_halfwidth: 0.18`` is reached.
"""

from typing import NamedTuple

import numpy as np
from scipy import stats

from autointerp_dagster.core.config import AdaptiveConfig
from autointerp_dagster.core.scorers.stopping import (
    ClassWeights,
    Limits,
    balanced_limits,
    is_sure,
    prompt_mean,
)
from benchmarks.measure import Result

N_LATENTS = 2000
MEAN, SD = 0.75, 0.13
N_OF_CLASS, WINDOWS_PER_PROMPT = 100, 5
CORRELATIONS = (0.0, 0.1)
CONFIDENCE = 0.95
CONFIG = AdaptiveConfig(target_halfwidth=0.18)
SHARE_BAR, SPEARMAN_BAR, COVERAGE_BAR = 0.45, 0.95, 0.95
"""Measured: shares .39 and .42, Spearman .96 and .953-.955 by seed, coverage above .99: limits that
hold at every prompt are surer than needed at the one where a latent stops."""


class Scored(NamedTuple):
    """One latent under both ways of scoring."""

    share: float
    """Of the windows, those that adaptive scoring asked about."""
    fixed: float
    adaptive: float
    is_covered: bool
    """Whether the limits at the stopping time hold the true accuracy."""


def run() -> list[Result]:
    """All three bars, for each correlation."""
    return [result for correlation in CORRELATIONS for result in _results(correlation)]


def _results(correlation: float) -> list[Result]:
    rng = np.random.default_rng(20)
    size = MEAN * (1 - MEAN) / SD**2 - 1
    truths = rng.beta(MEAN * size, (1 - MEAN) * size, size=N_LATENTS)
    scored = [_scored(float(truth), correlation, rng) for truth in truths]
    share, fixed, adaptive, covered = (np.array(column) for column in zip(*scored, strict=True))
    agreement = float(np.corrcoef(stats.rankdata(fixed), stats.rankdata(adaptive))[0, 1])
    name = f"adaptive scoring, errors in a prompt correlate by {correlation}:"
    return [
        Result(f"{name} windows asked", float(share.mean()), SHARE_BAR, "of all", is_cost=True),
        Result(f"{name} Spearman with fixed scores", agreement, SPEARMAN_BAR, "rank correlation"),
        Result(f"{name} coverage at stopping", float(covered.mean()), COVERAGE_BAR, "of latents"),
    ]


def _scored(truth: float, correlation: float, rng: np.random.Generator) -> Scored:
    is_activating = rng.permutation(np.arange(2 * N_OF_CLASS) < N_OF_CLASS)
    prompts = is_activating.reshape(-1, WINDOWS_PER_PROMPT)
    is_right = rng.random(prompts.shape) < _chances(truth, correlation, len(prompts), rng)[:, None]
    weights = ClassWeights.of_counts(N_OF_CLASS, N_OF_CLASS)
    assert weights is not None
    means = np.array([prompt_mean(*pair, weights) for pair in zip(is_right, prompts, strict=True)])
    n, limits = _stopped(means, weights)
    score = _balanced_accuracy(is_right[:n], prompts[:n])
    return Scored(
        share=n / len(prompts),
        fixed=_balanced_accuracy(is_right, prompts),
        adaptive=min(max(score, limits.lo), limits.hi),
        is_covered=limits.lo <= truth <= limits.hi,
    )


def _chances(truth: float, correlation: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """Of a right answer, by prompt: variance ``correlation * truth * (1 - truth)``."""
    if not correlation:
        return np.full(n, truth)
    size = (1 - correlation) / correlation
    return rng.beta(truth * size, (1 - truth) * size, size=n)


def _stopped(means: np.ndarray, weights: ClassWeights) -> tuple[int, Limits]:
    """Prompts asked, and the limits then."""
    sizes = np.full(len(means), float(WINDOWS_PER_PROMPT))
    for n in range(CONFIG.min_prompts, len(means)):
        limits = balanced_limits(means[:n], sizes[:n], weights, CONFIDENCE)
        if is_sure(limits, CONFIG.target_halfwidth):
            return n, limits
    return len(means), balanced_limits(means, sizes, weights, CONFIDENCE)


def _balanced_accuracy(is_right: np.ndarray, is_activating: np.ndarray) -> float:
    return float(is_right[is_activating].mean() + is_right[~is_activating].mean()) / 2
