"""The sparse coder with a linear encoder: all published kinds but for how their latents fire."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from autointerp_dagster.core.sparse_coders.device import (
    DeviceEncoder,
    block_encoder,
    token_block_of,
)
from autointerp_dagster.core.sparse_coders.host import HostEncoder, ScreenChoice
from autointerp_dagster.core.sparse_coders.inputs import InputNorm, Inputs
from autointerp_dagster.core.sparse_coders.protocol import SparseActivations, rows_of, summed_rows
from autointerp_dagster.core.sparse_coders.rule import (
    Activation,
    dense_activations,
    moved,
    refuse_unfit,
    rule_of,
)
from autointerp_dagster.core.sparse_coders.screen import Linear

Precision = Literal["float32", "bfloat16"]
"""Of the encoder's product on a GPU."""


@dataclass(frozen=True, slots=True)
class Computing:
    """How to compute; on a CPU nothing of it changes what is found."""

    screen: ScreenChoice = "auto"
    """On a CPU: what all latents are scored in before the few that may fire are computed."""
    block_elements: int | None = None
    """On a CPU: most scores that exist at once; null: what suits its cache."""
    compiled: bool = False
    """Elsewhere: whether to use ``torch.compile``."""
    precision: Precision = "float32"
    """Elsewhere: of the product. bfloat16 rounds the encoder and every pre-activation to it, and is
    several times faster.
    """


@dataclass(frozen=True, slots=True)
class LinearCoder:
    """Encode as ``activation(encoder x' + bias)``, ``x' = norm(x) * input_scale - centre``.

    Decode as ``decoder^T a + b_dec``, divided by ``input_scale``, brought back from the norm, and
    with ``skip x`` added.

    Precision: ``x`` is cast to ``dtype``, and ``x'`` is made in it, step by step, as the format's
    own code does. Products, sums over them, biases and values are float32 (on a GPU: see
    :class:`Computing`). Whether a pre-activation exceeds a threshold above zero is decided after
    it is rounded to ``dtype``; whether it exceeds zero, and which are the largest, in float32.
    """

    encoder: Float[Tensor, "num_latents d_in"]
    """Any float type; on a CPU float32 is used."""
    bias: Float32[Tensor, " num_latents"]
    """Added to the products; of a gated coder: in the gate."""
    decoder: Float[Tensor, "num_latents d_out"]
    """Any float type, on any device: it is read by rows and not needed to encode."""
    b_dec: Float32[Tensor, " d_out"]
    """Added to what the decoder gives."""
    activation: Activation
    """Which latents fire."""
    centre: Float32[Tensor, " d_in"] | None = None
    """Taken from the input before it is encoded; null: nothing."""
    input_norm: InputNorm = "none"
    """See :class:`inputs.Inputs`."""
    input_scale: float = 1.0
    """The normalised input is multiplied by it before ``centre`` is taken off; > 0."""
    skip: Float[Tensor, "d_out d_in"] | None = None
    """Applied to the raw input and added to the output; null: nothing."""
    dtype: torch.dtype = torch.float32
    """What the input is cast to first."""
    computing: Computing = Computing()
    """How to compute."""
    _made: list[HostEncoder | DeviceEncoder] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        refuse_unfit(self.activation, self.num_latents)
        if not 0 < self.input_scale < float("inf"):
            raise ValueError(f"LinearCoder: input_scale is {self.input_scale!r}, wanted above 0.")

    @property
    def num_latents(self) -> int:
        """Number of latents."""
        return self.encoder.shape[0]

    @property
    def d_in(self) -> int:
        """Width of the vectors that are encoded."""
        return self.encoder.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the vectors that are decoded."""
        return self.decoder.shape[1]

    def encode(self, x: Float[Tensor, "token d_in"]) -> SparseActivations:
        """What fires on each token.

        Memory does not grow with ``num_latents``, unless that many fire. On a CPU among equal
        activations of which some fire the lowest latents are kept, and the result for a token
        depends on no other token, to the bit. On a GPU which of equal ones is kept is not defined.
        A token that is not finite, or whose sums are not, gives infinite activations.
        """
        return self._encoding().encode(x)

    def encode_dense(self, x: Float[Tensor, "token d_in"]) -> Float32[Tensor, "token num_latents"]:
        """All activations, zeros included, without any shortcut: for tests and a few tokens only.

        Differs from :meth:`encode` by the order in which products are summed.
        """
        product = self._inputs().prepared(x) @ self.encoder.float().T
        return dense_activations(self.activation, product, self.bias, self.dtype)

    def decode(
        self, found: SparseActivations, x: Float[Tensor, "token d_in"]
    ) -> Float32[Tensor, "token d_out"]:
        """The output for some activations, in float32 and in units of the raw output.

        Args:
            found: Of ``x``.
            x: For its normalisation, and the skip connection; on any device, which is the result's.
        """
        y = summed_rows(self.decoder, found, len(x)).to(x.device) + self.b_dec.to(x.device)
        y = self._inputs().restored(y, x)
        if self.skip is not None:
            y = y + x.float() @ self.skip.to(x.device).float().T
        return y

    def describe(self) -> dict[str, object]:
        """How this coder computes where it is, to be recorded with what it gave."""
        about = self._encoding().describe()
        on_cpu = self.encoder.device.type == "cpu"
        return about if on_cpu else {**about, "compiled": self.computing.compiled}

    def encoder_rows(self, latents: Sequence[int]) -> Float32[Tensor, "latent d_in"]:
        """Direction that each latent reads from the normalised input, in the order asked for."""
        return rows_of(self.encoder, latents)

    def decoder_rows(self, latents: Sequence[int]) -> Float32[Tensor, "latent d_out"]:
        """What one unit of each latent adds to the raw output, in the order asked for.

        Where the input is normalised token by token, it is in units of the normalised output: a
        token's own scale comes on top of it.
        """
        return rows_of(self.decoder, latents) / self.input_scale

    def to(self, device: torch.device) -> "LinearCoder":
        """The same coder, encoding on ``device``; the decoder stays where it is.

        Elsewhere than on a CPU its encoder is of the type that ``computing`` names.
        """
        if device == self.encoder.device:
            return self
        dtype = self.encoder.dtype
        if device.type != "cpu":
            dtype = getattr(torch, self.computing.precision)
        return replace(
            self,
            encoder=self.encoder.to(device, dtype),
            bias=self.bias.to(device),
            centre=None if self.centre is None else self.centre.to(device),
            activation=moved(self.activation, device),
        )

    def _inputs(self) -> Inputs:
        return Inputs(self.dtype, self.input_norm, self.input_scale, self.centre)

    def _encoding(self) -> HostEncoder | DeviceEncoder:
        if not self._made:
            self._made.append(self._make())
        return self._made[0]

    def _make(self) -> HostEncoder | DeviceEncoder:
        weight, computing = self.encoder, self.computing
        rule = rule_of(self.activation, self.dtype)
        if weight.device.type == "cpu":
            linear = Linear(weight.float(), self.bias)
            screen, size = computing.screen, computing.block_elements
            return HostEncoder(linear, self._inputs(), rule, screen, size)
        return DeviceEncoder(
            block_encoder(weight, self.bias, self._inputs(), rule, computing.compiled),
            token_block_of(weight.device, len(weight), weight.dtype.itemsize),
            str(weight.dtype).removeprefix("torch."),
        )
