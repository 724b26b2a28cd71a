"""Scoring many latents: jobs in, verdicts out, as the models answer."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from autointerp_dagster.core.config import AdaptiveConfig
from autointerp_dagster.core.llm import LLM, JournalBlock, Request
from autointerp_dagster.core.scorers.adaptive import PromptsOf, in_rounds
from autointerp_dagster.core.scorers.judging import LabelScorer, Prompt
from autointerp_dagster.core.scorers.planning import Job
from autointerp_dagster.core.scorers.tasks import ScoringTask, Verdict
from autointerp_dagster.core.tokens import Detokenizer
from autointerp_dagster.core.types import LatentId


def judge(
    scorer: LabelScorer,
    jobs: Iterable[Job],
    config: Any,
    detokenizer: Detokenizer,
    llm: LLM,
    block_of: Callable[[LatentId], JournalBlock],
    adaptive: AdaptiveConfig | None = None,
    confidence: float = 0.95,
) -> Iterator[Verdict]:
    """Every verdict of a scorer that asks a chat model, in the order of the answers.

    Jobs are drawn lazily and kept only until they are answered.

    Args:
        scorer: From ``LABEL_SCORERS``.
        jobs: Latents with the explanations to be tested.
        config: The scorer's own parameters.
        detokenizer: Of the subject model.
        llm: The judge.
        block_of: Where the calls of a latent are kept.
        adaptive: Ask each latent only until its score is sure enough (:mod:`.adaptive`); null: ask
            everything.
        confidence: Of the sequence that decides it; without ``adaptive`` of no effect.

    Raises:
        LLMError: If no model answers at all.
    """

    def prompts_of(job: Job, task: ScoringTask) -> list[Prompt]:
        block = block_of(job.record.latent)
        return scorer.prompts_of(job.record, task, config, detokenizer, block)

    if adaptive is None:
        yield from _all_at_once(scorer, jobs, prompts_of, llm)
    else:
        yield from in_rounds(scorer, jobs, prompts_of, llm, adaptive, confidence)


def _all_at_once(
    scorer: LabelScorer, jobs: Iterable[Job], prompts_of: PromptsOf, llm: LLM
) -> Iterator[Verdict]:
    asked: dict[int, tuple[ScoringTask, Prompt]] = {}

    def requests() -> Iterator[Request]:
        for job in jobs:
            for task in job.tasks:
                for prompt in prompts_of(job, task):
                    asked[id(prompt.request)] = (task, prompt)
                    yield prompt.request

    for request, completion in llm.answer(requests()):
        task, prompt = asked.pop(id(request))
        yield from scorer.verdicts_of(task, prompt, completion)
