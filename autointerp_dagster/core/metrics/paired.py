"""Mean differences over pairs, with intervals: what all paired comparisons share."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from scipy import stats

from autointerp_dagster.core.config import MetricsConfig
from autointerp_dagster.core.metrics.resampling import bootstrap_means, small_sample_interval

_UNKNOWN = float("nan")


class MeanDifference(NamedTuple):
    """A mean over pairs; NaN where there is none."""

    value: float
    lo: float
    hi: float
    p: float
    """Of Wilcoxon's signed-rank test, two-sided, zeros split; not adjusted."""
    n: int
    """Pairs."""


def mean_difference(
    difference: Float64[np.ndarray, " pair"], config: MetricsConfig, rng: np.random.Generator
) -> MeanDifference:
    """The mean of differences with an interval of a bootstrap over pairs.

    Args:
        difference: One per pair, no NaN, in a fixed order.
        config: Confidence, resamples.
        rng: Random source of the resamples.

    Returns:
        With fewer than two pairs no interval and no p; with none no value either.
    """
    n = len(difference)
    if n < 2:
        value = float(difference[0]) if n else _UNKNOWN
        return MeanDifference(value, _UNKNOWN, _UNKNOWN, _UNKNOWN, n)
    means = bootstrap_means(difference[:, None], config.n_bootstrap, rng)[:, 0]
    value = float(difference.mean())
    lo, hi = small_sample_interval(means, value, n, config.confidence)
    p = 1.0
    if difference.any():
        p = p_value(stats.wilcoxon(difference, zero_method="zsplit"))
    return MeanDifference(value, lo, hi, p, n)


def p_value(result: Any) -> float:
    """Of a scipy test, whose results are of many types."""
    return float(result.pvalue)
