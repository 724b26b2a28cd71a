"""What embedding and example_embedding share: the embedder, its vectors by text, their cosines."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Float64

from autointerp_dagster.core.scorers.planning import Job

JOBS_PER_CALL = 16
"""Latents whose texts are embedded by one call: enough to fill batches, few enough to keep."""


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
        """One vector per text, in order, of any length.

        A text's vector depends on the text alone, not on the call's others: scores would depend on
        the order of the work otherwise.
        """
        ...


def vectors_of(embedder: Embedder, texts: Iterable[str]) -> dict[str, Float32[np.ndarray, " dim"]]:
    """The vector of each distinct text; without texts the embedder is not asked."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    return dict(zip(distinct, embedder.embed(distinct), strict=True))


def in_calls(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """The jobs in groups that share a call, drawn lazily."""
    remaining = iter(jobs)
    while group := list(islice(remaining, JOBS_PER_CALL)):
        yield group


def cosines(
    query: Float32[np.ndarray, " dim"], vectors: Float32[np.ndarray, "window dim"]
) -> Float64[np.ndarray, " window"]:
    """Cosine of each vector with the query, in [-1, 1]; NaN where either has no direction."""
    wide, asked = vectors.astype(np.float64), query.astype(np.float64)
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(wide, axis=1) * np.linalg.norm(asked)
        found = np.einsum("wd,d->w", wide, asked) / lengths
    return np.where(np.isfinite(found), np.clip(found, -1, 1), np.nan)
