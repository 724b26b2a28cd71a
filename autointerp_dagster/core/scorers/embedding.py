"""Embedding: are activating windows nearer to the explanation than others, in a sentence embedder?

The score of a window is the cosine between its embedding and the explanation's; there is no
prediction and no probability.

Source:
    arXiv 2410.13928, section 3.2.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from autointerp_dagster.core.config import EmbeddingConfig
from autointerp_dagster.core.latent_records import LatentRecord, Window
from autointerp_dagster.core.schemas import MAIN_VARIANT
from autointerp_dagster.core.scorers.tasks import (
    ScoringTask,
    Verdict,
    judged_windows,
)
from autointerp_dagster.core.tokens import Detokenizer

VERSION = "1"


@runtime_checkable
class Embedder(Protocol):
    """A sentence embedder."""

    @property
    def identity(self) -> str:
        """Hash of its weights, or its name and revision."""
        ...

    @property
    def query_prefix(self) -> str:
        """Put before an explanation; empty for embedders without instructions."""
        ...

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "text dim"]:
        """One vector per text, in order, of any length; depends on the texts of the call alone."""
        ...


class EmbeddingInputs(NamedTuple):
    """What is embedded of a latent, whatever the explanation."""

    windows: tuple[Window, ...]
    """Activating windows by rank, then the others by rank."""
    texts: tuple[str, ...]
    """Their plain text, one each: neither escaped nor marked."""


def embedding_inputs(
    record: LatentRecord, config: EmbeddingConfig, detokenizer: Detokenizer
) -> EmbeddingInputs:
    """The chosen test windows and their texts; both empty where there are none."""
    activating, silent = judged_windows(record, config.n_examples)
    windows = (*activating, *silent)
    texts = tuple("".join(detokenizer.pieces(window.tokens)) for window in windows)
    return EmbeddingInputs(windows, texts)


def query_text(task: ScoringTask, query_prefix: str) -> str:
    """What is embedded of an explanation."""
    return query_prefix + task.text


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
    cosines = _cosines(query_vector.astype(np.float64), window_vectors.astype(np.float64))
    return [
        _verdict(task, window, None if np.isnan(cosine) else float(cosine))
        for window, cosine in zip(windows, cosines, strict=True)
    ]


def _cosines(query: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """NaN where either vector has no direction."""
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(query)
        cosines = np.einsum("wd,d->w", vectors, query) / lengths
    return np.where(np.isfinite(cosines), np.clip(cosines, -1, 1), np.nan)


def _verdict(task: ScoringTask, window: Window, cosine: float | None) -> Verdict:
    return Verdict(
        latent=task.latent,
        explainer=task.explainer,
        subject=task.subject,
        variant=MAIN_VARIANT,
        window_id=window.window_id,
        explanation_of=task.explanation_of,
        is_activating=window.is_activating,
        quantile=window.quantile,
        negative_kind=window.negative_kind,
        prediction=None,
        probability=None,
        score=cosine,
        status="ok" if cosine is not None else "failed",
        reason=None if cosine is not None else "no_vector",
        call_id=None,
    )
