"""Sentence embedders: texts to vectors, through sentence-transformers.

A vector depends on its text alone, not on what else is embedded, in which order, or by which call:

1. texts are grouped by their number of tokens, rounded up to a multiple of 16, and padded to it;
2. every batch of a group has the same shape: a short one is filled up with copies of its last text.

So a text meets the same kernels on the same shapes wherever it stands, and its bits are the same
(checked by a test; the machine, the number of threads and ``batch_size`` may still change the last
ones, about 1e-7). That makes vectors worth keeping: each distinct text is embedded once.
"""

import inspect
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property, lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32

from autointerp_dagster.adapters.model_files import folder_identity, resolve_folder
from autointerp_dagster.adapters.subject_models import choose_device
from autointerp_dagster.core.config import EmbedderConfig
from autointerp_dagster.core.errors import ModelError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CACHE_BYTES = 2**30
"""Vectors kept, at most: some 600,000 windows of a model with 384 dimensions."""

LENGTH_STEP = 16
"""Texts are padded to a multiple of so many tokens."""

USUAL_LENGTH = 32
"""Tokens of a text for which ``batch_size`` holds; of longer ones a batch holds fewer."""

_COUNTED_AT_ONCE = 1024
_BYTES_PER_ENTRY = 300  # key, array header and the dict's own
_loading = threading.Lock()

Vector = Float32[np.ndarray, " d_embed"]


class VectorCache:
    """Vectors by text, the least recently used dropped beyond a number of bytes."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._vectors: OrderedDict[bytes, Vector] = OrderedDict()
        self._n_bytes = 0

    @property
    def n_bytes(self) -> int:
        """Memory taken, about."""
        return self._n_bytes

    def find(self, text: str) -> Vector | None:
        """The vector of a text, which becomes the most recently used."""
        key = _digest(text)
        vector = self._vectors.get(key)
        if vector is not None:
            self._vectors.move_to_end(key)
        return vector

    def keep(self, text: str, vector: Vector) -> None:
        """Keep the vector of a text that is not yet kept."""
        self._vectors[_digest(text)] = vector
        self._n_bytes += vector.nbytes + _BYTES_PER_ENTRY
        while self._n_bytes > self._capacity:
            _, dropped = self._vectors.popitem(last=False)
            self._n_bytes -= dropped.nbytes + _BYTES_PER_ENTRY


class SentenceEmbedder:
    """Vectors of texts. The model is loaded at the first text, once per process."""

    def __init__(self, config: EmbedderConfig, cache_bytes: int = CACHE_BYTES) -> None:
        self._config = config
        self._kept = VectorCache(cache_bytes)
        self._n_embedded = 0
        self._working = threading.Lock()

    @property
    def query_prefix(self) -> str:
        """What stands before a query, such as an explanation; texts searched through have none."""
        return self._config.query_prefix

    @property
    def identity(self) -> str:
        """Hash over the weights and configuration files; reads them. The prefix is not in it."""
        return folder_identity(self._folder)

    @property
    def n_embedded(self) -> int:
        """Texts that went through the model since this object was made, without filling."""
        return self._n_embedded

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "text d_embed"]:
        """One vector per text, in the order given; not normalised beyond what the model does.

        Texts are embedded as they are: a prompt that the model's own configuration would put before
        them is not. Each distinct text is embedded once as long as its vector is kept.
        """
        with self._working:
            wanted = sorted(set(texts) or {"a"})
            found = {
                text: vector for text in wanted if (vector := self._kept.find(text)) is not None
            }
            missing = [text for text in wanted if text not in found]
            for text, vector in self._embedded(missing):
                found[text] = vector
                self._kept.keep(text, vector)
            n_dims = found[wanted[0]].size
            rows = [found[text] for text in texts]
        return np.stack(rows) if rows else np.zeros((0, n_dims), dtype=np.float32)

    def _embedded(self, texts: Sequence[str]) -> Iterator[tuple[str, Vector]]:
        for length, group in sorted(_by_length(self._model, texts).items()):
            tokens = self._config.batch_size * USUAL_LENGTH
            n_rows = max(1, tokens // (length or USUAL_LENGTH))
            for start in range(0, len(group), n_rows):
                batch = group[start : start + n_rows]
                vectors = _encoded(self._model, batch, n_rows, length)
                self._n_embedded += len(batch)
                yield from zip(batch, vectors, strict=True)

    @cached_property
    def _folder(self) -> Path:
        return resolve_folder(self._config.source, self._config.revision)

    @property
    def _model(self) -> "SentenceTransformer":
        with _loading:
            return _load(self._folder, choose_device(self._config.device))


@cache
def open_embedder(config: EmbedderConfig) -> SentenceEmbedder:
    """The embedder that a study names, with the vectors kept so far; nothing is read yet.

    Raises:
        ModelError: At the first use, if it cannot be had or loaded.
    """
    return SentenceEmbedder(config)


def _by_length(
    model: "SentenceTransformer", texts: Sequence[str]
) -> Mapping[int | None, list[str]]:
    """The texts by the length they are padded to; null for a model without a text tokenizer.

    The longest length there is is the model's own limit, beyond which texts are cut.
    """
    if not texts:
        return {}
    first: Any = model[0]
    if "processing_kwargs" not in inspect.signature(first.preprocess).parameters:
        return {None: list(texts)}
    limit = model.max_seq_length
    groups: dict[int | None, list[str]] = {}
    for start in range(0, len(texts), _COUNTED_AT_ONCE):
        counted = texts[start : start + _COUNTED_AT_ONCE]
        mask = model.preprocess(list(counted), prompt="").get("attention_mask")
        if mask is None:
            return {None: list(texts)}
        for text, n_tokens in zip(counted, mask.sum(dim=1).tolist(), strict=True):
            length = max(-(-n_tokens // LENGTH_STEP), 1) * LENGTH_STEP
            groups.setdefault(length if limit is None else min(length, limit), []).append(text)
    return groups


def _encoded(
    model: "SentenceTransformer", batch: Sequence[str], n_rows: int, length: int | None
) -> list[Vector]:
    """The vectors of a batch, run as ``n_rows`` texts of ``length`` tokens.

    An empty prompt is not none: none would let the model's ``default_prompt_name`` act.
    """
    rows = [*batch, *[batch[-1]] * (n_rows - len(batch))]
    padding = {"text": {"padding": "max_length", "max_length": length}}
    shape: Any = {} if length is None else {"processing_kwargs": padding}
    vectors = model.encode(
        rows,
        prompt="",
        batch_size=n_rows,
        convert_to_numpy=True,
        show_progress_bar=False,
        **shape,
    )
    return [np.array(vector, dtype=np.float32) for vector in vectors[: len(batch)]]


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


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
