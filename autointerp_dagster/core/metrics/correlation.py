"""Simulation's metric: Pearson's correlation of predicted and true activations, over tokens.

Tokens of all answered windows are concatenated: ``r_activating`` over activating windows,
``r_all`` over both classes. A correlation is a function of six sums (tokens, x, y, xx, yy, xy), so
each window is kept as its six numbers, and a resample of windows is a matrix product.

The interval of variant ``all`` resamples whole windows, each class for itself, and is studentised:
the spread of ``(z* - z) / se*`` over resamples replaces Student's quantile on each side where it is
wider, up to twice that (resamples that miss the one odd window have next to no ``se*``), with ``z``
the Fisher transform and ``se`` its linearised standard error over windows. Tokens are never more
than independent, so ``se`` is at least Fisher's ``1 / sqrt(N - 3)``. Slices, of which there are a
dozen to each latent, have Student's quantile on both sides.
"""

from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Float64, Int64
from scipy import stats

from autointerp_dagster.core.metrics.resampling import LEAST_FOR_CORRELATION, times_drawn
from autointerp_dagster.core.metrics.slices import OWNER
from autointerp_dagster.core.rng import latent_rng
from autointerp_dagster.core.schemas import MAIN_VARIANT, UNASKED
from autointerp_dagster.core.types import LayerKey

R_ACTIVATING, R_ALL = "r_activating", "r_all"

_N, _X, _Y, _XX, _YY, _XY = range(6)
_PAIRS = np.triu_indices(6)
_CONSTANT = 1e-6
"""Range of displayed activations (0..10) below which they are constant: Float32 rounds coarser."""
_MOST_SKEWED = 2.0
"""Widest side of an interval, in Student's quantiles."""
_LATENTS = 256
"""Latents at a time: bounds memory, changes no value."""
_REPLICATES = 500
"""Resamples at a time: likewise."""
_SCHEMA: dict[str, pl.DataType | type[pl.DataType]] = {
    "latent": pl.UInt32,
    "explainer": pl.String,
    "subject": pl.String,
    "variant": pl.String,
    "metric": pl.String,
    "value": pl.Float64,
    "lo": pl.Float64,
    "hi": pl.Float64,
    "n": pl.UInt32,
    "n_failed": pl.UInt32,
    "status": pl.String,
}


class _Windows(NamedTuple):
    """The windows of one group, by id."""

    sums: Float64[np.ndarray, "window 6"]
    """Tokens, x, y, xx, yy, xy; x is the prediction, both less their means over the group; 0
    where failed."""
    lowest: Float64[np.ndarray, "window 2"]
    """Smallest x and y; infinite without tokens."""
    highest: Float64[np.ndarray, "window 2"]
    """Largest x and y."""
    is_activating: Bool[np.ndarray, " window"]
    """Class of the window."""
    is_failed: Bool[np.ndarray, " window"]
    """The verdict failed."""
    is_unasked: Bool[np.ndarray, " window"]
    """It failed because the question was never sent."""


def correlation_estimates(
    frame: pl.DataFrame, confidence: float, n_bootstrap: int, seed: int
) -> pl.DataFrame:
    """Correlations of every latent, explainer, subject and variant, or why there is none.

    Args:
        frame: ``schemas.VERDICTS`` rows of simulation, of one layer, in any order; also as
            ``slices.sliced`` gives them. A slice by kind of negatives has no ``r_activating``: it
            is that of the whole.
        confidence: Of the two-sided intervals.
        n_bootstrap: Resamples of windows behind each of variant ``all``; slices have none.
        seed: Part of the address of each group's resamples, which do not depend on other groups.

    Returns:
        ``latent``, ``explainer``, ``subject``, ``variant``, ``metric`` (``r_activating``,
        ``r_all``), ``value`` in [-1, 1], ``lo`` and ``hi`` (null exactly where ``value`` is), ``n``
        (windows answered, of those that the metric rests on), ``n_failed`` (of the same) and
        ``status``: ``ok``; ``unasked`` or ``failed`` if of a class that it needs all did;
        ``missing_class`` without activating windows, and for ``r_all`` without others;
        ``undefined`` if all predictions or all true activations are equal. Fewer than
        five answered windows of a class it needs may well be alike by chance and say next to
        nothing about others of it: the interval is then [-1, 1].

    Raises:
        ValueError: If rows are of several layers, or an answered row lacks a prediction or a true
            activation, has not as many of both, or one that is not finite.

    Source:
        r: arXiv 2410.13928, section 3.2, after Bills et al. 2023. Interval: Efron and Tibshirani
        1993, chapter 12 (bootstrap-t), on Fisher's variance-stabilising scale.
    """
    layer = _layer_of(frame)
    parts: list[pl.DataFrame] = [pl.DataFrame(schema=_SCHEMA)]
    if layer is not None:
        latents = frame["latent"].unique().sort()
        for start in range(0, len(latents), _LATENTS):
            block = frame.filter(
                pl.col("latent").is_in(latents[start : start + _LATENTS].implode())
            )
            parts.append(_block_estimates(block, layer, confidence, n_bootstrap, seed))
    return pl.concat(parts)


def _layer_of(frame: pl.DataFrame) -> LayerKey | None:
    layers = frame.select("coder", "hookpoint").unique().rows()
    if len(layers) > 1:
        raise ValueError(
            f"correlation_estimates: got verdicts of {len(layers)} layers, wanted one. "
            "Pass a cell at a time."
        )
    return LayerKey(*layers[0]) if layers else None


def _block_estimates(
    block: pl.DataFrame, layer: LayerKey, confidence: float, n_bootstrap: int, seed: int
) -> pl.DataFrame:
    names = [*OWNER, "variant"]
    block = block.sort([*names, "is_activating", "window_id"], nulls_last=True)
    groups = block.select(names).unique(maintain_order=True).with_row_index("group")
    numbers = block.select(names).join(
        groups, on=names, how="left", nulls_equal=True, maintain_order="left"
    )
    group = numbers["group"].cast(pl.Int64).to_numpy()
    windows = _windows_of(block, group)
    rows: list[tuple[object, ...]] = []
    starts = np.searchsorted(group, np.arange(groups.height + 1))
    for name, start, stop in zip(groups.drop("group").rows(), starts, starts[1:], strict=False):
        part = _Windows(*(column[start:stop] for column in windows))
        latent, variant = name[0], name[-1]
        for metric in (R_ACTIVATING, R_ALL):
            if metric == R_ACTIVATING and variant.startswith("negatives="):
                continue
            rng = latent_rng(seed, layer, latent, f"correlation/{variant}/{metric}")
            n_drawn = n_bootstrap if variant == MAIN_VARIANT else 0
            rows.append((*name, metric, *_estimate(part, metric, confidence, n_drawn, rng)))
    return pl.DataFrame(rows, schema=_SCHEMA, orient="row")


def _windows_of(block: pl.DataFrame, group: Int64[np.ndarray, " window"]) -> _Windows:
    """The sums of every window of a block, in its order."""
    is_failed = (block["status"] != "ok").to_numpy()
    _check(block.filter(pl.col("status") == "ok"))
    lengths = block["predicted"].list.len().fill_null(0).to_numpy().astype(np.int64)
    lengths = np.where(is_failed, 0, lengths)
    window = np.repeat(np.arange(block.height), lengths)
    values: list[Float64[np.ndarray, " token"]] = []
    lowest = np.full((block.height, 2), np.inf)
    highest = np.full((block.height, 2), -np.inf)
    for column, name in enumerate(("predicted", "actual")):
        flat = block.filter(pl.col("status") == "ok")[name].explode(empty_as_null=False)
        value = flat.cast(pl.Float64).to_numpy()
        np.minimum.at(lowest[:, column], window, value)
        np.maximum.at(highest[:, column], window, value)
        values.append(value - _group_means(value, group[window])[group[window]])
    x, y = values
    terms = (np.ones_like(x), x, y, x * x, y * y, x * y)
    sums = np.stack([np.bincount(window, term, block.height) for term in terms], axis=1)
    is_unasked = block["reason"].is_in(UNASKED).fill_null(value=False).to_numpy()
    activating = block["is_activating"].to_numpy()
    return _Windows(sums, lowest, highest, activating, is_failed, is_unasked & is_failed)


def _group_means(
    value: Float64[np.ndarray, " token"], group: Int64[np.ndarray, " token"]
) -> Float64[np.ndarray, " group"]:
    return np.bincount(group, value) / np.maximum(np.bincount(group), 1)


def _check(answered: pl.DataFrame) -> None:
    predicted, actual = pl.col("predicted"), pl.col("actual")
    is_sound = (
        predicted.is_not_null()
        & actual.is_not_null()
        & (predicted.list.len() == actual.list.len())
        & predicted.list.eval(pl.element().is_finite().fill_null(value=False)).list.all()
        & actual.list.eval(pl.element().is_finite().fill_null(value=False)).list.all()
    ).fill_null(value=False)
    faulty = answered.filter(~is_sound)
    if faulty.height:
        latent, window = faulty.select("latent", "window_id").row(0)
        raise ValueError(
            f"correlation_estimates: latent {latent}, window {window}: got an answered row whose "
            "predicted and actual are not two finite lists of one length. A verdict without a "
            "prediction has failed."
        )


def _estimate(
    windows: _Windows,
    metric: str,
    confidence: float,
    n_bootstrap: int,
    rng: np.random.Generator,
) -> tuple[float | None, float | None, float | None, int, int, str]:
    """Value, limits, n, n_failed and status of one metric of one group."""
    concerned = windows.is_activating | (metric == R_ALL)
    answered = concerned & ~windows.is_failed
    n, n_failed = int(answered.sum()), int((concerned & windows.is_failed).sum())
    status = _status(windows, concerned, answered, metric)
    if status != "ok":
        return None, None, None, n, n_failed, status
    classes = [windows.is_activating, ~windows.is_activating]
    strata = [windows.sums[answered & which] for which in classes if (answered & which).any()]
    value = float(_correlation(np.sum([part.sum(axis=0) for part in strata], axis=0)[None])[0])
    lo, hi = _interval(strata, value, confidence, n_bootstrap, rng)
    return value, lo, hi, n, n_failed, "ok"


def _status(
    windows: _Windows,
    concerned: Bool[np.ndarray, " window"],
    answered: Bool[np.ndarray, " window"],
    metric: str,
) -> str:
    classes = [windows.is_activating, ~windows.is_activating][: 2 if metric == R_ALL else 1]
    absent = [which for which in classes if not (answered & which).any()]
    lost = np.any([concerned & which for which in absent], axis=0)
    if lost.any():
        return "unasked" if windows.is_unasked[lost].all() else "failed"
    if absent:
        return "missing_class"
    ranges = windows.highest[answered].max(axis=0) - windows.lowest[answered].min(axis=0)
    return "ok" if bool((ranges > _CONSTANT).all()) else "undefined"


def _interval(
    strata: list[Float64[np.ndarray, "_ 6"]],
    value: float,
    confidence: float,
    n_bootstrap: int,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Limits around ``value``; the strata are resampled each for itself."""
    # Of the smallest: the few activating windows hold nearly all that varies.
    freedom = min(len(part) for part in strata) - 1
    if freedom + 1 < LEAST_FOR_CORRELATION:
        return -1.0, 1.0
    z, se = (
        float(column[0]) for column in _fisher([np.ones((1, len(part))) for part in strata], strata)
    )
    spreads = [np.zeros(0)]
    for start in range(0, n_bootstrap, _REPLICATES):
        size = min(_REPLICATES, n_bootstrap - start)
        times = [times_drawn(len(part), size, rng) for part in strata]
        z_drawn, se_drawn = _fisher(times, strata)
        spreads.append((z_drawn - z) / se_drawn)
    spread = np.concatenate(spreads)
    spread = spread[np.isfinite(spread)]
    student = float(stats.t.ppf((1 + confidence) / 2, freedom))
    below, above = student, student
    if spread.size:
        tails = np.quantile(spread, [(1 - confidence) / 2, (1 + confidence) / 2])
        above, below = (
            float(np.clip(tail, student, _MOST_SKEWED * student)) for tail in (-tails[0], tails[1])
        )
    # Matrix products round differently from machine to machine; tables should not.
    lo, hi = (round(float(np.tanh(limit)), 10) for limit in (z - below * se, z + above * se))
    return min(lo, value), max(hi, value)


def _fisher(
    times: list[Float64[np.ndarray, "replicate _"]], strata: list[Float64[np.ndarray, "_ 6"]]
) -> tuple[Float64[np.ndarray, " replicate"], Float64[np.ndarray, " replicate"]]:
    """Fisher's z and its standard error over windows, of each resample; NaN where undefined.

    Args:
        times: Of each stratum: how often each resample holds each window.
        strata: The windows' sums.
    """
    totals = [drawn @ part for drawn, part in zip(times, strata, strict=True)]
    total = np.sum(totals, axis=0)
    n_tokens = total[:, _N]
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = 1 - 0.5 / n_tokens  # of r: z is infinite at 1
        r = np.clip(_correlation(total), -bound, bound)
        weights = _influence_weights(total, r)
        variance = np.zeros(len(total))
        for drawn, part, sums in zip(times, strata, totals, strict=True):
            variance += _variance_within(drawn, part, sums, weights)
        least = 1 / np.sqrt(np.maximum(n_tokens - 3, 1))
        se = np.maximum(np.sqrt(np.maximum(variance, 0)) / (1 - r * r), least)
        return np.arctanh(r), se


def _variance_within(
    times: Float64[np.ndarray, "replicate _"],
    part: Float64[np.ndarray, "_ 6"],
    totals: Float64[np.ndarray, "replicate 6"],
    weights: Float64[np.ndarray, "replicate 6"],
) -> Float64[np.ndarray, " replicate"]:
    """Variance of a sum of windows' effects; 0 from a single window, which cannot tell."""
    n = len(part)
    if n < 2:
        return np.zeros(len(times))
    products = part[:, _PAIRS[0]] * part[:, _PAIRS[1]]
    twice = np.where(_PAIRS[0] == _PAIRS[1], 1.0, 2.0)
    squares = (times @ products) * weights[:, _PAIRS[0]] * weights[:, _PAIRS[1]] * twice
    return (squares.sum(axis=1) - (weights * totals).sum(axis=1) ** 2 / n) * n / (n - 1)


def _influence_weights(
    total: Float64[np.ndarray, "replicate 6"], r: Float64[np.ndarray, " replicate"]
) -> Float64[np.ndarray, "replicate 6"]:
    """Weights of a window's six sums in its first-order effect on ``r``.

    A token's effect is ``(u v - r (u^2 + v^2) / 2) / N`` in standardised ``u`` and ``v``.

    Source:
        Influence function of the correlation: Devlin, Gnanadesikan and Kettenring 1975.
    """
    n = total[:, _N]
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = total[:, _X] / n, total[:, _Y] / n
        xx, yy = total[:, _XX] / n - x * x, total[:, _YY] / n - y * y
        scale = 1 / np.sqrt(xx * yy)
        columns = [
            scale * x * y - r / 2 * (x * x / xx + y * y / yy),
            -scale * y + r * x / xx,
            -scale * x + r * y / yy,
            -r / 2 / xx,
            -r / 2 / yy,
            scale,
        ]
        return np.stack(columns, axis=1) / n[:, None]


def _correlation(total: Float64[np.ndarray, "replicate 6"]) -> Float64[np.ndarray, " replicate"]:
    """Pearson's r from sums; NaN where a variable is constant."""
    n, x, y, xx, yy, xy = total.T
    with np.errstate(divide="ignore", invalid="ignore"):
        varied = np.maximum(xx - x * x / n, 0) * np.maximum(yy - y * y / n, 0)
        return np.clip((xy - x * y / n) / np.sqrt(varied), -1, 1)
