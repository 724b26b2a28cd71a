"""The strength of steering at which the next token's distribution has diverged by a given amount.

Source:
    arXiv 2410.13928, section 3.3: interventions are compared at equal mean divergence. The search
    is over the logarithm of the strength, with log KL interpolated inside a bracket: for small
    strengths KL grows as their square, a line in these coordinates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

MIN_LOG10, MAX_LOG10 = -3.0, 4.0
"""Strengths that are tried lie between 10 to the power of these."""
_MIN_BRACKET = 1e-4
_MARGIN = 0.1
"""Of a bracket's width that an interpolated strength keeps from its ends."""


class Divergence(NamedTuple):
    """How far steering moves the distribution of the next token, in nats; NaN where undefined."""

    kl: Float64[np.ndarray, " item"]
    """KL(clean || steered)."""
    reverse: Float64[np.ndarray, " item"]
    """KL(steered || clean)."""


class Strength(NamedTuple):
    """What a search ended with for one latent."""

    strength: float | None
    """The tried strength whose divergence is nearest the target; null if none had a finite one."""
    kl: float | None
    reverse_kl: float | None
    n_steps: int
    """Strengths tried."""
    is_on_target: bool
    """Whether ``kl`` is within the tolerance of the target."""


DivergenceOf = Callable[[Int64[np.ndarray, " item"], Float64[np.ndarray, " item"]], Divergence]
"""Mean divergences of some latents (by their place in the search), each at its strength."""


def divergence_between(
    clean: Float[Tensor, "row token"], steered: Float[Tensor, "row token"]
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """KL(clean || steered) and KL(steered || clean) of log-probabilities, in nats.

    A token of probability 0 on the left adds nothing; one of probability 0 on the right alone makes
    the divergence infinite.
    """
    difference = clean - steered
    forward = torch.where(clean > -torch.inf, clean.exp() * difference, 0.0).sum(dim=-1)
    reverse = torch.where(steered > -torch.inf, steered.exp() * -difference, 0.0).sum(dim=-1)
    return forward, reverse


def find_strengths(
    divergence_of: DivergenceOf, n_latents: int, target: float, tolerance: float, max_steps: int
) -> list[Strength]:
    """Search the strengths of many latents at once; none changes what is found for another.

    KL need not grow with the strength, so a bracket may hold none that fits, or several: the search
    then ends off target, or with one of them.

    Args:
        divergence_of: Asked at most ``max_steps`` times, about those latents that are not done.
        n_latents: They are numbered from 0.
        target: KL(clean || steered) that is wanted, nats, > 0.
        tolerance: Relative to the target.
        max_steps: Strengths tried per latent, at most.
    """
    searches = [_Search(target, tolerance) for _ in range(n_latents)]
    for _ in range(max_steps):
        open_ones = [i for i, search in enumerate(searches) if not search.is_done]
        if not open_ones:
            break
        tried = np.array([searches[i].next_log10() for i in open_ones], dtype=np.float64)
        found = divergence_of(np.array(open_ones, dtype=np.int64), 10.0**tried)
        for i, log10, kl, reverse in zip(open_ones, tried, *found, strict=True):
            searches[i].note(float(log10), float(kl), float(reverse))
    return [search.result() for search in searches]


@dataclass(slots=True)
class _Search:
    """One latent's bracket and the best strength so far."""

    target: float
    tolerance: float
    low: float = MIN_LOG10
    """Taken to be below the target, measured or not; ``high`` to be above."""
    high: float = MAX_LOG10
    low_kl: float | None = None
    """Measured at ``low``; null until then, or where its logarithm is of no use."""
    high_kl: float | None = None
    best: tuple[float, float, float] | None = None
    """Strength as log10, KL and reverse KL."""
    sides: list[bool] = field(default_factory=list)
    """Of every strength tried: whether its KL was above the target."""

    @property
    def is_on_target(self) -> bool:
        if self.best is None:
            return False
        return abs(self.best[1] - self.target) <= self.tolerance * self.target

    @property
    def is_done(self) -> bool:
        return self.is_on_target or self.high - self.low < _MIN_BRACKET

    def next_log10(self) -> float:
        """Inside the bracket: interpolated where both ends are known, else its middle."""
        middle = (self.low + self.high) / 2
        one_sided = len(self.sides) > 2 and len(set(self.sides[-3:])) == 1
        if self.low_kl is None or self.high_kl is None or one_sided:
            return middle
        below, above = math.log(self.low_kl), math.log(self.high_kl)
        share = (math.log(self.target) - below) / (above - below)
        return self.low + (self.high - self.low) * min(max(share, _MARGIN), 1 - _MARGIN)

    def note(self, log10: float, kl: float, reverse: float) -> None:
        """Move an end of the bracket; what is not finite counts as too strong."""
        is_finite = math.isfinite(kl)
        if is_finite and (self.best is None or self._miss(kl) < self._miss(self.best[1])):
            self.best = (log10, kl, reverse)
        is_above = not is_finite or kl > self.target
        self.sides.append(is_above)
        if is_above:
            self.high, self.high_kl = log10, kl if is_finite else None
        else:
            self.low, self.low_kl = log10, kl if kl > 0 else None

    def result(self) -> Strength:
        n_steps = len(self.sides)
        if self.best is None:
            return Strength(None, None, None, n_steps, is_on_target=False)
        log10, kl, reverse = self.best
        reverse_kl = reverse if math.isfinite(reverse) else None
        return Strength(10.0**log10, kl, reverse_kl, n_steps, self.is_on_target)

    def _miss(self, kl: float) -> float:
        return math.inf if kl <= 0 else abs(math.log(kl / self.target))
