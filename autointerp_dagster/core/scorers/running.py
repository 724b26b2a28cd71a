"""Scoring many latents: jobs in, verdicts out, as the models answer."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from autointerp_dagster.core.config import EmbeddingConfig
from autointerp_dagster.core.llm import LLM, JournalBlock, Request
from autointerp_dagster.core.scorers import embedding
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

    Raises:
        LLMError: If no model answers at all.
    """
    asked: dict[int, tuple[ScoringTask, Prompt]] = {}

    def requests() -> Iterator[Request]:
        for job in jobs:
            block = block_of(job.record.latent)
            for task in job.tasks:
                for prompt in scorer.prompts_of(job.record, task, config, detokenizer, block):
                    asked[id(prompt.request)] = (task, prompt)
                    yield prompt.request

    for request, completion in llm.answer(requests()):
        task, prompt = asked.pop(id(request))
        yield from scorer.verdicts_of(task, prompt, completion)


def rank(
    jobs: Iterable[Job],
    config: EmbeddingConfig,
    detokenizer: Detokenizer,
    embedder: embedding.Embedder,
) -> Iterator[Verdict]:
    """Every verdict of the embedding scorer, in the order of the jobs.

    A latent's windows are one unit and each explanation another, because an embedder's last bits
    depend on what it embeds together: so verdicts do not depend on other latents, on ranges, or on
    which other explanations are tested.
    """
    for job in jobs:
        inputs = embedding.embedding_inputs(job.record, config, detokenizer)
        windows = embedder.embed(inputs.texts)
        for task in job.tasks:
            (query,) = embedder.embed([embedding.query_text(task, embedder.query_prefix)])
            yield from embedding.verdicts_of(task, inputs.windows, query, windows)
