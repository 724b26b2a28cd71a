"""A few windows in which each neighbour fires, to draw negatives of kind ``neighbour`` from.

One pass over the activations of the layer; of each latent only the windows drawn so far are held.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Float32, Int64, UInt64

from autointerp_dagster.core.grouping import number_in_group
from autointerp_dagster.core.rng import address_key, hash_priority
from autointerp_dagster.core.schemas import NEIGHBOUR_WINDOWS
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LayerKey

_PURPOSE = "neighbour windows"


class DrawnWindows(NamedTuple):
    """Non-zeros of some latents inside of the windows drawn, ascending by the first three."""

    latent: Int64[np.ndarray, " row"]
    window_id: UInt64[np.ndarray, " row"]
    """``context << 16 | start``, on the grid of fixed windows."""
    offset: Int64[np.ndarray, " row"]
    """Position in the window."""
    activation: Float32[np.ndarray, " row"]

    @classmethod
    def concat(cls, parts: list["DrawnWindows"]) -> "DrawnWindows":
        """Several parts as one; they must be in order."""
        nothing = cls(
            np.zeros(0, np.int64), np.zeros(0, np.uint64), np.zeros(0, np.int64),
            np.zeros(0, np.float32),
        )  # fmt: skip
        return cls(*map(np.concatenate, zip(nothing, *parts, strict=True)))

    @property
    def is_first(self) -> Bool[np.ndarray, " row"]:
        """Whether a window starts with the row."""
        differs = np.ones(len(self.latent), dtype=bool)
        differs[1:] = (self.latent[1:] != self.latent[:-1]) | (
            self.window_id[1:] != self.window_id[:-1]
        )
        return differs

    def where(self, is_kept: Bool[np.ndarray, " row"]) -> "DrawnWindows":
        """Only some of the rows."""
        return DrawnWindows(*(column[is_kept] for column in self))

    def of(self, latents: Int64[np.ndarray, " latent"]) -> "DrawnWindows":
        """Only the rows of these latents."""
        return self.where(np.isin(self.latent, latents))


@dataclass(frozen=True, slots=True)
class WindowDraw:
    """Which windows are drawn of which latents."""

    dataset: TokenDataset
    layer: LayerKey
    window_len: int
    n_windows: int
    """Per latent, at most."""
    seed: int
    latents: Int64[np.ndarray, " latent"]
    """Ascending, each once."""
    key: UInt64[np.ndarray, " latent"] = field(init=False)
    """Address of each latent's draw; of nothing else, so a window is drawn whatever the cell."""

    def __post_init__(self) -> None:
        keys = [address_key(self.seed, self.layer, g, _PURPOSE) for g in self.latents.tolist()]
        object.__setattr__(self, "key", np.array(keys, dtype=np.uint64))

    def wanted(self, frame: pl.DataFrame) -> DrawnWindows:
        """What of a frame is of a wanted latent and inside of a whole window."""
        latent = frame["latent"].to_numpy().astype(np.int64)
        slot = np.searchsorted(self.latents, latent)
        is_wanted = self.latents[np.minimum(slot, len(self.latents) - 1)] == latent
        context = frame["context"].to_numpy()[is_wanted].astype(np.int64)
        position = frame["position"].to_numpy()[is_wanted].astype(np.int64)
        start = position // self.window_len * self.window_len
        length = np.diff(self.dataset.offsets)[context]
        rows = DrawnWindows(
            latent[is_wanted],
            (context << 16 | start).astype(np.uint64),
            position - start,
            frame["activation"].to_numpy()[is_wanted],
        )
        return rows.where(start + self.window_len <= length)

    def drawn(self, rows: DrawnWindows) -> DrawnWindows:
        """The rows of the first ``n_windows`` windows of each latent, by hashed priority."""
        is_first = rows.is_first
        latent, window = rows.latent[is_first], rows.window_id[is_first]
        key = self.key[np.searchsorted(self.latents, latent)]
        order = np.lexsort((window, hash_priority(key, window), latent))
        is_drawn = np.empty(len(latent), dtype=bool)
        is_drawn[order] = number_in_group(latent) < self.n_windows
        return rows.where(is_drawn[np.cumsum(is_first) - 1])


def drawn_windows(frames: Iterable[pl.DataFrame], draw: WindowDraw) -> DrawnWindows:
    """Draw the windows of all wanted latents in one pass.

    Args:
        frames: ``schemas.ACTIVATIONS`` of the layer, ascending; a frame may end inside a latent or
            a window.
        draw: What is wanted.
    """
    if not len(draw.latents):
        return DrawnWindows.concat([])
    return DrawnWindows.concat(list(_drawn_parts(frames, draw)))


def _drawn_parts(frames: Iterable[pl.DataFrame], draw: WindowDraw) -> Iterator[DrawnWindows]:
    """Finished latents; of the last one what is drawn so far is held, and its last window."""
    held = DrawnWindows.concat([])
    for frame in frames:
        rows = DrawnWindows.concat([held, draw.wanted(frame)])
        if not len(rows.latent):
            continue
        is_last = rows.latent == rows.latent[-1]
        yield draw.drawn(rows.where(~is_last))
        last = rows.where(is_last)
        is_open = last.window_id == last.window_id[-1]
        held = DrawnWindows.concat([draw.drawn(last.where(~is_open)), last.where(is_open)])
    yield draw.drawn(held)


def neighbour_windows_table(rows: DrawnWindows, window_len: int, layer: LayerKey) -> pl.DataFrame:
    """``schemas.NEIGHBOUR_WINDOWS``: every window with the latent's activation at each position."""
    is_first = rows.is_first
    window = np.cumsum(is_first) - 1
    activations = np.zeros((int(is_first.sum()), window_len), dtype=np.float32)
    activations[window, rows.offset] = rows.activation
    frame = pl.DataFrame(
        {
            "latent": rows.latent[is_first],
            "window_id": rows.window_id[is_first],
            "activations": pl.Series(
                activations, dtype=pl.Array(pl.Float32, window_len)
            ).arr.to_list(),
        }
    )
    return NEIGHBOUR_WINDOWS.conform(frame, layer)
