"""Sentence embedders: texts to vectors, through sentence-transformers."""

import threading
from collections.abc import Sequence
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32

from autointerp_dagster.adapters.subject_models import (
    choose_device,
    folder_identity,
    resolve_folder,
)
from autointerp_dagster.core.config import EmbedderConfig
from autointerp_dagster.core.errors import ModelError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_loading = threading.Lock()


class SentenceEmbedder:
    """Vectors of texts. The model is loaded at the first text, once per process."""

    def __init__(self, config: EmbedderConfig) -> None:
        self._config = config

    @property
    def query_prefix(self) -> str:
        """What stands before a query, such as an explanation; texts searched through have none."""
        return self._config.query_prefix

    @property
    def identity(self) -> str:
        """Hash over the weights and configuration files; reads them. The prefix is not in it."""
        return folder_identity(self._folder)

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "text d_embed"]:
        """One vector per text, in the order given; not normalised beyond what the model does.

        Each distinct text is embedded once. Batches are made of texts sorted by length, so the
        order given changes nothing; other texts in the call may, by rounding (about 1e-6).
        """
        model = self._model
        distinct = sorted(set(texts) or {"a"}, key=lambda text: (len(text), text))
        vectors = model.encode(
            distinct,
            batch_size=self._config.batch_size,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        row_of = {text: row for row, text in enumerate(distinct)}
        return np.asarray(vectors, dtype=np.float32)[[row_of[text] for text in texts]]

    @cached_property
    def _folder(self) -> Path:
        return resolve_folder(self._config.source, self._config.revision)

    @property
    def _model(self) -> "SentenceTransformer":
        with _loading:
            return _load(self._folder, choose_device(self._config.device))


@cache
def open_embedder(config: EmbedderConfig) -> SentenceEmbedder:
    """The embedder that a study names; nothing is read yet.

    Raises:
        ModelError: At the first use, if it cannot be had or loaded.
    """
    return SentenceEmbedder(config)


@lru_cache(maxsize=2)
def _load(folder: Path, device: str) -> "SentenceTransformer":
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(str(folder), device=device, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"embedder {folder}: cannot be loaded ({type(error).__name__}: {error}). "
            "Wanted a folder that sentence-transformers reads, with safetensors weights."
        ) from error
