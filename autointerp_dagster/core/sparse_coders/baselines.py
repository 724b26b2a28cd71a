"""Linear coders that nobody trained, for trained ones to be compared with."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from autointerp_dagster.core.sparse_coders.linear import LinearCoder
from autointerp_dagster.core.sparse_coders.neurons import NeuronCoder
from autointerp_dagster.core.sparse_coders.rule import TopK

_DRAWN_ROWS = 4096
"""Rows that are drawn at once."""
_ADDED_ROWS = 4096
"""Vectors whose products are added up at once."""


def random_coder(rng: np.random.Generator, num_latents: int, d_in: int, k: int) -> LinearCoder:
    """A TopK coder whose rows are directions drawn uniformly; its decoder is its encoder.

    Args:
        rng: Drawn from row by row, so that a wider coder begins with the rows of a narrower one.
        num_latents: Rows.
        d_in: Width of each; its length is 1.
        k: Latents that may fire on one token.
    """
    rows = torch.empty(num_latents, d_in)
    for part in rows.split(_DRAWN_ROWS):
        drawn = rng.standard_normal(tuple(part.shape), dtype=np.float32)
        drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        part.copy_(torch.from_numpy(drawn))
    zeros = torch.zeros(num_latents)
    return LinearCoder(rows, zeros, rows, torch.zeros(d_in), TopK(k))


class PrincipalComponents(NamedTuple):
    """The directions in which vectors vary most."""

    mean: Float32[Tensor, " width"]
    rows: Float32[Tensor, "component width"]
    """Of length 1, orthogonal, by variance, the largest first; each one's largest entry is > 0."""
    variances: Float64[Tensor, " component"]
    """Along each, over ``n - 1``."""


class Moments:
    """Mean and covariance of vectors that come in parts, added up in float64."""

    def __init__(self, width: int) -> None:
        self._n_vectors = 0
        self._origin: Tensor | None = None
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._products = torch.zeros(width, width, dtype=torch.float64)

    @property
    def width(self) -> int:
        """Of the vectors."""
        return len(self._sum)

    def add(self, x: Float[Tensor, "vector width"]) -> None:
        """Count some vectors; the last bits depend on how they are cut into parts.

        The sums stay where the first ones are.
        """
        if self._origin is None:  # about the mean: what is far from 0 would cost digits
            self._origin = x.double().mean(dim=0)
            self._sum, self._products = self._sum.to(x.device), self._products.to(x.device)
        for part in x.split(_ADDED_ROWS):
            off = part.double() - self._origin
            self._sum += off.sum(dim=0)
            self._products += off.T @ off
        self._n_vectors += len(x)

    def components(self, n: int) -> PrincipalComponents:
        """The first ``n``, on the CPU.

        Raises:
            ValueError: If the vectors added do not have as many.
        """
        width = len(self._sum)
        most = min(width, self._n_vectors - 1)
        if self._origin is None or not 1 <= n <= most:
            raise ValueError(
                f"principal components: {n} of {self._n_vectors} vectors of width {width}, wanted "
                f"1 to {max(most, 0)}. Ask for fewer, or add more vectors."
            )
        mean = self._sum / self._n_vectors
        scatter = self._products - self._n_vectors * torch.outer(mean, mean)
        variances, columns = np.linalg.eigh(scatter.cpu().numpy() / (self._n_vectors - 1))
        rows = columns.T[::-1][:n]  # eigh gives the smallest first
        largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)
        return PrincipalComponents(
            (self._origin + mean).float().cpu(),
            torch.from_numpy((rows * np.sign(largest)).astype(np.float32)),
            torch.from_numpy(variances[::-1][:n].copy()),
        )


def pca_coder(components: PrincipalComponents, k: int) -> LinearCoder:
    """A TopK coder of the coordinates about the mean, each as two latents.

    Latent ``2 i`` is component i where it is positive, ``2 i + 1`` minus it where it is negative.
    """
    rows, mean = _with_negatives(components.rows), components.mean
    zeros = torch.zeros(len(rows))
    return LinearCoder(rows, zeros, rows, mean, TopK(k), centre=mean)


def random_rotation(rng: np.random.Generator, width: int) -> Float32[Tensor, "width width"]:
    """An orthogonal matrix drawn uniformly; takes ``width**3`` steps, and 24 bytes an entry.

    Source: Mezzadri 2007, "How to generate random matrices from the classical compact groups".
    """
    columns, triangle = np.linalg.qr(rng.standard_normal((width, width)))
    columns *= np.sign(np.diagonal(triangle))
    return torch.from_numpy(columns.astype(np.float32))


def rotated_neurons(
    neurons: NeuronCoder, rotation: Float32[Tensor, "neuron neuron"]
) -> LinearCoder:
    """The same MLP read along other axes: coordinate i is row i of ``rotation`` times the neurons.

    By magnitude coordinate i is latents ``2 i`` and ``2 i + 1``, as a neuron is.
    """
    rows = rotation if neurons.by == "value" else _with_negatives(rotation)
    decoder = rows @ neurons.decoder.float()
    return LinearCoder(rows, torch.zeros(len(rows)), decoder, neurons.b_dec, TopK(neurons.k))


def _with_negatives(rows: Float32[Tensor, "row width"]) -> Float32[Tensor, "_ width"]:
    """Each row, followed by minus it."""
    return torch.stack([rows, -rows], dim=1).flatten(0, 1)
