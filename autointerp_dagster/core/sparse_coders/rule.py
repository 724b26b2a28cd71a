"""Which latents fire, and how strongly, given each encoder row's product with the input."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float32
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TopK:
    """The k largest pre-activations of a token fire, those above zero.

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", eq. 3, with the ReLU of
    sparsify, so that a latent among the k largest may still be silent.
    """

    k: int
    """Latents that may fire on one token, in [1, num_latents]."""


@dataclass(frozen=True, slots=True)
class GroupMax:
    """The largest pre-activation of each of k groups of a token fires, where it is above zero.

    Groups are stretches of ``num_latents / k`` consecutive latents. Source: sparsify.
    """

    k: int
    """Groups; divides ``num_latents``."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """Every pre-activation above its latent's own threshold fires.

    Source: Rajamanoharan et al. 2024, "Jumping ahead: improving reconstruction fidelity with
    JumpReLU sparse autoencoders", eq. 3 and 5. A BatchTopK coder after its training is one.
    """

    threshold: Float32[Tensor, " num_latents"]
    """A latent at or below its own is silent; each >= 0."""


@dataclass(frozen=True, slots=True)
class ReLU:
    """Every pre-activation above zero fires."""


@dataclass(frozen=True, slots=True)
class Gated:
    """A latent fires where its pre-activation and ``scale * product + bias``, its value, are > 0.

    The product is the pre-activation without the encoder's bias, which is the gate's.

    Source: Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse
    autoencoders", eq. 3 to 5.
    """

    scale: Float32[Tensor, " num_latents"]
    """``exp(r_mag)``, > 0."""
    bias: Float32[Tensor, " num_latents"]
    """``b_mag``, of the value."""


Activation = TopK | GroupMax | Threshold | ReLU | Gated


class Rule(NamedTuple):
    """What all activations come to, in float32."""

    k: int | None = None
    """Most latents that fire in a group; null: any number."""
    n_groups: int = 1
    """Stretches of equally many consecutive latents that choose each for itself."""
    threshold: Float32[Tensor, " num_latents"] | None = None
    """A pre-activation at or below its latent's own is silent, >= 0; null: 0."""
    gated: Gated | None = None
    """What the values are then, instead of the pre-activations."""

    @property
    def most(self) -> int | None:
        """Latents that may fire at once; null: all."""
        return None if self.k is None else self.k * self.n_groups


def rule_of(activation: Activation, dtype: torch.dtype) -> Rule:
    """The rule that decides of pre-activations in float32 what ``activation`` does in ``dtype``."""
    match activation:
        case TopK(k):
            return Rule(k=k)
        case GroupMax(k):
            return Rule(k=1, n_groups=k)
        case Threshold(threshold):
            return Rule(threshold=threshold_in_float32(threshold, dtype))
        case ReLU():
            return Rule()
        case Gated():
            return Rule(gated=activation)


def threshold_in_float32(
    threshold: Float32[Tensor, " num_latents"], dtype: torch.dtype
) -> Float32[Tensor, " num_latents"]:
    """What a float32 exceeds exactly if, rounded to ``dtype``, it exceeds ``threshold``.

    That is the middle between the last number of ``dtype`` that does not exceed the threshold and
    the next one; or just below the middle, where that is rounded up. Of 0 it is 0.
    """
    if dtype == torch.float32:
        return threshold
    last = threshold.to(dtype)
    bits = last.view(torch.int16) - (last.float() > threshold).to(torch.int16)
    last, following = bits.view(dtype), (bits + 1).view(dtype)
    middle = last.float() / 2 + following.float() / 2
    is_rounded_up = (bits + 1) % 2 == 0  # to the even one of two
    below = torch.nextafter(middle, torch.zeros_like(middle))
    return torch.where(is_rounded_up, below, middle).where(threshold > 0, threshold)


def dense_activations(
    activation: Activation,
    product: Float32[Tensor, "token num_latents"],
    bias: Float32[Tensor, " num_latents"],
    dtype: torch.dtype,
) -> Float32[Tensor, "token num_latents"]:
    """All activations, zeros included; among equal ones of which some fire, the lowest latents."""
    pre = product + bias
    match activation:
        case TopK(k):
            largest = pre.relu().sort(dim=-1, descending=True, stable=True)
            kept = largest.indices[..., :k], largest.values[..., :k]
            return torch.zeros_like(pre).scatter_(-1, *kept)
        case GroupMax(k):
            groups = pre.relu().unflatten(-1, (k, -1))
            largest = groups.max(dim=-1, keepdim=True)
            kept = torch.zeros_like(groups).scatter_(-1, largest.indices, largest.values)
            return kept.flatten(-2)
        case Threshold(threshold):
            rounded = torch.where(threshold > 0, pre.to(dtype).float(), pre)
            return pre * (rounded > threshold)
        case ReLU():
            return pre.relu()
        case Gated(scale, magnitude_bias):
            return (scale * product + magnitude_bias).relu() * (pre > 0)


def moved(activation: Activation, device: torch.device) -> Activation:
    """The same, with its tensors on ``device``."""
    match activation:
        case Threshold(threshold):
            return replace(activation, threshold=threshold.to(device))
        case Gated(scale, bias):
            return replace(activation, scale=scale.to(device), bias=bias.to(device))
        case _:
            return activation


def refuse_unfit(activation: Activation, num_latents: int) -> None:
    """Check what a type cannot say.

    Raises:
        ValueError: If no coder of so many latents can fire like this.
    """
    match activation:
        case TopK(k) if not 1 <= k <= num_latents:
            raise ValueError(f"TopK: k is {k}, wanted 1 to {num_latents}, the number of latents.")
        case GroupMax(k) if k < 1 or num_latents % k:
            raise ValueError(
                f"GroupMax: k is {k}, wanted a divisor of {num_latents}, the number of latents."
            )
        case Threshold(threshold) if not (lowest := float(threshold.min())) >= 0:
            raise ValueError(
                f"Threshold: the lowest threshold is {lowest!r}, wanted all >= 0. "
                "Negative activations are not supported."
            )
        case Gated(scale, _) if not (lowest := float(scale.min())) >= 0:
            raise ValueError(
                f"Gated: the lowest scale is {lowest!r}, wanted all >= 0, as exp(r_mag) is."
            )
        case _:
            return
