"""Sparse coders: from a vector of the subject model to the few latents that fire on it."""

from autointerp_dagster.core.sparse_coders.coders import Computing, JumpReLUCoder, TopKCoder
from autointerp_dagster.core.sparse_coders.protocol import (
    PlacedCoder,
    SparseActivations,
    SparseCoder,
)

__all__ = [
    "Computing",
    "JumpReLUCoder",
    "PlacedCoder",
    "SparseActivations",
    "SparseCoder",
    "TopKCoder",
]
