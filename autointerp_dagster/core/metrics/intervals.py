"""Intervals and tests for proportions and areas under the ROC curve, over many groups at once.

Windows judged in one prompt err together, so n answers are worth fewer than n. Every interval here
is a score interval (it inverts a test, so it stays in [0, 1] and has a width at 0 and at 1) at an
*effective* sample size; :func:`effective_size` is the only place that knows about prompts.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from scipy import stats

PRIOR_CORRELATION = 0.1
"""Intraclass correlation of errors within a prompt that is assumed before any answer is seen."""

PRIOR_WEIGHT = 0.075
"""Weight of that assumption, as a share of the weight of the prompts themselves."""


class Interval(NamedTuple):
    """Two-sided limits, one pair for each group; NaN where the value is unknown."""

    lo: Float64[np.ndarray, " group"]
    """Lower limit, in [0, value]."""
    hi: Float64[np.ndarray, " group"]
    """Upper limit, in [value, 1]."""


def normal_quantile(confidence: float) -> float:
    """Two-sided standard normal quantile, e.g. 1.96 for 0.95."""
    return float(stats.norm.ppf((1 + confidence) / 2))


def effective_size(
    n: Float64[np.ndarray, " group"],
    design_effect: Float64[np.ndarray, " group"],
    n_prompts: Float64[np.ndarray, " group"],
    max_design_effect: Float64[np.ndarray, " group"],
    confidence: float,
) -> Float64[np.ndarray, " group"]:
    """How many independent answers the ``n`` answers are worth, uncertainty of that included.

    ``n / clip(d * (t / z)**2, 1, m)``: ``d`` is the design effect, drawn slightly towards that of
    :data:`PRIOR_CORRELATION`; ``t`` and ``z`` are the quantiles of Student (degrees of freedom
    from the number of prompts) and of the normal, which charges for having estimated ``d`` from
    few prompts; ``m`` is the largest design effect there can be, that of prompts whose answers all
    err alike. With one window in each prompt ``m`` is 1, and so the result is ``n``; with a single
    prompt ``m`` is ``n``, and the result is 1.

    Args:
        n: Answers, >= 0.
        design_effect: Estimated over prompts; NaN where nothing can be estimated (all answers
            alike, or one prompt): the assumption then stands alone.
        n_prompts: Prompts that hold at least one of the answers.
        max_design_effect: Sum of squared prompt sizes over ``n``, >= 1.
        confidence: Of the interval that will be made with it.

    Returns:
        Between 1 and ``n``; 0 where ``n`` is 0.

    Source:
        Korn and Graubard, Survey Methodology 24 (1998), with the usual cap at n. Charging t at
        every estimate, also those below 1 (the plain recipe), covers 99.6 % at five prompts of 20
        independent answers; charging it before the cap covers 98 %, and 95 % where errors
        correlate. The assumption is shrinkage as of variances in Smyth 2004; without it coverage
        at ten prompts of 20 correlated answers is below 94 %.
    """
    assumed = 1 + PRIOR_CORRELATION * (max_design_effect - 1)
    shrunk = (design_effect + PRIOR_WEIGHT * assumed) / (1 + PRIOR_WEIGHT)
    effect = np.where(np.isnan(design_effect), assumed, shrunk)
    freedom = np.maximum(n_prompts - 1, 1) * (1 + PRIOR_WEIGHT)
    charge = (stats.t.ppf((1 + confidence) / 2, freedom) / normal_quantile(confidence)) ** 2
    factor = np.where(n_prompts > 1, effect * charge, max_design_effect)
    factor = np.clip(factor, 1, np.maximum(max_design_effect, 1))
    return n / np.where(n > 0, factor, 1)


def wilson(
    proportion: Float64[np.ndarray, " group"],
    n: Float64[np.ndarray, " group"],
    confidence: float,
) -> Interval:
    """Wilson's interval of a proportion.

    Args:
        proportion: In [0, 1], or NaN.
        n: Size behind it, effective and so not always whole; 0 gives NaN.
        confidence: Two-sided.

    Source:
        Wilson 1927; the score test of a binomial proportion, inverted, no continuity correction.
    """
    z = normal_quantile(confidence)
    with np.errstate(divide="ignore", invalid="ignore"):
        centre = (proportion + z * z / (2 * n)) / (1 + z * z / n)
        spread = proportion * (1 - proportion) / n + z * z / (4 * n * n)
        half = z / (1 + z * z / n) * np.sqrt(spread)
    # At 0 and 1 the limit is the value itself, which rounding must not step over.
    return Interval(
        np.clip(np.minimum(centre - half, proportion), 0, 1),
        np.clip(np.maximum(centre + half, proportion), 0, 1),
    )


def mover_mean(
    first: Float64[np.ndarray, " group"],
    first_interval: Interval,
    second: Float64[np.ndarray, " group"],
    second_interval: Interval,
) -> Interval:
    """Interval of ``(first + second) / 2`` from the intervals of two proportions.

    The estimates count as uncorrelated; what they share within prompts must be in the effective
    sizes behind their intervals.

    Source:
        MOVER, "method of variance estimates recovery": Zou and Donner 2008, after Newcombe 1998
        (method 10), for a sum.
    """
    mean = (first + second) / 2
    below = np.hypot(first - first_interval.lo, second - second_interval.lo) / 2
    above = np.hypot(first_interval.hi - first, second_interval.hi - second) / 2
    return Interval(np.clip(mean - below, 0, 1), np.clip(mean + above, 0, 1))


def ratio_interval(
    first: Float64[np.ndarray, " group"],
    first_interval: Interval,
    second: Float64[np.ndarray, " group"],
    second_interval: Interval,
) -> Interval:
    """Interval of ``first / second`` from the intervals of two estimates, both >= 0.

    Args:
        first: Numerator; NaN gives NaN.
        first_interval: Its limits, >= 0.
        second: Denominator.
        second_interval: Its limits, >= 0; a lower one of 0 gives an upper limit of infinity.

    Source:
        MOVER-R: Donner and Zou, Statistics in Medicine 31 (2012), equation 9, with each root
        written so that nothing cancels and a denominator of 0 has its limit.
    """
    product = first * second
    (a, b), (c, d) = first_interval, second_interval
    with np.errstate(divide="ignore", invalid="ignore"):
        near, far = a * (2 * first - a), b * (2 * first - b)
        root = np.sqrt(np.maximum(product**2 - near * d * (2 * second - d), 0))
        lo = np.where(near == 0, 0.0, near / (product + root))
        spread = c * (2 * second - c)
        root = np.sqrt(np.maximum(product**2 - far * spread, 0))
        hi = np.where(spread > 0, (product + root) / spread, np.inf)
    unknown = np.isnan(product)
    return Interval(np.where(unknown, np.nan, lo), np.where(unknown, np.nan, hi))


def auroc_variance(
    auroc: Float64[np.ndarray, " group"],
    n_activating: Float64[np.ndarray, " group"],
    n_silent: Float64[np.ndarray, " group"],
) -> Float64[np.ndarray, " group"]:
    """Variance of an area under the ROC curve whose true value is ``auroc``.

    Source:
        Hanley and McNeil 1982 (exponential model), with both class sizes in the two correction
        terms replaced by their mean, as in Newcombe 2006, Statistics in Medicine 25, part 2.
    """
    others = np.maximum((n_activating + n_silent) / 2 - 1, 0)
    spread = 1 + others * ((1 - auroc) / (2 - auroc) + auroc / (1 + auroc))
    return auroc * (1 - auroc) * spread / (n_activating * n_silent)


def auroc_interval(
    auroc: Float64[np.ndarray, " group"],
    n_activating: Float64[np.ndarray, " group"],
    n_silent: Float64[np.ndarray, " group"],
    confidence: float,
) -> Interval:
    """Score-type interval of an area under the ROC curve (ties counted half).

    Args:
        auroc: In [0, 1], or NaN.
        n_activating: Size of one class, effective and so not always whole.
        n_silent: Size of the other.
        confidence: Two-sided.

    Returns:
        The values whose own variance puts the estimate just within reach, found by bisection.

    Source:
        Newcombe 2006, Statistics in Medicine 25, part 2, method 5.
    """
    z = normal_quantile(confidence)
    with np.errstate(divide="ignore", invalid="ignore"):

        def search(outside: Float64[np.ndarray, " group"]) -> Float64[np.ndarray, " group"]:
            inside = auroc.copy()
            for _ in range(50):  # 2**-50: to rounding
                middle = (outside + inside) / 2
                variance = auroc_variance(middle, n_activating, n_silent)
                is_out = (middle - auroc) ** 2 > z * z * variance
                outside = np.where(is_out, middle, outside)
                inside = np.where(is_out, inside, middle)
            return inside

        unknown = np.isnan(auroc) | (n_activating <= 0) | (n_silent <= 0)
        lo, hi = search(np.zeros_like(auroc)), search(np.ones_like(auroc))
    return Interval(np.where(unknown, np.nan, lo), np.where(unknown, np.nan, hi))


def p_above(
    value: Float64[np.ndarray, " group"],
    lo: Float64[np.ndarray, " group"],
    cut: float,
    confidence: float,
) -> Float64[np.ndarray, " group"]:
    """One-sided p-value of "the true value is at most ``cut``", from a value and its lower limit.

    A score interval's lower limit solves ``(value - lo)**2 = z**2 lo (1 - lo) / n``; that gives the
    ``n`` of an equivalent proportion, whose score test at ``cut`` is the p-value. For Wilson
    intervals this is the exact inversion. For MOVER and the area under the ROC curve it is the same
    test wherever ``lo`` is near ``cut``; in every case p < (1 - confidence) / 2 just when
    ``lo > cut``.

    Args:
        value: In [0, 1], or NaN.
        lo: Lower limit of the two-sided interval at ``confidence``.
        cut: In (0, 1).
        confidence: Of the interval that ``lo`` comes from.

    Returns:
        In [0, 1]; NaN where ``value`` or ``lo`` is. Where ``value`` is ``lo``, all that is known is
        on which side of ``cut`` it is: (1 - confidence) / 2 above, else 1.
    """
    z = normal_quantile(confidence)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse_n = (value - lo) ** 2 / (z * z * lo * (1 - lo))
        p = stats.norm.sf((value - cut) / np.sqrt(cut * (1 - cut) * inverse_n))
    # A value at its own limit (one moved into its interval, or 0) tells nothing of n.
    known = np.where(lo > cut, (1 - confidence) / 2, 1.0)
    return np.where(value <= lo, known, p)


def benjamini_hochberg(p: Float64[np.ndarray, " test"]) -> Float64[np.ndarray, " test"]:
    """p-values adjusted for the false discovery rate among them, in the order given.

    Raises:
        ValueError: If one is NaN or outside [0, 1]: a test that was not made is not in the family.

    Source:
        Benjamini and Hochberg 1995; :func:`scipy.stats.false_discovery_control`.
    """
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"benjamini_hochberg: got p-values {p}, wanted all in [0, 1]. Drop nulls.")
    return stats.false_discovery_control(p) if len(p) else p


def mcnemar_p(
    only_first: Int64[np.ndarray, " group"], only_second: Int64[np.ndarray, " group"]
) -> Float64[np.ndarray, " group"]:
    """Exact two-sided p-value of "two judges are right equally often on the same windows".

    Windows of one prompt count as independent, so it is a description, not a discovery.

    Args:
        only_first: Windows that only the first judge got right.
        only_second: Windows that only the second got right.

    Returns:
        1 where they never differ.

    Source:
        McNemar 1947, exact binomial form; equal to :func:`scipy.stats.binomtest` at p = 1/2.
    """
    fewer = np.minimum(only_first, only_second)
    return np.minimum(1.0, 2 * stats.binom.cdf(fewer, only_first + only_second, 0.5))
