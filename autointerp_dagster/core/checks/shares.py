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


@dataclass(frozen=True, slots=True)
class Counts:
    """Hits among what was counted, latent by latent."""

    hits: Float64[np.ndarray, " latent"]
    """Whole, or a mean of classes times ``n``."""
    n: Float64[np.ndarray, " latent"]
    """All above 0."""

    @classmethod
    def together(cls, counts: Iterable["Counts"]) -> "Counts":
        """Those of several places; no latent is in two."""
        parts = list(counts)
        empty = [np.empty(0)]
        return cls(
            np.concatenate(empty + [part.hits for part in parts]),
            np.concatenate(empty + [part.n for part in parts]),
        )

    def share(self, confidence: float = CONFIDENCE) -> Share:
        """Hits over all, and its interval."""
        n = float(self.n.sum())
        if n == 0:
            return Share(np.nan, np.nan, np.nan, 0)
        value = float(self.hits.sum()) / n
        together = (self.n**2).sum() / n  # if all that is counted of a latent goes wrong at once
        size = effective_size(
            np.array([n]),
            np.array([self._design_effect(value)]),
            np.array([float(len(self.n))]),
            np.array([together]),
            confidence,
        )
        interval = wilson(np.array([value]), size, confidence)
        return Share(value, float(interval.lo[0]), float(interval.hi[0]), round(n))

    def _design_effect(self, value: float) -> float:
        """Variance of the share over latents, by that of as many independent answers.

        Source:
            Cochran, Sampling Techniques (1977), section 3.12: ratio estimate, clusters of any size.
        """
        n, n_latents = self.n.sum(), len(self.n)
        alone = value * (1 - value) / n
        if n_latents < 2 or alone <= 0:
            return np.nan
        spread = ((self.hits - value * self.n) ** 2).sum() * n_latents / (n_latents - 1)
        return float(spread / n**2 / alone)


class Held(NamedTuple):
    """Shares of several places, held against a bound."""

    whole: Share
    """Of all of them together."""
    passed: bool
    """Neither the whole nor a place is surely beyond the bound."""
    offenders: dict[str, str]
    """By place that is: its share. The farthest beyond first."""


def held(places: Mapping[str, Counts], least: float, most: float) -> Held:
    """Whether shares lie within bounds, as far as the counts can tell.

    Args:
        places: What was counted at each. One without counts is let through.
        least: Lower bound of the true share.
        most: Upper bound.

    Returns:
        The intervals of places are wider the more there are (Bonferroni), so that many sound
        places do not make a false alarm.
    """
    counted = {place: counts for place, counts in places.items() if counts.n.size}
    confidence = 1 - (1 - CONFIDENCE) / max(len(counted), 1)
    shares = {place: counts.share(confidence) for place, counts in counted.items()}
    beyond = {place: max(one.lo - most, least - one.hi) for place, one in shares.items()}
    worst = sorted((p for p, by in beyond.items() if by > 0), key=lambda p: -beyond[p])
    whole = Counts.together(places.values()).share()
    is_beyond = whole.lo > most or whole.hi < least  # false where nothing was counted
    return Held(whole, not (worst or is_beyond), {p: shares[p].text for p in worst})
