"""The sparse coders: how the pre-activations of a linear encoder become the few that fire."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from autointerp_dagster.core.sparse_coders.device import (
    DeviceEncoder,
    block_encoder,
    token_block_of,
)
from autointerp_dagster.core.sparse_coders.host import HostEncoder, ScreenChoice
from autointerp_dagster.core.sparse_coders.protocol import SparseActivations, rows_of
from autointerp_dagster.core.sparse_coders.rule import Rule
from autointerp_dagster.core.sparse_coders.screen import Linear


@dataclass(frozen=True, slots=True)
class Computing:
    """How to compute; on a CPU nothing of it changes what is found."""

    screen: ScreenChoice = "auto"
    """On a CPU: what all latents are scored in before the few that may fire are computed."""
    block_elements: int | None = None
    """On a CPU: most scores that exist at once; null: what suits its cache."""
    compiled: bool = False
    """Elsewhere: whether to use ``torch.compile``."""


@dataclass(frozen=True, slots=True)
class TopKCoder:
    """Encode ``x`` as ``topk(relu(encoder (x - b_dec) + bias))``.

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", eq. 3, with the ReLU of
    sparsify, so that a latent among the k largest may still be silent.
    """

    encoder: Float[Tensor, "num_latents d_in"]
    """Its type is that of the product on a GPU; on a CPU float32 is used."""
    bias: Float32[Tensor, " num_latents"]
    decoder: Float[Tensor, "num_latents d_in"]
    """Any float type, on any device: it is read by rows and not needed to encode."""
    b_dec: Float32[Tensor, " d_in"]
    """Taken from the input before it is encoded."""
    k: int
    """Latents that may fire on one token, in [1, num_latents]."""
    computing: Computing = Computing()
    """How to compute."""
    _made: list[HostEncoder | DeviceEncoder] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    @property
    def num_latents(self) -> int:
        """Number of latents."""
        return self.encoder.shape[0]

    @property
    def d_in(self) -> int:
        """Width of the vectors that are encoded."""
        return self.encoder.shape[1]

    def encode(self, x: Float[Tensor, "token d_in"]) -> SparseActivations:
        """The k largest pre-activations of each token, those above zero.

        Memory does not grow with ``num_latents``. On a CPU arithmetic is float32, among equal
        activations at rank k the lowest latents are kept, and the result for a token depends on no
        other token. On a GPU arithmetic is in the encoder's type, and which of equal ones is kept
        is not defined.
        """
        return self._encoding().encode(x)

    def describe(self) -> dict[str, object]:
        """How this coder computes where it is, to be recorded with what it gave."""
        return self._encoding().describe()

    def encode_dense(self, x: Float[Tensor, "token d_in"]) -> Float32[Tensor, "token num_latents"]:
        """All activations, zeros included: for tests and a few tokens only."""
        pre_activations = (x.float() - self.b_dec) @ self.encoder.float().T + self.bias
        largest = pre_activations.relu().topk(self.k, dim=-1)
        return torch.zeros_like(pre_activations).scatter_(-1, largest.indices, largest.values)

    def encoder_rows(self, latents: Sequence[int]) -> Float32[Tensor, "latent d_in"]:
        """Direction that each latent reads from the input, in the order asked for."""
        return rows_of(self.encoder, latents)

    def decoder_rows(self, latents: Sequence[int]) -> Float32[Tensor, "latent d_in"]:
        """Direction that each latent adds to the output, in the order asked for."""
        return rows_of(self.decoder, latents)

    def to(self, device: torch.device) -> "TopKCoder":
        """The same coder with its encoder on ``device``; the decoder stays where it is."""
        if device == self.encoder.device:
            return self
        return replace(
            self,
            encoder=self.encoder.to(device),
            bias=self.bias.to(device),
            b_dec=self.b_dec.to(device),
        )

    def _encoding(self) -> HostEncoder | DeviceEncoder:
        if not self._made:
            parts = Linear(self.encoder, self.bias, self.b_dec)
            self._made.append(_encoding(parts, Rule(k=self.k), self.computing))
        return self._made[0]


@dataclass(frozen=True, slots=True)
class JumpReLUCoder:
    """Encode ``x`` as ``pre * (pre > threshold)``, ``pre = encoder (x - centre) + bias``.

    With a threshold of 0 this is a ReLU.

    Source: Rajamanoharan et al. 2024, "Jumping ahead: improving reconstruction fidelity with
    JumpReLU sparse autoencoders", eq. 3 and 5.
    """

    encoder: Float[Tensor, "num_latents d_in"]
    """Its type is that of the product on a GPU; on a CPU float32 is used."""
    bias: Float32[Tensor, " num_latents"]
    threshold: Float32[Tensor, " num_latents"]
    """A latent at or below its own is silent; each >= 0."""
    decoder: Float[Tensor, "num_latents d_in"]
    """Any float type, on any device: it is read by rows and not needed to encode."""
    b_dec: Float32[Tensor, " d_in"]
    """Added to what the decoder gives."""
    subtracts_b_dec: bool = False
    """Whether ``centre`` is ``b_dec``; otherwise it is 0."""
    computing: Computing = Computing()
    """How to compute."""
    _made: list[HostEncoder | DeviceEncoder] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        lowest = float(self.threshold.min())
        if not lowest >= 0:
            raise ValueError(
                f"JumpReLUCoder: the lowest threshold is {lowest!r}, wanted all >= 0. "
                "Negative activations are not supported."
            )

    @property
    def num_latents(self) -> int:
        """Number of latents."""
        return self.encoder.shape[0]

    @property
    def d_in(self) -> int:
        """Width of the vectors that are encoded."""
        return self.encoder.shape[1]

    def encode(self, x: Float[Tensor, "token d_in"]) -> SparseActivations:
        """The pre-activations of each token that exceed their latent's threshold.

        Memory does not grow with ``num_latents``, unless that many fire. On a CPU arithmetic is
        float32 and the result for a token depends on no other token; on a GPU arithmetic is in the
        encoder's type.
        """
        return self._encoding().encode(x)

    def describe(self) -> dict[str, object]:
        """How this coder computes where it is, to be recorded with what it gave."""
        return self._encoding().describe()

    def encode_dense(self, x: Float[Tensor, "token d_in"]) -> Float32[Tensor, "token num_latents"]:
        """All activations, zeros included: for tests and a few tokens only."""
        found = (x.float() - self._centre()) @ self.encoder.float().T + self.bias
        return found * (found > self.threshold)

    def encoder_rows(self, latents: Sequence[int]) -> Float32[Tensor, "latent d_in"]:
        """Direction that each latent reads from the input, in the order asked for."""
        return rows_of(self.encoder, latents)

    def decoder_rows(self, latents: Sequence[int]) -> Float32[Tensor, "latent d_in"]:
        """Direction that each latent adds to the output, in the order asked for."""
        return rows_of(self.decoder, latents)

    def to(self, device: torch.device) -> "JumpReLUCoder":
        """The same coder with its encoder on ``device``; the decoder stays where it is."""
        if device == self.encoder.device:
            return self
        return replace(
            self,
            encoder=self.encoder.to(device),
            bias=self.bias.to(device),
            threshold=self.threshold.to(device),
            b_dec=self.b_dec.to(device),
        )

    def _centre(self) -> Float32[Tensor, " d_in"]:
        return self.b_dec if self.subtracts_b_dec else torch.zeros_like(self.b_dec)

    def _encoding(self) -> HostEncoder | DeviceEncoder:
        if not self._made:
            parts = Linear(self.encoder, self.bias, self._centre())
            rule = Rule(threshold=self.threshold)
            self._made.append(_encoding(parts, rule, self.computing))
        return self._made[0]


def _encoding(parts: Linear, rule: Rule, computing: Computing) -> HostEncoder | DeviceEncoder:
    weight, bias, centre = parts
    if weight.device.type == "cpu":
        linear = Linear(weight.float(), bias, centre)
        return HostEncoder(linear, rule, computing.screen, computing.block_elements)
    return DeviceEncoder(
        block_encoder(weight, bias, centre, rule, computing.compiled),
        token_block_of(weight.device, len(weight), weight.dtype.itemsize),
    )
