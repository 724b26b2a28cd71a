"""Bootstrap over latents: which latents were looked at is the chance behind a layer's numbers."""

import numpy as np
from jaxtyping import Float64
from scipy import stats

from autointerp_dagster.core.metrics.intervals import normal_quantile

_BLOCK = 2_000_000
"""Numbers drawn at a time, so that memory does not grow with the latents."""

LEAST_FOR_CORRELATION = 5
"""Units below which a correlation has no limits: they would be nearly -1 and 1."""


def percentile_interval(
    replicates: Float64[np.ndarray, " replicate"], confidence: float
) -> tuple[float, float]:
    """Middle ``confidence`` of the replicates that are numbers; NaN if none is."""
    known = replicates[~np.isnan(replicates)]
    if not len(known):
        return float("nan"), float("nan")
    lo, hi = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(lo), float(hi)


def small_sample_interval(
    replicates: Float64[np.ndarray, " replicate"],
    estimate: float,
    n: int,
    confidence: float,
    within: tuple[float, float] = (-np.inf, np.inf),
) -> tuple[float, float]:
    """Middle ``confidence`` of the replicates, as much wider about the estimate as few units need.

    Resamples of n units vary less than samples do, by sqrt((n - 1) / n), and n units do not know
    how much they vary: percentiles alone cover a mean at .49 for n = 2, .78 for 4, .92 for 10, at
    .95. Widened they cover that of normal values at .95, .94 and .95, of skewed ones at .91 and
    more, and a median at .90 to .98.

    Args:
        replicates: Of a location: a mean, a median.
        estimate: The same of the sample.
        n: Units resampled.
        confidence: Two-sided.
        within: What the location can be: limits are cut there.

    Returns:
        NaN with fewer than two units, or without a replicate.

    Source:
        Hesterberg, The American Statistician 69 (2015), the "expanded percentile interval", here as
        a factor on the limits.
    """
    if n < 2:
        return float("nan"), float("nan")
    factor = expansion(n, confidence)
    lo, hi = percentile_interval(replicates, confidence)
    lo, hi = estimate - factor * (estimate - lo), estimate + factor * (hi - estimate)
    return max(lo, within[0]), min(hi, within[1])


def expansion(n: int, confidence: float) -> float:
    """How many times further than percentiles the limits of n >= 2 units lie."""
    student = float(stats.t.ppf((1 + confidence) / 2, n - 1))
    return float(np.sqrt(n / (n - 1))) * student / normal_quantile(confidence)


def correlation_interval(
    replicates: Float64[np.ndarray, " replicate"],
    value: float,
    n: int,
    confidence: float,
    *,
    is_of_ranks: bool,
) -> tuple[float, float]:
    """Limits of a correlation over n units: of its resamples or of the normal theory, the wider.

    Few units resample to far too narrow limits, and normal theory knows nothing of tails.

    Args:
        replicates: Of the correlation; NaN where undefined.
        value: The same of the sample.
        n: Units.
        confidence: Two-sided.
        is_of_ranks: Spearman's; else Pearson's.

    Returns:
        NaN below :data:`LEAST_FOR_CORRELATION` units.

    Source:
        Fisher 1921; Bonett and Wright, Psychometrika 65 (2000), for ranks.
    """
    if n < LEAST_FOR_CORRELATION:
        return float("nan"), float("nan")
    bound = 1 - 0.5 / n  # z is infinite at 1
    r = float(np.clip(value, -bound, bound))
    reach = normal_quantile(confidence) * np.sqrt((1 + is_of_ranks * r * r / 2) / (n - 3))
    lo, hi = percentile_interval(replicates, confidence)
    normal = np.tanh(np.arctanh(r) - reach), np.tanh(np.arctanh(r) + reach)
    return float(np.nanmin([lo, normal[0], value])), float(np.nanmax([hi, normal[1], value]))


def bootstrap_means(
    values: Float64[np.ndarray, "latent column"], n_bootstrap: int, rng: np.random.Generator
) -> Float64[np.ndarray, "replicate column"]:
    """Means of each column over resampled latents.

    A resample draws as many latents as there are, with replacement, for all columns alike (a latent
    brings all its values), and a mean is over the values that are there.

    Args:
        values: NaN where a latent has no value; latents in a fixed order.
        n_bootstrap: Resamples.
        rng: Random source.

    Returns:
        NaN where a resample holds no value of the column.

    Source:
        Efron 1979; Cameron, Gelbach and Miller 2008 for resampling clusters whole.
    """
    n_latents = len(values)
    if not n_latents:
        return np.full((n_bootstrap, values.shape[1]), np.nan)
    is_known = ~np.isnan(values)
    filled, known = np.where(is_known, values, 0.0), is_known.astype(np.float64)
    blocks = []
    step = max(1, _BLOCK // n_latents)
    for start in range(0, n_bootstrap, step):
        size = min(step, n_bootstrap - start)
        times = times_drawn(n_latents, size, rng)
        totals, counts = times @ filled, times @ known
        # Matrix products round differently from machine to machine; tables should not.
        means = np.round(totals / np.maximum(counts, 1), 12)
        blocks.append(np.where(counts > 0, means, np.nan))
    return np.concatenate(blocks)


def times_drawn(
    n_latents: int, size: int, rng: np.random.Generator
) -> Float64[np.ndarray, "replicate latent"]:
    """How often each of ``n_latents`` is in each of ``size`` resamples of as many."""
    drawn = rng.integers(0, n_latents, (size, n_latents))
    drawn += np.arange(size)[:, None] * n_latents
    counts = np.bincount(drawn.ravel(), minlength=size * n_latents)
    return counts.reshape(size, n_latents).astype(np.float64)


def bootstrap_medians(
    values: Float64[np.ndarray, " latent"], n_bootstrap: int, rng: np.random.Generator
) -> Float64[np.ndarray, " replicate"]:
    """Medians of resamples, drawn without making the resamples.

    The k-th smallest of n uniform draws follows Beta(k, n - k + 1), and a resample's k-th smallest
    value is the sample's at that fraction of its length; so each replicate costs two draws instead
    of n.

    Args:
        values: No NaN; any order; may be empty.
        n_bootstrap: Resamples.
        rng: Random source.

    Returns:
        NaN if there is no value.

    Source:
        Efron 1979, section 3 (the bootstrap distribution of the median in closed form).
    """
    n = len(values)
    if not n:
        return np.full(n_bootstrap, np.nan)
    ascending = np.sort(values)
    middle = (n + 1) // 2  # the lower of the two if n is even
    lower = rng.beta(middle, n - middle + 1, n_bootstrap)
    low = ascending[np.minimum((lower * n).astype(np.int64), n - 1)]
    if n % 2:
        return low
    # Given the lower middle one, the n / 2 above it are uniform over the rest; take their smallest.
    upper = lower + (1 - lower) * rng.beta(1, n // 2, n_bootstrap)
    return (low + ascending[np.minimum((upper * n).astype(np.int64), n - 1)]) / 2


def bootstrap_correlations(
    first: Float64[np.ndarray, " latent"],
    second: Float64[np.ndarray, " latent"],
    n_bootstrap: int,
    rng: np.random.Generator,
) -> Float64[np.ndarray, "replicate 2"]:
    """Spearman's and Pearson's correlation over resampled latents.

    Args:
        first: No NaN.
        second: Of the same latents, in the same order.
        n_bootstrap: Resamples.
        rng: Random source.

    Returns:
        Columns Spearman, Pearson; NaN where a resample is constant in one of them.
    """
    n = len(first)
    blocks = [np.zeros((0, 2))]
    step = max(1, _BLOCK // max(n, 1))
    for start in range(0, n_bootstrap if n else 0, step):
        drawn = rng.integers(0, n, (min(step, n_bootstrap - start), n))
        a, b = first[drawn], second[drawn]
        ranked = pearson(stats.rankdata(a, axis=1), stats.rankdata(b, axis=1))
        blocks.append(np.stack([ranked, pearson(a, b)], axis=1))
    return np.concatenate(blocks)


def pearson(
    first: Float64[np.ndarray, "row latent"], second: Float64[np.ndarray, "row latent"]
) -> Float64[np.ndarray, " row"]:
    """Pearson's correlation of each row; NaN where a row is constant."""
    a = first - first.mean(axis=1, keepdims=True)
    b = second - second.mean(axis=1, keepdims=True)
    scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    is_constant = (np.ptp(first, axis=1) == 0) | (np.ptp(second, axis=1) == 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(is_constant, np.nan, np.clip((a * b).sum(axis=1) / scale, -1, 1))
