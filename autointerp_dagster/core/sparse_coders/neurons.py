"""The hidden neurons of an MLP as a sparse coder: what fires is the few that are largest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from autointerp_dagster.core.sparse_coders.protocol import SparseActivations, rows_of, summed_rows

Ranking = Literal["value", "magnitude"]
"""What is largest: signed values, or sizes."""

_BLOCK_ELEMENTS = 1 << 22
"""Neurons of all tokens that are looked at at once."""


@dataclass(frozen=True, slots=True)
class NeuronCoder:
    """A latent is a neuron: its activation is the neuron's own where it is among the k largest.

    Only what is above zero fires. By magnitude a neuron is two latents, ``2 i`` where it is
    positive and ``2 i + 1`` where it is negative, whose activation is its size. Among equal ones at
    rank k the first neurons are kept. What is found for a token depends on no other token, on any
    device.

    Source: Paulo et al. 2024, "Automatically interpreting millions of features in large language
    models", the baseline of neurons.
    """

    decoder: Float[Tensor, "neuron d_out"]
    """What one unit of each neuron adds to the MLP's output: a row per neuron, any float type."""
    b_dec: Float32[Tensor, " d_out"]
    """Added to what the decoder gives."""
    k: int
    """Neurons that may fire on one token, in [1, neurons]."""
    by: Ranking = "value"
    """What the k largest are chosen by."""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.d_in:
            raise ValueError(f"NeuronCoder: k is {self.k}, wanted 1 to {self.d_in}, the neurons.")

    @property
    def num_latents(self) -> int:
        """Neurons, or twice as many."""
        return self.d_in if self.by == "value" else 2 * self.d_in

    @property
    def d_in(self) -> int:
        """Neurons."""
        return self.decoder.shape[0]

    @property
    def d_out(self) -> int:
        """Width of the MLP's output."""
        return self.decoder.shape[1]

    def encode(self, x: Float[Tensor, "token d_in"]) -> SparseActivations:
        """What fires on each token. A neuron that is NaN counts as infinite."""
        size = max(1, _BLOCK_ELEMENTS // self.d_in)
        starts = range(0, max(1, len(x)), size)
        parts = [self._encode_block(x[start : start + size], start) for start in starts]
        return SparseActivations(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def encode_dense(self, x: Float[Tensor, "token d_in"]) -> Float32[Tensor, "token num_latents"]:
        """All activations, zeros included, without any shortcut: for tests and a few tokens."""
        largest = self._scores(x).sort(dim=1, descending=True, stable=True)
        neuron = largest.indices[:, : self.k]
        latent = self._latents(neuron, x.gather(1, neuron))
        found = torch.zeros(len(x), self.num_latents, device=x.device)
        return found.scatter_(1, latent, largest.values[:, : self.k].relu())

    def decode(
        self, found: SparseActivations, x: Float[Tensor, "token d_in"]
    ) -> Float32[Tensor, "token d_out"]:
        """The MLP's output, of the neurons that fire alone."""
        if self.by == "magnitude":
            sign = 1 - 2 * (found.latent % 2)
            found = found._replace(latent=found.latent // 2, value=found.value * sign)
        return summed_rows(self.decoder, found, len(x)).to(x.device) + self.b_dec.to(x.device)

    def describe(self) -> dict[str, object]:
        """How it computes: comparing numbers, which is the same everywhere."""
        return {"precision": "exact"}

    def encoder_rows(self, latents: Sequence[int]) -> Float32[Tensor, "latent d_in"]:
        """One neuron each, with its sign, in the order asked for."""
        neuron, sign = self._neurons(latents)
        rows = torch.zeros(len(latents), self.d_in)
        rows[range(len(latents)), neuron] = sign
        return rows

    def decoder_rows(self, latents: Sequence[int]) -> Float32[Tensor, "latent d_out"]:
        """What one unit of each latent adds to the MLP's output, in the order asked for."""
        neuron, sign = self._neurons(latents)
        return rows_of(self.decoder, neuron.tolist()) * sign[:, None].to(self.decoder.device)

    def to(self, device: torch.device) -> "NeuronCoder":
        """This coder: it encodes wherever its input is."""
        del device
        return self

    def _encode_block(self, x: Float[Tensor, "token d_in"], first_token: int) -> SparseActivations:
        scores = self._scores(x)
        token, neuron = torch.nonzero(_largest(scores, self.k), as_tuple=True)
        latent = self._latents(neuron, x[token, neuron])
        return SparseActivations(token + first_token, latent, scores[token, neuron])

    def _scores(self, x: Float[Tensor, "token d_in"]) -> Float32[Tensor, "token d_in"]:
        scores = x.float() if self.by == "value" else x.float().abs()
        return scores.masked_fill(scores.isnan(), torch.inf)

    def _latents(
        self, neuron: Int64[Tensor, "*any"], value: Float[Tensor, "*any"]
    ) -> Int64[Tensor, "*any"]:
        return neuron if self.by == "value" else 2 * neuron + (value < 0)

    def _neurons(self, latents: Sequence[int]) -> tuple[Int64[Tensor, " _"], Float32[Tensor, " _"]]:
        index = torch.as_tensor(latents, dtype=torch.int64)
        if self.by == "value":
            return index, torch.ones(len(index))
        return index // 2, 1.0 - 2.0 * (index % 2)


def _largest(scores: Float32[Tensor, "token neuron"], k: int) -> Bool[Tensor, "token neuron"]:
    """The k largest above zero; of those equal to the k-th as many of the first as there is room.

    Which of equal ones ``topk`` takes is not defined, and in bfloat16 many are equal.
    """
    kth = scores.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    is_above, is_kth = scores > kth, scores == kth
    room = k - is_above.sum(dim=1, keepdim=True)
    fits = is_kth & (is_kth.cumsum(dim=1, dtype=torch.int32) <= room)
    return (scores > 0) & (is_above | fits)
