"""Statistics of many groups of answers at once, as flat arrays.

A *group* is what one metric row is about (a latent, an explainer, a slice of its windows). Every
window carries the number of its group and of its prompt. Sums are taken with ``bincount``: a cell
has millions of answers in hundreds of thousands of groups, and no Python loop runs over either.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from autointerp_dagster.core.metrics.intervals import effective_size


@dataclass(frozen=True, slots=True)
class Answers:
    """Windows with an answer, in any order."""

    group: Int64[np.ndarray, " window"]
    """In ``[0, n_groups)``."""
    prompt: Int64[np.ndarray, " window"]
    """Equal for windows of one group that were judged in one prompt; dense, never shared by two
    groups."""
    is_activating: Bool[np.ndarray, " window"]
    """The class that the window truly has."""
    n_groups: int
    """Groups there are, also those without answers."""

    def count(self, which: Bool[np.ndarray, " window"]) -> Float64[np.ndarray, " group"]:
        """How many of ``which`` each group has."""
        return np.bincount(self.group[which], minlength=self.n_groups).astype(np.float64)

    def among(self, which: Bool[np.ndarray, " window"]) -> "Answers":
        """Only the windows in ``which``."""
        return Answers(
            self.group[which], self.prompt[which], self.is_activating[which], self.n_groups
        )


class Prompts(NamedTuple):
    """How the answers of each group lie in prompts."""

    n: Float64[np.ndarray, " group"]
    """Answers."""
    n_prompts: Float64[np.ndarray, " group"]
    """Prompts with at least one of them."""
    design_effect: Float64[np.ndarray, " group"]
    """NaN where it cannot be estimated."""
    max_design_effect: Float64[np.ndarray, " group"]
    """If the answers of each prompt were all one answer."""

    def share(self, confidence: float) -> Float64[np.ndarray, " group"]:
        """Effective over nominal size, in (0, 1]; 1 where there are no answers."""
        size = effective_size(
            self.n, self.design_effect, self.n_prompts, self.max_design_effect, confidence
        )
        return np.where(self.n > 0, size / np.maximum(self.n, 1), 1.0)


def prompts_of(answers: Answers, influence: Float64[np.ndarray, " window"]) -> Prompts:
    """Design effect of an estimate, from each answer's influence on it.

    The variance of the estimate is that of the prompts' sums of influences (ratio estimator:
    prompts are drawn, and may differ in size), against the sum of squares that independent answers
    would have.

    Args:
        answers: The windows that the estimate rests on.
        influence: First-order change of the estimate per window, summing to 0 in a group; e.g.
            ``(x - p) / n`` for a proportion.

    Source:
        Cochran, Sampling Techniques (1977), section 6; Rao and Scott 1992 for effective sizes.
    """
    n_prompts_all = int(answers.prompt.max(initial=-1)) + 1
    sums = np.bincount(answers.prompt, influence, n_prompts_all)
    sizes = np.bincount(answers.prompt, minlength=n_prompts_all).astype(np.float64)
    group_of = np.zeros(n_prompts_all, dtype=np.int64)
    group_of[answers.prompt] = answers.group
    n_groups, used = answers.n_groups, sizes > 0
    n_prompts = np.bincount(group_of[used], minlength=n_groups).astype(np.float64)
    n = np.bincount(answers.group, minlength=n_groups).astype(np.float64)
    clustered = np.bincount(group_of[used], sums[used] ** 2, n_groups)
    independent = np.bincount(answers.group, influence**2, n_groups)
    with np.errstate(divide="ignore", invalid="ignore"):
        effect = clustered * n_prompts / (n_prompts - 1) / independent
        largest = np.bincount(group_of[used], sizes[used] ** 2, n_groups) / n
    # Influences of a group without errors are rounding, not information.
    known = (n_prompts > 1) & (independent > 1e-20)
    return Prompts(n, n_prompts, np.where(known, effect, np.nan), np.where(n > 0, largest, 1.0))


def ratio(
    top: Float64[np.ndarray, " group"], bottom: Float64[np.ndarray, " group"]
) -> Float64[np.ndarray, " group"]:
    """``top / bottom``, NaN where ``bottom`` is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(bottom > 0, top / bottom, np.nan)


class Ranking(NamedTuple):
    """Areas under the ROC curve, and what each window did to them."""

    auroc: Float64[np.ndarray, " group"]
    """Chance that an activating window ranks above a silent one, ties half; NaN if a class is
    missing."""
    influence: Float64[np.ndarray, " window"]
    """First-order change of the area per window; 0 in groups without an area."""


def ranking_of(answers: Answers, score: Float64[np.ndarray, " window"]) -> Ranking:
    """Area under the ROC curve of each group from the ranks of its scores.

    Args:
        answers: Windows with a score.
        score: Finite; higher means "activating".

    Source:
        Mann-Whitney statistic from mid-ranks; influences are DeLong's structural components
        (DeLong 1988), summed over prompts as in Obuchowski 1997.
    """
    # A window's placement: the share of the other class that ranks below it, ties half.
    below = _mid_ranks(answers.group, score)
    for is_activating in (True, False):
        own = answers.is_activating == is_activating
        below[own] -= _mid_ranks(answers.group[own], score[own])
    n_activating = answers.count(answers.is_activating)
    n_silent = answers.count(~answers.is_activating)
    n_own = np.where(answers.is_activating, n_activating[answers.group], n_silent[answers.group])
    n_other = np.where(answers.is_activating, n_silent[answers.group], n_activating[answers.group])
    placement = below / np.maximum(n_other, 1)
    rises = np.where(answers.is_activating, placement, 1 - placement)
    which = answers.is_activating
    total = np.bincount(answers.group[which], rises[which], answers.n_groups)
    auroc = ratio(np.where(n_silent > 0, total, np.nan), n_activating)
    mean = auroc[answers.group]
    return Ranking(auroc, np.where(np.isnan(mean), 0.0, (rises - mean) / n_own))


def _mid_ranks(
    group: Int64[np.ndarray, " window"], score: Float64[np.ndarray, " window"]
) -> Float64[np.ndarray, " window"]:
    """Rank of each window within its group, from 1, ties sharing their mean rank."""
    if not len(group):
        return np.zeros(0)
    order = np.lexsort((score, group))
    group, score = group[order], score[order]
    new_group = np.r_[True, group[1:] != group[:-1]]
    new_run = new_group | np.r_[True, score[1:] != score[:-1]]
    run_start = np.flatnonzero(new_run)
    run_length = np.diff(np.r_[run_start, len(group)])
    group_start = np.flatnonzero(new_group)[np.cumsum(new_group) - 1]
    run = np.cumsum(new_run) - 1
    ranks = np.empty(len(group))
    ranks[order] = run_start[run] + (run_length[run] + 1) / 2 - group_start
    return ranks
