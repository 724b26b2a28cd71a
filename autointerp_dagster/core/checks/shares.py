"""Shares held against a bound, with the doubt that a sample leaves.

What is counted about one latent goes wrong together (its explanation, its prompts), so a latent is
a cluster, and the interval is Wilson's at the effective size. Only an interval that lies wholly
beyond the bound says no.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from autointerp_dagster.core.metrics.intervals import effective_size, wilson
from autointerp_dagster.core.types import Cell

CONFIDENCE = 0.95


class Share(NamedTuple):
    """A share with its interval; NaN where nothing was counted."""

    value: float
    lo: float
    hi: float
    n: int
    """Of what it is a share."""

    @property
    def text(self) -> str:
        """For people, e.g. ``.031 [.012, .077] of 160``."""
        if self.n == 0:
            return "nothing to count"
        value, lo, hi = (f"{number:.3f}" for number in self[:3])
        return f"{value} [{lo}, {hi}] of {self.n}"


class Counts(NamedTuple):
    """Hits among what was counted, as sums over latents: all that an interval needs.

    ``h`` and ``n`` are the hits and the number counted of one latent.
    """

    n_latents: float = 0.0
    hits: float = 0.0
    """Sum of ``h``, which may be a mean of classes times ``n``."""
    n: float = 0.0
    """Sum of ``n``."""
    hits_squared: float = 0.0
    """Sum of ``h * h``."""
    hits_n: float = 0.0
    """Sum of ``h * n``."""
    n_squared: float = 0.0
    """Sum of ``n * n``."""

    @classmethod
    def of(
        cls, hits: Float64[np.ndarray, " latent"], n: Float64[np.ndarray, " latent"]
    ) -> "Counts":
        """From what was counted latent by latent; every ``n`` is above 0."""
        h, m = hits.sum(), n.sum()
        squares = (hits @ hits, hits @ n, n @ n)
        return cls._make(map(float, (len(n), h, m, *squares)))

    @classmethod
    def together(cls, counts: Iterable["Counts"]) -> "Counts":
        """Those of several places; no latent is in two."""
        return cls._make(sum(column) for column in zip(cls(), *counts, strict=True))

    def share(self, confidence: float = CONFIDENCE) -> Share:
        """Hits over all, and its interval."""
        if self.n == 0:
            return Share(np.nan, np.nan, np.nan, 0)
        value = self.hits / self.n
        most = self.n_squared / self.n  # if all of a latent goes wrong together
        n, effect, n_latents, largest = np.array(
            [[self.n], [self._design_effect(value)], [self.n_latents], [most]], dtype=np.float64
        )
        size = effective_size(n, effect, n_latents, largest, confidence)
        interval = wilson(np.array([value]), size, confidence)
        return Share(value, float(interval.lo[0]), float(interval.hi[0]), round(self.n))

    def _design_effect(self, value: float) -> float:
        """Variance of the share over latents, by that of as many independent answers.

        Source:
            Cochran, Sampling Techniques (1977), section 3.12: ratio estimate, clusters of any size.
        """
        n, n_latents = self.n, self.n_latents
        alone = value * (1 - value) / n
        if n_latents < 2 or alone <= 0:
            return np.nan
        # The sum of (h - value * n) ** 2; all but nothing of it may be lost to rounding.
        spread = self.hits_squared - 2 * value * self.hits_n + value**2 * self.n_squared
        spread *= n_latents / (n_latents - 1)
        return max(spread, 0.0) / n**2 / alone


class Held(NamedTuple):
    """Shares of several groups of what was counted, held against a bound."""

    whole: Mapping[str, Share]
    """By group, of all its places together."""
    passed: bool
    """No whole, no layer and no place is surely beyond the bound."""
    offenders: dict[str, str]
    """By place or layer, and group, that is: its share. The farthest beyond first."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a true share may be."""

    least: float
    most: float
    n_compared: int = 1
    """Places and layers of the whole study: the more there are, the wider each interval is
    (Bonferroni), so that many sound places do not make a false alarm, and which of them a run looks
    at changes no verdict."""

    def held(self, groups: Mapping[str, Mapping[Cell, Counts]]) -> Held:
        """Whether shares lie within, as far as the counts can tell.

        Args:
            groups: By explainer or scorer, what was counted at each place. What is empty passes.
        """
        confidence = 1 - (1 - CONFIDENCE) / max(self.n_compared, 1)
        whole = {group: Counts.together(of.values()) for group, of in groups.items()}
        beyond: dict[str, tuple[float, str]] = {}
        for group, of in groups.items():
            for place, counts in _with_layers(of).items():
                share = counts.share(confidence)
                beyond[f"{place} {group}".strip()] = (self._beyond(share), share.text)
        worst = sorted((name for name, (by, _) in beyond.items() if by > 0), key=beyond.__getitem__)
        surely = [self._beyond(counts.share(confidence)) > 0 for counts in whole.values()]
        return Held(
            {group: counts.share() for group, counts in whole.items()},
            not (worst or any(surely)),
            {name: beyond[name][1] for name in reversed(worst)},
        )

    def _beyond(self, share: Share) -> float:
        """By how much an interval lies outside, else at most 0; 0 where nothing was counted."""
        return max(share.lo - self.most, self.least - share.hi) if share.n else 0.0


def _with_layers(places: Mapping[Cell, Counts]) -> dict[str, Counts]:
    """The places, and each layer of several of them together."""
    layers: dict[str, list[Counts]] = {}
    for cell, counts in places.items():
        layers.setdefault(str(cell.layer), []).append(counts)
    several = {layer: Counts.together(of) for layer, of in layers.items() if len(of) > 1}
    return {**{str(cell): counts for cell, counts in places.items()}, **several}
