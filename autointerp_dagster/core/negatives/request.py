"""What is asked of those who draw negatives, and what they give back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import polars as pl
from jaxtyping import Bool, Int64, UInt64

from autointerp_dagster.core.negatives.token_windows import TokenWindows
from autointerp_dagster.core.windows import WindowGrid

Rows = Int64[np.ndarray, " row"]
Question = Callable[[Rows, Rows], Bool[np.ndarray, " row"]]
"""Asked about rows of (latent, window); true where the answer is yes."""


@dataclass(frozen=True, slots=True)
class NegativeRequest:
    """The negatives wanted of one split, for all latents of a block at once."""

    grid: WindowGrid
    """The windows to draw from."""
    split: int
    """Index into ``windows.SPLITS``: no window of another split is drawn."""
    n_wanted: int
    """Per latent, all kinds together; a latent without activating windows gets none."""
    latent: Int64[np.ndarray, " activating"]
    """Of each activating window chosen in this split: from 0 at the start of the block."""
    window: Int64[np.ndarray, " activating"]
    """Index into the grid; in ``centred`` mode the grid's window that holds the maximum."""
    rank: Int64[np.ndarray, " activating"]
    """Order of drawing within a latent, from 0 without gaps."""
    top_token: Int64[np.ndarray, " latent"]
    """The token with the largest summed activation over train windows; -1: none."""
    key: UInt64[np.ndarray, " latent"]
    """Address of each latent's draw."""
    active: Question
    """Whether the latent is active there (the window, or its context)."""
    repeats: Question | None
    """Whether the window nearly repeats one of an earlier split, or an activating one of this
    split; null: no question."""


class Negatives(NamedTuple):
    """Non-activating windows. A window may be there twice for a latent, as two kinds."""

    latent: Int64[np.ndarray, " row"]
    window: Int64[np.ndarray, " row"]
    """Index into the grid."""
    kind: Int64[np.ndarray, " row"]
    """Index into the kinds asked for."""
    source: Int64[np.ndarray, " row"]
    """Row of ``NegativeSources.neighbour_windows`` for kind ``neighbour``; else -1."""
    n_near_duplicates: Int64[np.ndarray, " latent"]
    """Per latent, how many were passed over because ``NegativeRequest.repeats`` said so."""


@runtime_checkable
class SimilarWindows(Protocol):
    """Finds windows whose text is near that of another."""

    def nearest(self, window: Rows, split: int) -> Int64[np.ndarray, "row found"]:
        """Windows of the split, the nearest first, without the window itself; padded with -1."""
        ...


@dataclass(frozen=True, slots=True)
class NegativeSources:
    """What the hard kinds are drawn from; each is needed only if its kind is asked for."""

    neighbours: pl.DataFrame | None = None
    """``schemas.NEIGHBOURS`` of the block's latents, of one measure."""
    neighbour_windows: pl.DataFrame | None = None
    """``schemas.NEIGHBOUR_WINDOWS`` of their neighbours, sorted by key."""
    similar: SimilarWindows | None = None
    token_windows: TokenWindows | None = None
    """Which windows of the grid show a token."""
    first_latent: int = 0
    """Which latent of the layer the block starts with: what is 0 in a request."""
