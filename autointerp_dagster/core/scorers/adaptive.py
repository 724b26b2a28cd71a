"""Adaptive scoring: each latent is asked, prompt by prompt, until its score is sure enough.

1. Many latents are worked on together. Each latent's prompts have an order, the addressed shuffle
   of its scorer; in each round every latent is asked its next prompt, in the first ``min_prompts``.
2. A latent stops when its confidence sequence is narrow enough (:mod:`.stopping`), when it has no
   prompt left, or when a budget or deadline refuses one. With very unequal classes only the last
   two end it.
3. Then its floors, and its other variants, are asked the prompts of the same turns.

Whether a latent stops depends on its own answers alone, taken in turn: not on which latents are
worked on with it, on the order in which answers come, nor on an interruption.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress, islice
from typing import NamedTuple

import numpy as np

from autointerp_dagster.core.config import AdaptiveConfig
from autointerp_dagster.core.llm import LLM
from autointerp_dagster.core.schemas import MAIN_VARIANT, UNASKED
from autointerp_dagster.core.scorers.judging import LabelScorer, Prompt
from autointerp_dagster.core.scorers.planning import Job
from autointerp_dagster.core.scorers.stopping import (
    ClassWeights,
    balanced_limits,
    is_sure,
    prompt_mean,
)
from autointerp_dagster.core.scorers.tasks import ScoringTask, Verdict

PromptsOf = Callable[[Job, ScoringTask], list[Prompt]]
"""The prompts that test one explanation of a job."""

N_TOGETHER = 256
"""Explanations that are asked about in one round; one that stops makes room for the next."""


@dataclass(slots=True)
class _Series:
    """One explanation on its way: what was asked of it, and what that said."""

    job: Job
    task: ScoringTask
    prompts: Sequence[Prompt]
    """Of the main variant, by turn."""
    others: Sequence[Prompt]
    """Of other variants."""
    followers: Sequence[ScoringTask]
    """Floors, asked the same turns afterwards."""
    weights: ClassWeights | None
    """Null: nothing stops it, as a class is missing or the classes are too unequal."""
    n_asked: int = 0
    is_refused: bool = False
    """A budget or deadline came first."""
    means: dict[int, tuple[float, int]] = field(default_factory=dict)
    """By turn: the prompt's mean and its number of windows. A failed prompt is absent."""

    def next_prompts(self, adaptive: AdaptiveConfig) -> Sequence[Prompt]:
        """Those of the coming round."""
        first = self.n_asked
        self.n_asked = min(len(self.prompts), max(first + 1, adaptive.min_prompts))
        return self.prompts[first : self.n_asked]

    def take(self, prompt: Prompt, verdicts: Sequence[Verdict]) -> None:
        """Note what a prompt's verdicts say."""
        self.is_refused |= any(verdict.reason in UNASKED for verdict in verdicts)
        answered = [v for v in verdicts if v.status == "ok" and v.prediction is not None]
        if self.weights is None or not answered:
            return
        is_right = np.array([v.prediction == v.is_activating for v in answered])
        is_activating = np.array([v.is_activating for v in answered])
        mean = prompt_mean(is_right, is_activating, self.weights)
        self.means[prompt.turn] = (mean, len(answered))

    def is_over(self, adaptive: AdaptiveConfig, confidence: float) -> bool:
        """Whether nothing more is asked of it."""
        if self.is_refused or self.n_asked == len(self.prompts):
            return True
        if self.weights is None or not self.means:
            return False
        in_turn = np.array([self.means[turn] for turn in sorted(self.means)])
        limits = balanced_limits(in_turn[:, 0], in_turn[:, 1], self.weights, confidence)
        return is_sure(limits, adaptive.target_halfwidth)

    def remaining(self, prompts_of: PromptsOf) -> "Iterator[_Question]":
        """What is asked once it is over: other variants and floors, the same turns."""
        for prompt in self.others:
            if prompt.turn < self.n_asked:
                yield _Question(self.task, prompt)
        for task in self.followers:
            for prompt in prompts_of(self.job, task):
                if prompt.turn < self.n_asked:
                    yield _Question(task, prompt)


class _Question(NamedTuple):
    task: ScoringTask
    prompt: Prompt
    series: _Series | None = None
    """That goes on or ends by the answer; null for what follows one that has ended."""


def in_rounds(
    scorer: LabelScorer,
    jobs: Iterable[Job],
    prompts_of: PromptsOf,
    llm: LLM,
    adaptive: AdaptiveConfig,
    confidence: float,
    n_together: int = N_TOGETHER,
) -> Iterator[Verdict]:
    """Verdicts as their answers come; of each explanation, those of its first prompts.

    A failed prompt counts as asked and says nothing. Which prompts were asked is in ``turn``.

    Args:
        scorer: From ``LABEL_SCORERS``.
        jobs: Drawn as earlier ones stop.
        prompts_of: The scorer's prompts.
        llm: The judge.
        adaptive: When to stop.
        confidence: Of the sequence that decides it.
        n_together: Explanations asked about in one round; changes nothing but memory and speed.

    Raises:
        LLMError: If no model answers at all.
    """
    waiting = _series_of(jobs, prompts_of)
    active = list(islice(waiting, n_together))
    late: list[_Question] = []
    while active or late:
        questions = late + [
            _Question(series.task, prompt, series)
            for series in active
            for prompt in series.next_prompts(adaptive)
        ]
        for question, verdicts in _answered(questions, scorer, llm):
            if question.series is not None:
                question.series.take(question.prompt, verdicts)
            yield from verdicts
        is_over = [series.is_over(adaptive, confidence) for series in active]
        over = compress(active, is_over)
        late = [question for series in over for question in series.remaining(prompts_of)]
        active = [series for series, ends in zip(active, is_over, strict=True) if not ends]
        active += islice(waiting, n_together - len(active))


def _answered(
    questions: Sequence[_Question], scorer: LabelScorer, llm: LLM
) -> Iterator[tuple[_Question, list[Verdict]]]:
    by_request = {id(question.prompt.request): question for question in questions}
    for request, completion in llm.answer(question.prompt.request for question in questions):
        question = by_request[id(request)]
        yield question, scorer.verdicts_of(question.task, question.prompt, completion)


def _series_of(jobs: Iterable[Job], prompts_of: PromptsOf) -> Iterator[_Series]:
    """One series per explainer's own explanation, and per floor that has none to follow."""
    for job in jobs:
        leaders = {task.explainer: task for task in job.tasks if task.subject == "own"}
        for task in job.tasks:
            leader = leaders.get(task.explainer)
            if leader is not None and leader is not task:
                continue
            followers = [
                other
                for other in job.tasks
                if other is not task and leaders.get(other.explainer) is task
            ]
            yield _series(job, task, followers, prompts_of(job, task))


def _series(
    job: Job, task: ScoringTask, followers: Sequence[ScoringTask], prompts: Sequence[Prompt]
) -> _Series:
    main = [prompt for prompt in prompts if prompt.variant == MAIN_VARIANT]
    others = [prompt for prompt in prompts if prompt.variant != MAIN_VARIANT]
    truth = [shown.is_activating for prompt in main for shown in prompt.windows]
    weights = ClassWeights.of_counts(sum(truth), len(truth) - sum(truth))
    if weights is not None and not weights.may_stop:
        weights = None
    return _Series(job, task, main, others, followers, weights)
