"""Sparse coders: from a vector of the subject model to the few latents that fire on it."""

from autointerp_dagster.core.sparse_coders.inputs import InputNorm
from autointerp_dagster.core.sparse_coders.linear import Computing, LinearCoder, Precision
from autointerp_dagster.core.sparse_coders.neurons import NeuronCoder
from autointerp_dagster.core.sparse_coders.protocol import (
    PlacedCoder,
    SparseActivations,
    SparseCoder,
)
from autointerp_dagster.core.sparse_coders.rule import (
    Activation,
    Gated,
    GroupMax,
    ReLU,
    Threshold,
    TopK,
)
from autointerp_dagster.core.sparse_coders.unexplained import Unexplained

__all__ = [
    "Activation",
    "Computing",
    "Gated",
    "GroupMax",
    "InputNorm",
    "LinearCoder",
    "NeuronCoder",
    "PlacedCoder",
    "Precision",
    "ReLU",
    "SparseActivations",
    "SparseCoder",
    "Threshold",
    "TopK",
    "Unexplained",
]
