"""Which latents fire, of those whose pre-activation is above zero."""

from typing import NamedTuple

from jaxtyping import Float32
from torch import Tensor


class Rule(NamedTuple):
    """One of two kinds: the k largest, or all above a threshold."""

    k: int | None = None
    """Most latents that fire on a token; null: any number."""
    threshold: Float32[Tensor, " num_latents"] | None = None
    """A latent at or below its own is silent, >= 0; null: 0."""
