"""What each scorer's verdicts say, which metric stands for it, and what guessing would score."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FamilyKind = Literal["labels", "ranking", "correlation", "trials", "nats"]
"""``labels``: windows called activating or not; ``ranking``: windows with a score only;
``correlation``: a predicted activation per token; ``trials``: questions answered right or wrong;
``nats``: a difference of log-probabilities per prompt."""


@dataclass(frozen=True, slots=True)
class Family:
    """How the verdicts of a scorer are measured."""

    kind: FamilyKind
    headline: str
    """The one metric that stands for the scorer."""
    chance: float | None
    """Its expected value for a scorer that knows nothing; null where nobody knows it."""
    needs_explanation: bool = True
    """Else its rows have no explainer, and there is nothing to swap for a floor."""

    @property
    def has_cut(self) -> bool:
        """Whether one cut of the headline metric tells interpretable latents from others.

        Balanced accuracies and areas under the ROC curve share a scale, and are the explanation's.
        """
        return self.needs_explanation and self.kind in ("labels", "ranking")


FAMILIES: Mapping[str, Family] = {
    "detection": Family("labels", "balanced_accuracy", 0.5),
    "fuzzing": Family("labels", "balanced_accuracy", 0.5),
    "surprisal": Family("ranking", "auroc", 0.5),
    "embedding": Family("ranking", "auroc", 0.5),
    "simulation": Family("correlation", "r_activating", 0.0),
    "intruder": Family("trials", "accuracy", 0.2, needs_explanation=False),
    "example_embedding": Family("ranking", "auroc", 0.5, needs_explanation=False),
    "intervention": Family("nats", "mean_nats", None),
}
"""By scorer. An intruder is one window of five. Steered text makes any statement more or less
surprising, also one that has nothing to do with the latent: intervention is read against its floor
alone."""

HEADLINE: Mapping[str, str] = {name: family.headline for name, family in FAMILIES.items()}
"""The one metric of each scorer that stands for it."""

CHANCE: Mapping[str, float | None] = {name: family.chance for name, family in FAMILIES.items()}
"""Expected headline metric of each scorer that knows nothing; null where nobody knows it."""
