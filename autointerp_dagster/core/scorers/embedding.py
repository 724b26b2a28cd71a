"""Embedding: are activating windows nearer to the explanation than others, in a sentence embedder?

The score of a window is the cosine between its embedding and the explanation's; there is no
prediction and no probability.

Source:
    arXiv 2410.13928, section 3.2.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from autointerp_dagster.core.config import EmbeddingConfig
from autointerp_dagster.core.highlight import EXPLANATION_CAP
from autointerp_dagster.core.latent_records import LatentRecord, Window
from autointerp_dagster.core.scorers.planning import Job
from autointerp_dagster.core.scorers.tasks import (
    ScoringTask,
    Verdict,
    judged_windows,
)
from autointerp_dagster.core.scorers.vectors import Embedder, cosines, in_calls, vectors_of
from autointerp_dagster.core.tokens import Detokenizer

VERSION = "3"


class EmbeddingInputs(NamedTuple):
    """What is embedded of a latent, whatever the explanation."""

    windows: tuple[Window, ...]
    """Activating windows by rank, then the others by rank."""
    texts: tuple[str, ...]
    """Their plain text, one each: neither escaped nor marked."""


def verdicts(
    jobs: Iterable[Job],
    config: EmbeddingConfig,
    detokenizer: Detokenizer,
    embedder: Embedder,
) -> Iterator[Verdict]:
    """Every verdict, in the order of the jobs: one per test window and explanation.

    Windows and explanations of a few latents are embedded by one call, each distinct text once.
    Jobs are drawn lazily.
    """
    for group in in_calls(jobs):
        inputs = [embedding_inputs(job.record, config, detokenizer) for job in group]
        queries = [
            query_text(task, embedder.query_prefix)
            for job, shown in zip(group, inputs, strict=True)
            for task in job.tasks
            if shown.windows
        ]
        texts = [text for shown in inputs for text in shown.texts]
        vector_of = vectors_of(embedder, [*queries, *texts])
        for job, shown in zip(group, inputs, strict=True):
            if not shown.windows:
                continue
            window_vectors = np.stack([vector_of[text] for text in shown.texts])
            for task in job.tasks:
                query = vector_of[query_text(task, embedder.query_prefix)]
                yield from verdicts_of(task, shown.windows, query, window_vectors)


def embedding_inputs(
    record: LatentRecord, config: EmbeddingConfig, detokenizer: Detokenizer
) -> EmbeddingInputs:
    """The chosen test windows and their texts; both empty where there are none."""
    activating, silent = judged_windows(record, config.n_examples)
    windows = (*activating, *silent)
    texts = tuple("".join(detokenizer.pieces(window.tokens)) for window in windows)
    return EmbeddingInputs(windows, texts)


def query_text(task: ScoringTask, query_prefix: str) -> str:
    """What is embedded of an explanation: no more characters than a judge sees, not escaped."""
    return query_prefix + task.text[:EXPLANATION_CAP]


def verdicts_of(
    task: ScoringTask,
    windows: Sequence[Window],
    query_vector: Float32[np.ndarray, " dim"],
    window_vectors: Float32[np.ndarray, "window dim"],
) -> list[Verdict]:
    """One verdict per window, in order, ranked by cosine in [-1, 1].

    A vector of length zero, or one that is not finite, has no direction: its window is failed with
    ``no_vector``, and all are if it is the explanation's.

    Raises:
        ValueError: If windows and vectors differ in number.
    """
    if len(windows) != len(window_vectors):
        raise ValueError(
            f"{task.latent}: {len(windows)} windows, {len(window_vectors)} vectors. Embed the "
            "texts of the same inputs."
        )
    found = cosines(query_vector, window_vectors)
    return [
        _verdict(task, window, None if np.isnan(cosine) else float(cosine))
        for window, cosine in zip(windows, found, strict=True)
    ]


def _verdict(task: ScoringTask, window: Window, cosine: float | None) -> Verdict:
    reason = "no_vector" if cosine is None else None
    return Verdict.of_window(task, window, reason=reason, score=cosine)
