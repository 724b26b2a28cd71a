"""What every stage may ask of a sparse coder, and what it is given."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

_ROW_ELEMENTS = 1 << 22
"""Numbers in the rows that are gathered at once."""


class SparseActivations(NamedTuple):
    """What fires, one entry per pair of token and latent; a token may have none."""

    token: Int64[Tensor, " nnz"]
    """Row of the input, ascending."""
    latent: Int64[Tensor, " nnz"]
    """Distinct within a token, in no particular order there."""
    value: Float32[Tensor, " nnz"]
    """Raw coder units, > 0."""


@runtime_checkable
class SparseCoder(Protocol):
    """What every stage may ask of a sparse coder."""

    @property
    def num_latents(self) -> int:
        """Number of latents."""
        ...

    @property
    def d_in(self) -> int:
        """Width of the vectors that are encoded."""
        ...

    @property
    def d_out(self) -> int:
        """Width of the vectors that are decoded."""
        ...

    def encode(self, x: Float[Tensor, "token d_in"]) -> SparseActivations:
        """The non-zero activations of each token; never a dense [token, num_latents] tensor."""
        ...

    def encode_dense(self, x: Float[Tensor, "token d_in"]) -> Float32[Tensor, "token num_latents"]:
        """All activations, zeros included, the plain way: for tests and a few tokens only."""
        ...

    def decode(
        self, found: SparseActivations, x: Float[Tensor, "token d_in"]
    ) -> Float32[Tensor, "token d_out"]:
        """The output for activations that were found for ``x``, in units of the raw output."""
        ...

    def describe(self) -> dict[str, object]:
        """How this coder computes where it is, to be recorded with what it gave."""
        ...

    def encoder_rows(self, latents: Sequence[int]) -> Float32[Tensor, "latent d_in"]:
        """Direction that each latent reads from the input, in the order asked for."""
        ...

    def decoder_rows(self, latents: Sequence[int]) -> Float32[Tensor, "latent d_out"]:
        """Direction that each latent adds to the raw output, in the order asked for."""
        ...

    def to(self, device: torch.device) -> "SparseCoder":
        """The same coder, encoding on another device."""
        ...


class PlacedCoder(NamedTuple):
    """A sparse coder with its place in the subject model."""

    coder: SparseCoder
    reads: str
    """Hookpoint that is encoded."""
    writes: str
    """Hookpoint that decoder rows are added to: ``reads`` for an autoencoder, for a transcoder the
    output that it was trained to give.
    """


def rows_of(matrix: Float[Tensor, "row d_in"], wanted: Sequence[int]) -> Float32[Tensor, "_ d_in"]:
    """Some rows of a matrix in float32, in the order asked for, where the matrix is."""
    index = torch.as_tensor(wanted, dtype=torch.int64, device=matrix.device)
    return matrix[index].float()


def summed_rows(
    matrix: Float[Tensor, "num_latents d_out"], found: SparseActivations, n_tokens: int
) -> Float32[Tensor, "token d_out"]:
    """For each token the sum of the rows of what fires, times its activation, where the matrix is.

    In float32, in the order of ``found``; memory does not grow with what fires.
    """
    total = torch.zeros(n_tokens, matrix.shape[1], device=matrix.device)
    size = max(1, _ROW_ELEMENTS // matrix.shape[1])
    for token, latent, value in zip(*(c.to(matrix.device).split(size) for c in found), strict=True):
        total.index_add_(0, token, matrix[latent].float() * value[:, None])
    return total
