"""What a coder does to a vector before it is encoded, and how its output is brought back."""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float32
from torch import Tensor

InputNorm = Literal["none", "layer_norm", "constant_norm_rescale"]
"""What each vector is divided by: nothing, its own standard deviation, or its own length."""

_EPSILON = 1e-5
"""Added to the standard deviation, as all formats with a layer norm do."""


class _Normalised(NamedTuple):
    """A vector is ``x * scale + mean``, about."""

    x: Float[Tensor, "token d_in"]
    scale: Float[Tensor, "token 1"]
    mean: Float[Tensor, "token 1"]


class Inputs(NamedTuple):
    """``norm(x) * scale - centre``, each step in ``dtype``, rounded there as the format's own code.

    Sums over a vector are taken in float32, in an order that depends on its width alone, so what is
    made of it does not depend on the others.
    """

    dtype: torch.dtype
    """What a vector is cast to first."""
    norm: InputNorm
    """``layer_norm``: ``(x - mean) / (std + 1e-5)``, the standard deviation that of a sample.
    ``constant_norm_rescale``: ``x * (sqrt(d_in) / |x|)``; a vector of zeros stays one.
    """
    scale: float
    """Of what is normalised."""
    centre: Float32[Tensor, " d_in"] | None
    """Taken off at last; null: nothing."""

    def prepared(self, x: Float[Tensor, "token d_in"]) -> Float32[Tensor, "token d_in"]:
        """What the encoder's rows are multiplied with."""
        x = self._normalised(x).x
        if self.scale != 1.0:
            x = x * self.scale
        if self.centre is not None:
            x = x - self.centre.to(x.dtype)
        return x.float()

    def restored(
        self, y: Float32[Tensor, "token d_out"], x: Float[Tensor, "token d_in"]
    ) -> Float32[Tensor, "token d_out"]:
        """What the decoder gives for ``x``, in the units of the raw output."""
        y = y / self.scale
        if self.norm == "none":
            return y
        _, scale, mean = self._normalised(x)
        return y * scale.float() + mean.float()

    def _normalised(self, x: Float[Tensor, "token d_in"]) -> _Normalised:
        x = x.to(self.dtype)
        one, zero = x.new_ones(1, 1), x.new_zeros(1, 1)
        if self.norm == "layer_norm":
            mean = (_row_sums(x) / x.shape[1]).to(x.dtype)
            x = x - mean
            spread = _row_sums(x - (_row_sums(x) / x.shape[1]), squared=True)
            std = (spread / (x.shape[1] - 1)).sqrt().to(x.dtype)
            return _Normalised(x / (std + _EPSILON), std, mean)
        if self.norm == "constant_norm_rescale":
            size = _row_sums(x, squared=True).sqrt().to(x.dtype)
            factor = math.sqrt(x.shape[1]) / size
            factor = factor.masked_fill(size == 0, 0.0)
            return _Normalised(x * factor, size / math.sqrt(x.shape[1]), zero)
        return _Normalised(x, one, zero)


def _row_sums(x: Float[Tensor, "token d_in"], squared: bool = False) -> Float32[Tensor, "token 1"]:
    """Halves are added to each other until one column is left: an order of its own for no row."""
    x = x.float()
    x = x * x if squared else x
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        odd = x[:, 2 * half :]
        x = torch.cat([x[:, :half] + x[:, half : 2 * half], odd], dim=1)
    return x
