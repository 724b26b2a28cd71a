"""When a latent has been asked enough: a confidence sequence of its balanced accuracy.

1. Each answered prompt gives one number in [0, 1] (:func:`prompt_mean`). Windows of one prompt err
   together, so prompts, not windows, are the units.
2. Against every accuracy on a grid a gambler bets that it is too low, another that it is too high.
   Where one of them has won ``2 / (1 - confidence)`` times the stake, that accuracy is refuted for
   good (:func:`confidence_sequence`). The chance that the truth is ever refuted is at most
   ``1 - confidence``, whenever one looks and whatever made one stop.
3. A latent stops when what is left is narrow enough (:func:`is_sure`).

The estimand is the latent's accuracy under the judge, on windows drawn like its test windows: the
estimand of the intervals of fixed scoring, which a reader compares. The share of right answers
among just the test windows there are would be surer, as they run out, but no statement about the
latent. Prompts take windows without replacement, classes included, which makes their means vary a
little less than independent ones; the sequence does not profit from it.

Source:
    Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86
    (2024): the hedged capital process, with the predictable plug-in bets for a fixed number of
    observations. There the prior of the variance counts as here, one observation of variance 1/4.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

BET_HORIZON = 36
"""Prompts that the bets are sized for. Decides how fast the sequence narrows where, not whether it
is valid. At a target of .18 and five windows in a prompt, 36 asks 39-45 % of 100 + 100 windows over
mean accuracies .65-.8 (errors within a prompt correlating by .1), with a rank correlation of .955
with fixed scores. Sized for 20, latents stop at 38 % and that falls to .945."""

LARGEST_BET = 0.9
"""Share of its capital that a gambler may lose in one round."""

LARGEST_WEIGHT = 1.5
"""Largest weight of a class at which latents are stopped, that of classes as one to two. A sequence
widens by it: with 20 and 100 windows that never stopped it was 2.7 times as wide as an interval for
a fixed number. Such latents are asked everything instead, and have ordinary intervals."""

_GRID = 500
"""Steps between 0 and 1; limits are rounded away from the estimate, by at most one."""

_PRIOR_MEAN, _PRIOR_VARIANCE = 0.5, 0.25
"""Of one prompt's mean, counted as one prompt seen before the first."""


class Limits(NamedTuple):
    """Both ends of an interval within [0, 1]."""

    lo: float
    """Lower limit."""
    hi: float
    """Upper limit, >= ``lo``."""


class ClassWeights(NamedTuple):
    """What a window of each class counts, so that a mean over windows is balanced."""

    activating: float
    """Inverse of the class's share of all windows that would be shown, halved; > 0."""
    silent: float
    """The same of the other class."""

    @classmethod
    def of_counts(cls, n_activating: int, n_silent: int) -> "ClassWeights | None":
        """The weights where so many windows of each class would be shown if nothing stopped it.

        They are known before the first answer, so they may be used in a sequence. Null where a
        class is missing: there is no balanced accuracy then.
        """
        if not n_activating or not n_silent:
            return None
        n = n_activating + n_silent
        return cls(n / n_activating / 2, n / n_silent / 2)

    @property
    def largest(self) -> float:
        """>= 1; 1 where the classes are equal. A sequence is so many times as wide."""
        return max(self)

    @property
    def may_stop(self) -> bool:
        """Whether a sequence of such a latent can be narrow before its windows run out."""
        return self.largest <= LARGEST_WEIGHT


def prompt_mean(
    is_right: Bool[np.ndarray, " window"],
    is_activating: Bool[np.ndarray, " window"],
    weights: ClassWeights,
) -> float:
    """What one answered prompt says of the balanced accuracy, on a scale from 0 to 1.

    With w the weight of a window's class and W the larger weight:
    ``1/2 + mean(w (right - 1/2)) / W``. Over prompts of shuffled windows its expectation is
    ``1/2 + (balanced accuracy - 1/2) / W``; with equal classes it is the share of right answers.

    Args:
        is_right: Whether the answer was; at least one window.
        is_activating: Class of each window.
        weights: Of the classes.
    """
    # From counts, so that the order of the windows cannot change the last bit.
    activating = 2 * int((is_right & is_activating).sum()) - int(is_activating.sum())
    silent = 2 * int((is_right & ~is_activating).sum()) - int((~is_activating).sum())
    total = weights.activating * activating + weights.silent * silent
    return 0.5 + total / (2 * len(is_right) * weights.largest)


def balanced_limits(
    means: Float64[np.ndarray, " prompt"],
    sizes: Float64[np.ndarray, " prompt"],
    weights: ClassWeights,
    confidence: float,
) -> Limits:
    """Limits of the balanced accuracy from the :func:`prompt_mean` of each prompt, in turn.

    Args:
        means: In the order in which the prompts were asked; failed prompts left out.
        sizes: Windows of each.
        weights: Those of the means.
        confidence: In (0, 1).
    """
    scaled = confidence_sequence(means, confidence, sizes)
    lo, hi = (0.5 + weights.largest * (limit - 0.5) for limit in scaled)
    return Limits(min(max(lo, 0.0), 1.0), min(max(hi, 0.0), 1.0))


def confidence_sequence(
    means: Float64[np.ndarray, " prompt"],
    confidence: float,
    sizes: Float64[np.ndarray, " prompt"] | None = None,
) -> Limits:
    """Limits of the mean after the last of these prompts: all that was not refuted at any of them.

    Limits of a longer series lie within those of its beginning.

    Args:
        means: Each in [0, 1], in the order of the prompts. None: the limits are 0 and 1.
        confidence: In (0, 1).
        sizes: Windows of each prompt; bets on a shorter one are smaller, as its mean varies more.
            None: all alike.

    Returns:
        Both limits in [0, 1]. Should all be refuted, which has a chance below 1 - confidence, the
        middle of the limits stands for both.

    Raises:
        ValueError: If a mean is not in [0, 1].

    Source:
        See the module. The bet is ``sqrt(2 log(2 / alpha) / (v n))`` with n = ``BET_HORIZON`` and v
        the variance of the means before, at most ``LARGEST_BET`` of what can be lost at once.
    """
    if not np.all((means >= 0) & (means <= 1)):
        raise ValueError(f"confidence_sequence: got means {means}, wanted all in [0, 1].")
    shares = np.ones(len(means)) if sizes is None else sizes / sizes.max(initial=1.0)
    alpha = 1 - confidence
    lo = _lower_limit(means, shares, alpha)
    hi = 1 - _lower_limit(1 - means, shares, alpha)
    return Limits(lo, hi) if lo <= hi else Limits((lo + hi) / 2, (lo + hi) / 2)


def is_sure(limits: Limits, target_halfwidth: float) -> bool:
    """Whether an interval is at most twice as wide as its target half-width."""
    return limits.hi - limits.lo <= 2 * target_halfwidth


def _lower_limit(
    means: Float64[np.ndarray, " prompt"], shares: Float64[np.ndarray, " prompt"], alpha: float
) -> float:
    """The largest value on the grid that is refuted as too low, at any prompt; 0 if none is.

    The capital falls as the value rises, so all below it is refuted too.
    """
    values = np.arange(1, _GRID) / _GRID
    bets = np.minimum(_bets(means, shares, alpha)[:, None], LARGEST_BET / values)
    gains = np.log1p(shares[:, None] * bets * (means[:, None] - values))
    refuted = (np.cumsum(gains, axis=0) >= np.log(2 / alpha)).any(axis=0)
    return float(values[refuted].max(initial=0.0))


def _bets(
    means: Float64[np.ndarray, " prompt"], shares: Float64[np.ndarray, " prompt"], alpha: float
) -> Float64[np.ndarray, " prompt"]:
    """Each prompt's bet, from the prompts before it alone."""
    n = np.arange(1, len(means) + 1)
    mean = (_PRIOR_MEAN + np.cumsum(shares * means)) / (1 + np.cumsum(shares))
    spread = _PRIOR_VARIANCE + np.cumsum(shares * (means - mean) ** 2)
    variance = np.concatenate([[_PRIOR_VARIANCE], spread / (1 + n)])[: len(means)]
    return np.sqrt(2 * np.log(2 / alpha) / (variance * BET_HORIZON))
