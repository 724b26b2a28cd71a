"""Sparse coders: from a vector of the subject model to the few latents that fire on it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

_MIN_TOKEN_BLOCK = 128
"""Tokens encoded at once, at least: fewer make the matrix product slow."""
_BLOCK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Most pre-activations that exist at once (16 MB, the size of a CPU's cache; 512 MB)."""


class SparseActivations(NamedTuple):
    """What fires on each token; entries with value 0 do not fire and only fill the row."""

    indices: Int64[Tensor, "token k"]
    """Latents, distinct within a row, in no particular order."""
    values: Float32[Tensor, "token k"]
    """Raw coder units, >= 0."""


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

    def encode(self, x: Float[Tensor, "token d_in"]) -> SparseActivations:
        """The non-zero activations of each token; never a dense [token, num_latents] tensor."""
        ...

    def decoder_rows(self, latents: Sequence[int]) -> Float32[Tensor, "latent d_in"]:
        """Direction that each latent adds to the output, in the order asked for."""
        ...

    def to(self, device: torch.device) -> "SparseCoder":
        """The same coder, encoding on another device."""
        ...


@dataclass(frozen=True, slots=True)
class TopKCoder:
    """Encode ``x`` as ``topk(relu(encoder (x - b_dec) + bias))``.

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", eq. 3, with the ReLU of
    sparsify, so that a latent among the k largest may still be silent.
    """

    encoder: Float32[Tensor, "num_latents d_in"]
    bias: Float32[Tensor, " num_latents"]
    decoder: Float[Tensor, "num_latents d_in"]
    """Any float type, on any device: it is read by rows and not needed to encode."""
    b_dec: Float32[Tensor, " d_in"]
    """Taken from the input before it is encoded."""
    k: int
    """Latents that may fire on one token, in [1, num_latents]."""
    block_elements: int | None = None
    """Most pre-activations that exist at once; null: what suits the device."""

    @property
    def num_latents(self) -> int:
        """Number of latents."""
        return self.encoder.shape[0]

    @property
    def d_in(self) -> int:
        """Width of the vectors that are encoded."""
        return self.encoder.shape[1]

    def encode(self, x: Float[Tensor, "token d_in"]) -> SparseActivations:
        """The k largest rectified activations of each token.

        Memory does not grow with ``num_latents``: tokens go in blocks, and where a block of
        128 tokens is still too wide, latents too. Arithmetic is float32. Among equal activations
        at rank k, which one is kept is not defined.
        """
        block = self._block_elements()
        token_block = max(_MIN_TOKEN_BLOCK, block // self.num_latents)
        latent_block = max(self.k, block // token_block)
        parts = [self._encode_block(rows, latent_block) for rows in x.split(token_block)]
        return SparseActivations(
            torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])
        )

    def encode_dense(self, x: Float[Tensor, "token d_in"]) -> Float32[Tensor, "token num_latents"]:
        """All activations, zeros included: for tests and a few tokens only."""
        pre_activations = (x.float() - self.b_dec) @ self.encoder.T + self.bias
        largest = pre_activations.relu().topk(self.k, dim=-1)
        return torch.zeros_like(pre_activations).scatter_(-1, largest.indices, largest.values)

    def decoder_rows(self, latents: Sequence[int]) -> Float32[Tensor, "latent d_in"]:
        """Direction that each latent adds to the output, in the order asked for."""
        rows = torch.as_tensor(latents, dtype=torch.int64, device=self.decoder.device)
        return self.decoder[rows].float()

    def to(self, device: torch.device) -> "TopKCoder":
        """The same coder with its encoder on ``device``; the decoder stays where it is."""
        return replace(
            self,
            encoder=self.encoder.to(device),
            bias=self.bias.to(device),
            b_dec=self.b_dec.to(device),
        )

    def _block_elements(self) -> int:
        if self.block_elements is not None:
            return self.block_elements
        return _BLOCK_ELEMENTS.get(self.encoder.device.type, _BLOCK_ELEMENTS["cpu"])

    def _encode_block(self, x: Float[Tensor, "token d_in"], latent_block: int) -> SparseActivations:
        centred = x.float() - self.b_dec
        best = None
        for start in range(0, self.num_latents, latent_block):
            rows = slice(start, start + latent_block)
            pre_activations = torch.addmm(self.bias[rows], centred, self.encoder[rows].T)
            largest = pre_activations.topk(min(self.k, pre_activations.shape[1]), dim=-1)
            found = SparseActivations(largest.indices + start, largest.values)
            best = found if best is None else _largest_of(best, found, self.k)
        if best is None:
            raise ValueError("TopKCoder.encode: the coder has no latents, wanted at least one.")
        return SparseActivations(best.indices, best.values.relu())


def _largest_of(a: SparseActivations, b: SparseActivations, k: int) -> SparseActivations:
    indices, values = torch.cat([a.indices, b.indices], -1), torch.cat([a.values, b.values], -1)
    largest = values.topk(k, dim=-1)
    return SparseActivations(indices.gather(-1, largest.indices), largest.values)
