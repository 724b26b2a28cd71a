"""What is asked of candidates: is the latent active there, do they repeat what was shown?"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.latent_records.firing import ActiveWindows, FiringTokens
from autointerp_dagster.core.negatives import Question, Rows
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.windows import (
    N_TAIL,
    Spans,
    WindowGrid,
    near_duplicates,
    repeating_spans,
    tail_hashes,
)


class Shown(NamedTuple):
    """Windows that an explainer may see, or that are compared with them."""

    latent: Rows
    window: Rows
    """Index into the grid, also of what is not shown as the grid cuts it."""
    start: Rows
    """First position of what is shown."""

    @classmethod
    def none(cls) -> "Shown":
        """No windows."""
        return cls(*(np.zeros(0, np.int64) for _ in cls._fields))

    def extended(self, more: "Shown") -> "Shown":
        """These and some more."""
        return Shown(*(np.concatenate(both) for both in zip(self, more, strict=True)))

    def at(self, rows: Rows) -> "Shown":
        """Some of the windows."""
        return Shown(*(column[rows] for column in self))

    def spans(self, grid: WindowGrid) -> Spans:
        """Where they are, for windows that are not all on the grid."""
        return Spans(self.latent, grid.context[self.window], self.start)


Repeats = Callable[[Shown], Bool[np.ndarray, " row"]]


def near_repeats(
    dataset: TokenDataset, grid: WindowGrid, config: SamplingConfig, shown: Shown
) -> Repeats | None:
    """Whether a latent's window nearly repeats a shown one of it; null: not looked for.

    Raises:
        ValueError: If the grid was made without what is compared.
    """
    threshold = config.near_duplicate_jaccard
    if threshold is None:
        return None
    if config.window_mode == "centred":
        return lambda asked: repeating_spans(
            dataset, grid.window_len, threshold, shown.spans(grid), asked.spans(grid)
        )
    shingles = grid.shingles
    if shingles is None:
        raise ValueError("near_duplicate_jaccard: wanted a grid that was made with this sampling.")
    return lambda asked: near_duplicates(shingles, shown[:2], asked[:2])


def same_texts(dataset: TokenDataset, grid: WindowGrid, shown: Shown) -> Question:
    """Whether a window of the grid has the very tokens that a shown one of its latent shows.

    Exact but for collisions of 64-bit hashes.

    Raises:
        ValueError: If the grid was made without what is compared.
    """
    tail = grid.tail
    if tail is None:
        raise ValueError("same_texts: wanted a grid that was made with this sampling.")
    known = _text_keys(dataset, grid, shown, N_TAIL)
    in_order = np.sort(known)

    def is_same(latent: Rows, window: Rows) -> Bool[np.ndarray, " row"]:
        keys = tail[window] + _of_latent(latent)
        found = _contains(in_order, keys)
        rows = np.flatnonzero(found)
        alike = shown.at(np.flatnonzero(_contains(np.sort(keys[rows]), known)))
        asked = Shown(latent[rows], window[rows], grid.start[window[rows]])
        whole, whole_keys = (
            _text_keys(dataset, grid, some, grid.window_len) for some in (alike, asked)
        )
        found[rows] = _contains(np.sort(whole), whole_keys)
        return found

    return is_same


def _text_keys(
    dataset: TokenDataset, grid: WindowGrid, shown: Shown, n_last: int
) -> UInt64[np.ndarray, " row"]:
    """A hash of the latent and the last tokens of each window."""
    context = grid.context[shown.window]
    tail = tail_hashes(dataset, context, shown.start, grid.window_len, n_last)
    return tail + _of_latent(shown.latent)


def _of_latent(latent: Rows) -> UInt64[np.ndarray, " row"]:
    return latent.astype(np.uint64) * np.uint64(0xD1342543DE82EF95)


def on_grid(repeats: Repeats, grid: WindowGrid) -> Question:
    """The same question about windows of the grid."""
    return lambda latent, window: repeats(Shown(latent, window, grid.start[window]))


def activity(
    firing: FiringTokens, active: ActiveWindows, grid: WindowGrid, config: SamplingConfig
) -> Question:
    """Whether a latent is active in a window, or in its context, as ``silent_scope`` says."""
    if config.silent_scope == "window":
        windows = active.latent * grid.n_windows + active.window
        return lambda latent, window: _contains(windows, latent * grid.n_windows + window)
    n_contexts = len(grid.first_window) - 1
    contexts = np.unique(firing.latent * n_contexts + firing.context)
    return lambda latent, window: _contains(contexts, latent * n_contexts + grid.context[window])


def or_meeting(active: Question, shown: Shown, grid: WindowGrid) -> Question:
    """Whether it is active there, or a shown window of the latent has a token of it."""
    context = grid.context[shown.window]
    last = grid.first_window[context + 1] - 1
    ends = np.concatenate([shown.start, shown.start + grid.window_len - 1])
    met = np.minimum(
        np.tile(grid.first_window[context], 2) + ends // grid.window_len, np.tile(last, 2)
    )
    met = np.unique(np.tile(shown.latent, 2) * grid.n_windows + met)
    return lambda latent, window: (
        active(latent, window) | _contains(met, latent * grid.n_windows + window)
    )


def _contains(
    sorted_keys: Int64[np.ndarray, " key"] | UInt64[np.ndarray, " key"],
    asked: Int64[np.ndarray, " row"] | UInt64[np.ndarray, " row"],
) -> Bool[np.ndarray, " row"]:
    if not len(sorted_keys):
        return np.zeros(len(asked), dtype=bool)
    at = np.minimum(np.searchsorted(sorted_keys, asked), len(sorted_keys) - 1)
    return sorted_keys[at] == asked
