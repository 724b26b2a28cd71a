"""What the explainer and the judge may see of each latent: windows with their split, statistics."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32

from autointerp_dagster.core.schemas import LatentStatus, NegativeKind, Split
from autointerp_dagster.core.types import LatentId


@dataclass(frozen=True, slots=True)
class Window:
    """One window of a latent, as it may be shown."""

    window_id: int
    """``context << 16 | start``."""
    context: int
    start: int
    """First position of the window in its context (BOS may be hidden, see ``tokens``)."""
    split: Split
    is_activating: bool
    negative_kind: NegativeKind | None
    """Null for an activating window."""
    quantile: int | None
    """0 strongest; null for a non-activating window."""
    rank: int
    """Order in which windows of this split and class are used."""
    tokens: Int32[np.ndarray, " position"]
    """The visible tokens: BOS is left out, so one fewer than the window length at times."""
    activations: Float32[np.ndarray, " position"]
    """One per visible token, >= 0; all 0 for a non-activating window."""


@dataclass(frozen=True, slots=True)
class LatentRecord:
    """Everything known of one latent before it is explained."""

    latent: LatentId
    status: LatentStatus
    max_activation: float | None
    """Largest activation in the cache; null for a dead latent."""
    top_tokens: tuple[int, ...]
    """Token ids by summed activation over train windows, descending; at most 8."""
    top_token_shares: tuple[float, ...]
    """Their shares of the summed activation, in (0, 1]."""
    windows: tuple[Window, ...]
    """By (split, class, rank); empty unless ``status`` is ``ok``."""

    def activating(self, split: Split) -> tuple[Window, ...]:
        """The activating windows of a split, by rank."""
        return tuple(w for w in self.windows if w.split == split and w.is_activating)

    def non_activating(self, split: Split) -> tuple[Window, ...]:
        """The non-activating windows of a split, by rank."""
        return tuple(w for w in self.windows if w.split == split and not w.is_activating)
