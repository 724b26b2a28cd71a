"""The embedding scorer with the embedded MiniLM: how much of its time is the model's.

Latents of a cell share many silent windows, and each has an explanation of its own and a floor's.
The scorer must embed each distinct text once, and do little else. The plain version is
``SentenceTransformer.encode`` over each latent's windows and queries, each distinct text once too:
the throughput to be kept while results become independent of what is embedded together.
"""

import time
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from autointerp_dagster.adapters.embedded import english_documents, minilm_dir
from autointerp_dagster.adapters.embedders import SentenceEmbedder
from autointerp_dagster.core.config import EmbedderConfig, EmbeddingConfig
from autointerp_dagster.core.latent_records import LatentRecord, Window
from autointerp_dagster.core.scorers import Job, ScoringTask, embedding
from autointerp_dagster.core.types import LatentId
from benchmarks.measure import Result, by_turns

N_LATENTS = 16
N_ACTIVATING = 20
N_SILENT = 20
N_POOL = 60
"""Silent windows that the latents draw theirs from."""
WORDS_PER_WINDOW = 24
SHARE_BAR = 0.95
THROUGHPUT_BAR = 1.0
"""Measured on CPU: 1.2 to 1.4."""


class _Words:
    """A detokenizer whose tokens are words of the corpus."""

    def __init__(self) -> None:
        documents = (document.text for document in islice(english_documents(), 60))
        self.words = " ".join(documents).split()

    def pieces(self, tokens: np.ndarray) -> list[str]:
        return [f" {self.words[token]}" for token in tokens]


class _Timed(SentenceEmbedder):
    """Knows the CPU time spent in the model."""

    encoder_s = 0.0

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        model = self._model
        plain = type(model).encode

        def encode(*given: object, **named: object) -> object:
            started = time.process_time()
            found = plain(model, *given, **named)  # type: ignore[arg-type]  # passed through
            self.encoder_s += time.process_time() - started
            return found

        model.encode = encode  # type: ignore[method-assign]  # of this object alone
        try:
            return super().embed(texts)
        finally:
            del model.encode


def run() -> list[Result]:
    """The encoder's share of the time, texts per distinct text, and throughput as a ratio."""
    torch.set_num_threads(1)
    detokenizer, config = _Words(), EmbedderConfig(source=str(minilm_dir()), device="cpu")
    jobs = list(_jobs(len(detokenizer.words)))
    texts = _texts(jobs, detokenizer, config.query_prefix)
    n_distinct = len({text for group in texts for text in group})
    SentenceEmbedder(config).embed(["warm"])
    model = SentenceTransformer(str(minilm_dir()), device="cpu", local_files_only=True)

    timed = _Timed(config)
    started = time.process_time()
    found = list(embedding.verdicts(jobs, EmbeddingConfig(), detokenizer, timed))
    share = timed.encoder_s / (time.process_time() - started)
    assert len(found) == 2 * N_LATENTS * (N_ACTIVATING + N_SILENT)

    def ours() -> None:
        list(embedding.verdicts(jobs, EmbeddingConfig(), detokenizer, SentenceEmbedder(config)))

    pair = by_turns(ours, lambda: _plain(model, texts), repeats=1)
    return [
        Result("embedding scorer: time in the encoder", share, SHARE_BAR, "of CPU seconds"),
        Result(
            "embedding scorer: texts embedded per distinct text",
            timed.n_embedded / n_distinct,
            1.0,
            "x",
            is_cost=True,
        ),
        Result(
            "embedding scorer against encode() per latent",
            pair.ratio,
            THROUGHPUT_BAR,
            "x texts/CPU-s",
        ),
    ]


def _jobs(n_words: int) -> Iterator[Job]:
    rng = np.random.default_rng(0)
    starts = rng.permutation((n_words - 2 * WORDS_PER_WINDOW) // WORDS_PER_WINDOW)
    pool, rest = starts[:N_POOL], iter(starts[N_POOL:])
    for index in range(N_LATENTS):
        latent = LatentId("sae", "layers.3", index)
        windows = [_window(int(next(rest)), rank, True) for rank in range(N_ACTIVATING)]
        drawn = rng.choice(pool, size=N_SILENT, replace=False)
        windows += [_window(int(place), rank, False) for rank, place in enumerate(drawn)]
        record = LatentRecord(latent, "ok", 1.0, (), (), tuple(windows))
        own = ScoringTask(latent, "default", "own", index, f"words that stand near number {index}")
        donor = (index + 1) % N_LATENTS
        text = f"words that stand near number {donor}"
        yield Job(record, (own, ScoringTask(latent, "default", "other", donor, text)))


def _window(place: int, rank: int, is_activating: bool) -> Window:
    first = place * WORDS_PER_WINDOW
    return Window(
        window_id=place << 16,
        context=place,
        start=0,
        split="test",
        is_activating=is_activating,
        negative_kind=None if is_activating else "random",
        quantile=0 if is_activating else None,
        rank=rank,
        tokens=np.arange(first, first + WORDS_PER_WINDOW, dtype=np.int32),
        activations=np.zeros(WORDS_PER_WINDOW, dtype=np.float32),
    )


def _texts(jobs: list[Job], detokenizer: _Words, prefix: str) -> list[list[str]]:
    groups = []
    for job in jobs:
        shown = embedding.embedding_inputs(job.record, EmbeddingConfig(), detokenizer)
        queries = [embedding.query_text(task, prefix) for task in job.tasks]
        groups.append([*shown.texts, *queries])
    return groups


def _plain(model: SentenceTransformer, groups: list[list[str]]) -> None:
    seen: set[str] = set()
    for group in groups:
        new = [text for text in dict.fromkeys(group) if text not in seen]
        seen.update(new)
        model.encode(new, batch_size=64, show_progress_bar=False)
