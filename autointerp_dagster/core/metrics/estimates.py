"""The metrics of many groups of verdicts: values, intervals and why a value is missing."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64, Shaped

from autointerp_dagster.core.metrics.grouped import (
    Answers,
    Prompts,
    prompts_of,
    ranking_of,
    ratio,
)
from autointerp_dagster.core.metrics.intervals import (
    Interval,
    auroc_interval,
    mover_mean,
    wilson,
)


class Verdicts(NamedTuple):
    """The verdicts of many groups as flat arrays, failed ones included."""

    group: Int64[np.ndarray, " window"]
    """In ``[0, n_groups)``."""
    prompt: Int64[np.ndarray, " window"]
    """Dense; windows of one group and one prompt share it."""
    is_activating: Bool[np.ndarray, " window"]
    """The class that the window truly has."""
    prediction: Bool[np.ndarray, " window"]
    """What the judge said; meaningless unless ``is_predicted``."""
    is_predicted: Bool[np.ndarray, " window"]
    """There is a prediction."""
    score: Float64[np.ndarray, " window"]
    """What windows are ranked by; NaN where there is none."""
    is_failed: Bool[np.ndarray, " window"]
    """The verdict failed."""
    is_unasked: Bool[np.ndarray, " window"]
    """It failed because the budget was spent."""
    n_groups: int
    """Groups there are."""


class Estimate(NamedTuple):
    """One metric of every group; NaN where there is no value, and ``status`` says why."""

    value: Float64[np.ndarray, " group"]
    """Of proportions in [0, 1]."""
    interval: Interval
    """Two-sided."""
    n: Float64[np.ndarray, " group"]
    """Answered verdicts behind the value."""
    n_failed: Float64[np.ndarray, " group"]
    """Failed verdicts among those that it would rest on."""
    status: Shaped[np.ndarray, " group"]
    """A ``MetricStatus``."""


def prediction_estimates(verdicts: Verdicts, confidence: float) -> dict[str, Estimate]:
    """Sensitivity, specificity, balanced accuracy, precision and F1 of every group.

    Precision and F1 are at the base rate of the windows judged. Precision rests on the windows
    called activating and is undefined if there is none; its ``n`` counts those. F1's interval is
    Wilson's of F* = TP / (TP + FP + FN), the share of hits among the windows that are or are called
    activating, carried over by F1 = 2 F* / (1 + F*).

    Source:
        F*: Hand, Christen and Kirielle, Machine Learning 110 (2021).
    """
    answered = verdicts.is_predicted
    answers = answers_of(verdicts, answered)
    said, truth = verdicts.prediction[answered], answers.is_activating
    n_activating, n_silent = answers.count(truth), answers.count(~truth)
    everywhere = np.ones(len(truth), dtype=bool)
    parts = {
        "sensitivity": _proportion(answers, said, truth, confidence),
        "specificity": _proportion(answers, ~said, ~truth, confidence),
        "precision": _proportion(answers, truth, said, confidence),
        "f1": _f1(_proportion(answers, truth & said, truth | said, confidence), answers),
        "balanced_accuracy": _balanced_accuracy(
            answers, said, _proportion(answers, said == truth, everywhere, confidence), confidence
        ),
    }
    has = {
        "sensitivity": n_activating > 0,
        "specificity": n_silent > 0,
    }
    both = (n_activating > 0) & (n_silent > 0)
    return {
        name: finished(part, verdicts, name, has.get(name, both)) for name, part in parts.items()
    }


def auroc_estimate(verdicts: Verdicts, confidence: float) -> Estimate:
    """Area under the ROC curve of every group, over the verdicts that have a score."""
    scored = ~np.isnan(verdicts.score)
    answers = answers_of(verdicts, scored)
    truth = answers.is_activating
    n_activating, n_silent = answers.count(truth), answers.count(~truth)
    ranking = ranking_of(answers, verdicts.score[scored])
    share = prompts_of(answers, ranking.influence).share(confidence)
    interval = auroc_interval(ranking.auroc, n_activating * share, n_silent * share, confidence)
    n = n_activating + n_silent
    both = (n_activating > 0) & (n_silent > 0)
    estimate = finished(Part(ranking.auroc, interval, n), verdicts, "auroc", both)
    total = np.bincount(verdicts.group[~verdicts.is_failed], minlength=verdicts.n_groups)
    status = np.where((n == 0) & (total > 0), "no_score", estimate.status)
    return estimate._replace(status=status)


class Part(NamedTuple):
    """An estimate before it is known which groups have what it needs."""

    value: Float64[np.ndarray, " group"]
    """NaN where it is undefined."""
    interval: Interval
    """Two-sided."""
    n: Float64[np.ndarray, " group"]
    """Answers behind it."""


def answers_of(verdicts: Verdicts, which: Bool[np.ndarray, " window"]) -> Answers:
    """The verdicts in ``which``, in their order."""
    every = Answers(verdicts.group, verdicts.prompt, verdicts.is_activating, verdicts.n_groups)
    return every.among(which)


def _proportion(
    answers: Answers,
    hit: Bool[np.ndarray, " window"],
    among: Bool[np.ndarray, " window"],
    confidence: float,
) -> Part:
    """Share of ``hit`` among the windows ``among``, with Wilson's interval over prompts."""
    inside = answers.among(among)
    value = ratio(answers.count(hit & among), answers.count(among))
    prompts = _prompts(inside, hit[among], value)
    return Part(value, wilson(value, prompts.n * prompts.share(confidence), confidence), prompts.n)


def _prompts(
    answers: Answers, hit: Bool[np.ndarray, " window"], value: Float64[np.ndarray, " group"]
) -> Prompts:
    n = answers.count(np.ones(len(hit), dtype=bool))
    return prompts_of(answers, (hit - value[answers.group]) / n[answers.group])


def _f1(hits: Part, answers: Answers) -> Part:
    lo, hi = (2 * limit / (1 + limit) for limit in hits.interval)
    n = answers.count(np.ones(len(answers.group), dtype=bool))
    return Part(2 * hits.value / (1 + hits.value), Interval(lo, hi), n)


def _balanced_accuracy(
    answers: Answers, said: Bool[np.ndarray, " window"], pooled: Part, confidence: float
) -> Part:
    """Mean of sensitivity and specificity.

    With as many answers of each class it is the share of right answers, whose Wilson interval it
    then has; else MOVER on the two rates' intervals, at sizes that share one design effect: that of
    the mean itself, so that errors which both classes share within a prompt count.
    """
    truth = answers.is_activating
    right = said == truth
    counts = [answers.count(truth), answers.count(~truth)]
    rates = [
        ratio(answers.count(right & which), n)
        for which, n in zip((truth, ~truth), counts, strict=True)
    ]
    own_rate = np.where(truth, rates[0][answers.group], rates[1][answers.group])
    own_n = np.where(truth, counts[0][answers.group], counts[1][answers.group])
    share = prompts_of(answers, (right - own_rate) / own_n / 2).share(confidence)
    intervals = [wilson(rate, n * share, confidence) for rate, n in zip(rates, counts, strict=True)]
    mover = mover_mean(rates[0], intervals[0], rates[1], intervals[1])
    is_even = counts[0] == counts[1]
    lo, hi = (
        np.where(is_even, even, uneven) for even, uneven in zip(pooled.interval, mover, strict=True)
    )
    return Part((rates[0] + rates[1]) / 2, Interval(lo, hi), pooled.n)


def finished(
    part: Part,
    verdicts: Verdicts,
    metric: str,
    has_classes: Bool[np.ndarray, " group"],
) -> Estimate:
    """The estimate with nulls where a class is missing, and the reason for every null.

    A class all of whose verdicts failed is not missing but ``failed``, or ``unasked`` if none was
    sent.

    Args:
        part: The estimate.
        verdicts: All it could rest on, failed ones included.
        metric: Its name; ``sensitivity`` and ``specificity`` concern one class only.
        has_classes: Where the classes that it needs were answered.
    """
    activating = verdicts.is_activating
    of_class = {"sensitivity": [activating], "specificity": [~activating]}
    classes = of_class.get(metric, [activating, ~activating])
    failed = np.sum([_count(verdicts, verdicts.is_failed & which) for which in classes], axis=0)
    lost, unasked = (
        np.sum([_lost(verdicts, which, among) for which in classes], axis=0)
        for among in (verdicts.is_failed, verdicts.is_unasked)
    )
    value = np.where(has_classes, part.value, np.nan)
    status = np.select(
        [~np.isnan(value), (lost > 0) & (unasked == lost), lost > 0, ~has_classes],
        ["ok", "unasked", "failed", "missing_class"],
        "undefined",
    )
    lo, hi = (np.where(np.isnan(value), np.nan, limit) for limit in part.interval)
    return Estimate(value, Interval(lo, hi), part.n, failed, status)


def _lost(
    verdicts: Verdicts, which: Bool[np.ndarray, " window"], among: Bool[np.ndarray, " window"]
) -> Float64[np.ndarray, " group"]:
    """How many of ``among`` there are in a class, where all of that class failed; else 0."""
    is_lost = _count(verdicts, which) == _count(verdicts, which & verdicts.is_failed)
    return np.where(is_lost, _count(verdicts, which & among), 0.0)


def _count(verdicts: Verdicts, which: Bool[np.ndarray, " window"]) -> Float64[np.ndarray, " group"]:
    return np.bincount(verdicts.group[which], minlength=verdicts.n_groups).astype(np.float64)
