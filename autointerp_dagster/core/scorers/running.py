"""Scoring many latents: jobs in, verdicts out, as the models answer."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from autointerp_dagster.core.config import EmbeddingConfig
from autointerp_dagster.core.llm import LLM, JournalBlock, Request
from autointerp_dagster.core.scorers import embedding
from autointerp_dagster.core.scorers.judging import LabelScorer, Prompt
from autointerp_dagster.core.scorers.planning import Job
from autointerp_dagster.core.scorers.tasks import ScoringTask, Verdict
from autointerp_dagster.core.tokens import Detokenizer
from autointerp_dagster.core.types import LatentId

LATENTS_PER_BATCH = 64
"""Latents whose texts are embedded together: bounds memory, whatever the cell's size."""


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
    """Every verdict of the embedding scorer, in the order of the jobs."""
    remaining = iter(jobs)
    while batch := list(islice(remaining, LATENTS_PER_BATCH)):
        yield from _rank_batch(batch, config, detokenizer, embedder)


def _rank_batch(
    jobs: Sequence[Job],
    config: EmbeddingConfig,
    detokenizer: Detokenizer,
    embedder: embedding.Embedder,
) -> Iterator[Verdict]:
    inputs = [embedding.embedding_inputs(job.record, config, detokenizer) for job in jobs]
    texts = {text: None for shown in inputs for text in shown.texts}
    for job in jobs:
        for task in job.tasks:
            texts[embedding.query_text(task, embedder.query_prefix)] = None
    row_of = {text: row for row, text in enumerate(texts)}
    vectors = embedder.embed(list(texts))
    for job, shown in zip(jobs, inputs, strict=True):
        windows = vectors[[row_of[text] for text in shown.texts]]
        for task in job.tasks:
            query = vectors[row_of[embedding.query_text(task, embedder.query_prefix)]]
            yield from embedding.verdicts_of(task, shown.windows, query, windows)
