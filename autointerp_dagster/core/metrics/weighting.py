"""Precision and F1 at the rate at which a latent fires in the corpus, not in the windows judged.

Half of the windows judged are activating; in the corpus few are. With a latent that fires in the
share r of all windows, sensitivity s and false-positive rate f (over ``random`` negatives only, the
one kind that stands for silent windows of the corpus), and k = (1 - r) / r:

    precision = 1 / (1 + k f / s)        F1 = 2 / (1 + (1 + k f) / s)

Both fall as one ratio of two rates rises, and their intervals are that ratio's.
"""

from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Float64, Int64

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.metrics.estimates import (
    Estimate,
    Part,
    Verdicts,
    answers_of,
    finished,
)
from autointerp_dagster.core.metrics.grouped import Answers, prompts_of
from autointerp_dagster.core.metrics.groups import groups_of, metric_rows
from autointerp_dagster.core.metrics.intervals import Interval, ratio_interval, wilson
from autointerp_dagster.core.schemas import MAIN_VARIANT


def weighted_rows(
    block: pl.DataFrame,
    window_firing_rates: pl.DataFrame,
    sampling: SamplingConfig | None,
    confidence: float,
) -> pl.DataFrame:
    """``precision_weighted`` and ``f1_weighted`` of every owner's main verdicts.

    With n negatives and no false positive the lower limit is what n windows can say (a
    false-positive rate of about 3.7 % at n = 100, whatever the judge): rare latents then have wide
    intervals, and a value of 1 means little.

    Under ``top`` or ``mix`` test sampling the windows judged are stronger than the latent's are, so
    recall is the mean over its quantiles, which hold equally many windows; it is a metric of its
    own, ``recall_weighted``, and enters the two. Within the first quantile ``mix`` still prefers
    the strongest. Where a quantile was not judged, as under ``top``, nothing can be said and all
    three are null (``undefined``).

    Under ``silent_scope: context`` the negatives come from wholly silent contexts, while silent
    windows of the corpus may stand near activating ones, where false positives are likelier. So
    ``precision_weighted`` and ``f1_weighted`` are null (``undefined``).

    Args:
        block: Verdicts of :func:`.groups.with_prompts`.
        window_firing_rates: ``latent`` and ``window_firing_rate`` (of all windows, in (0, 1]);
            a latent without one has null metrics, ``undefined``.
        sampling: How the test windows were drawn; None: as they come, and negatives anywhere.
        confidence: Two-sided.

    Returns:
        As :func:`.groups.metric_rows`.
    """
    is_fit = pl.col("is_activating") | (pl.col("negative_kind") == "random").fill_null(value=False)
    groups = groups_of(block.filter((pl.col("variant") == MAIN_VARIANT) & is_fit))
    rates = window_firing_rates.select("latent", "window_firing_rate")
    rate = groups.names.join(rates, on="latent", how="left", maintain_order="left")
    band, n_bands = np.zeros(groups.rows.height, dtype=np.int64), 1
    is_uneven = False
    if sampling is not None and sampling.strategy in ("top", "mix"):
        is_uneven = True
        band = groups.rows["quantile"].fill_null(0).cast(pl.Int64).to_numpy()
        n_bands = sampling.n_quantiles
    firing_rate = rate["window_firing_rate"].cast(pl.Float64).fill_null(float("nan")).to_numpy()
    if sampling is not None and sampling.silent_scope == "context":
        firing_rate = np.full(len(firing_rate), np.nan)
    judged = Judged(groups.verdicts, band, n_bands, firing_rate)
    estimates = weighted_estimates(judged, confidence)
    if not is_uneven:
        del estimates["recall_weighted"]
    parts = [metric_rows(groups.names, name, part) for name, part in estimates.items()]
    return pl.concat(parts)


class Judged(NamedTuple):
    """Activating and ``random`` non-activating windows of many groups."""

    verdicts: Verdicts
    """Failed ones included."""
    band: Int64[np.ndarray, " window"]
    """Quantile of an activating window; any number for the others."""
    n_bands: int
    """Quantiles there are, each with the same share of the latent's windows."""
    rate: Float64[np.ndarray, " group"]
    """Share of the corpus's windows that are activating; NaN where unknown."""


def weighted_estimates(judged: Judged, confidence: float) -> dict[str, Estimate]:
    """``recall_weighted``, ``precision_weighted`` and ``f1_weighted`` of every group.

    The rates' intervals are Wilson's at effective sizes that share one design effect, that of the
    log of the ratio f / s, so that errors which both classes share within a prompt count.

    Source:
        Intervals of ratios: Donner and Zou, MOVER-R (:func:`.intervals.ratio_interval`). Weighted
        proportions: Wilson at Kish's effective size (Kish 1965).
    """
    verdicts = judged.verdicts
    answered = verdicts.is_predicted
    answers, said = answers_of(verdicts, answered), verdicts.prediction[answered]
    n_activating = answers.count(answers.is_activating)
    n_silent = answers.count(~answers.is_activating)
    weight, is_whole = _weights(answers, judged.band[answered], judged.n_bands)
    truth = answers.is_activating
    rates = [_mean(answers, said & which, weight) for which in (truth, ~truth)]
    recall = np.where(is_whole & (n_activating > 0), rates[0], np.nan)
    false_rate = np.where(n_silent > 0, rates[1], np.nan)
    sizes = [_kish(answers, which, weight) for which in (truth, ~truth)]
    influences = [
        np.where(which, (said - rate[answers.group]) * weight, 0.0)
        for rate, which in zip(rates, (truth, ~truth), strict=True)
    ]
    alone = prompts_of(answers.among(truth), influences[0][truth]).share(confidence)
    both = prompts_of(answers, _log_ratio(answers, rates, sizes, influences)).share(confidence)
    sure = wilson(recall, sizes[0] * both, confidence)
    wrong = wilson(false_rate, sizes[1] * both, confidence)
    n = n_activating + n_silent
    recall_part = Part(recall, wilson(recall, sizes[0] * alone, confidence), n_activating)
    parts = _at_base_rate(judged.rate, (recall, sure), (false_rate, wrong), n)
    has_classes = (n_activating > 0) & (n_silent > 0)
    return {
        name: finished(part, verdicts, name, has_classes)
        for name, part in {"recall_weighted": recall_part, **parts}.items()
    }


def _at_base_rate(
    rate: Float64[np.ndarray, " group"],
    recall: tuple[Float64[np.ndarray, " group"], Interval],
    false_rate: tuple[Float64[np.ndarray, " group"], Interval],
    n: Float64[np.ndarray, " group"],
) -> dict[str, Part]:
    (s, s_limits), (f, f_limits) = recall, false_rate
    with np.errstate(divide="ignore", invalid="ignore"):
        k = np.where((rate > 0) & (rate <= 1), (1 - rate) / rate, np.nan)
        called, f1 = s / (s + k * f), 2 * s / (s + 1 + k * f)
    shifted = Interval(1 + k * f_limits.lo, 1 + k * f_limits.hi)
    scaled = Interval(k * f_limits.lo, k * f_limits.hi)
    to_precision = ratio_interval(k * f, scaled, s, s_limits)
    to_f1 = ratio_interval(1 + k * f, shifted, s, s_limits)
    return {
        "precision_weighted": Part(
            called,
            _within(Interval(1 / (1 + to_precision.hi), 1 / (1 + to_precision.lo)), called),
            n,
        ),
        "f1_weighted": Part(
            f1, _within(Interval(2 / (1 + to_f1.hi), np.minimum(2 / (1 + to_f1.lo), 1)), f1), n
        ),
    }


def _within(interval: Interval, value: Float64[np.ndarray, " group"]) -> Interval:
    """Limits that rounding does not carry over the value."""
    return Interval(np.minimum(interval.lo, value), np.maximum(interval.hi, value))


def _weights(
    answers: Answers, band: Int64[np.ndarray, " window"], n_bands: int
) -> tuple[Float64[np.ndarray, " window"], Bool[np.ndarray, " group"]]:
    """Weights that add up to 1 in each class, and whether every band has an answer."""
    n_bands = max(n_bands, int(band.max(initial=0)) + 1)
    truth = answers.is_activating
    cell = answers.group * n_bands + band
    in_cell = np.bincount(cell[truth], minlength=answers.n_groups * n_bands)
    is_whole = np.all(in_cell.reshape(-1, n_bands) > 0, axis=1)
    n_silent = answers.count(~truth)
    weight = np.empty(len(band))
    weight[truth] = 1 / n_bands / in_cell[cell[truth]]
    weight[~truth] = 1 / n_silent[answers.group[~truth]]
    return weight, is_whole


def _mean(
    answers: Answers,
    hit: Bool[np.ndarray, " window"],
    weight: Float64[np.ndarray, " window"],
) -> Float64[np.ndarray, " group"]:
    return np.clip(np.bincount(answers.group[hit], weight[hit], answers.n_groups), 0.0, 1.0)


def _kish(
    answers: Answers,
    which: Bool[np.ndarray, " window"],
    weight: Float64[np.ndarray, " window"],
) -> Float64[np.ndarray, " group"]:
    """Equally many equally weighing windows; 0 where there are none."""
    squares = np.bincount(answers.group[which], weight[which] ** 2, answers.n_groups)
    return np.where(squares > 0, 1 / np.where(squares > 0, squares, 1), 0.0)


def _log_ratio(
    answers: Answers,
    rates: list[Float64[np.ndarray, " group"]],
    sizes: list[Float64[np.ndarray, " group"]],
    influences: list[Float64[np.ndarray, " window"]],
) -> Float64[np.ndarray, " window"]:
    """Influence on log(f / s); rates are kept off 0 by half a window."""
    s, f = ((rate * n + 0.5) / (n + 1) for rate, n in zip(rates, sizes, strict=True))
    return influences[1] / f[answers.group] - influences[0] / s[answers.group]
