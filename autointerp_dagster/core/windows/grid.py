"""The window grid: contexts cut into windows, each in one split.

1. A context is cut at multiples of the window length; only whole windows count.
2. A document's contexts go, in blocks, to one split each, by a hash of content and block number.
"""

from dataclasses import dataclass
from typing import NamedTuple, get_args

import numpy as np
import polars as pl
from jaxtyping import Int8, Int64, Integer, UInt64

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.rng import address_key
from autointerp_dagster.core.schemas import Split
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.windows.grams import tail_hashes
from autointerp_dagster.core.windows.shingles import Shingles, shingles_of

SPLITS: tuple[Split, ...] = get_args(Split)
"""Names of the split codes: 0 ``train``, 1 ``select``, 2 ``test``."""

N_TAIL = 4
"""Tokens that tell most texts apart, so that few are hashed whole."""


class Strata(NamedTuple):
    """The windows of one split at one place in their contexts, one stratum after another."""

    members: Int64[np.ndarray, " window"]
    """Windows by stratum ``split * n_places + place``, ascending within each."""
    first: Int64[np.ndarray, " boundary"]
    """Members of stratum ``i`` are ``first[i] .. first[i + 1]``."""
    n_places: int


@dataclass(frozen=True, slots=True)
class WindowGrid:
    """Every window of a token dataset, in order of (context, start), with its split."""

    window_len: int
    first_visible: int
    """Positions below it hold BOS: never shown, never active."""
    n_kept_tokens: int
    """Positions at which activations are kept: all but BOS, also those in no whole window."""
    first_window: Int64[np.ndarray, " boundary"]
    """Windows of context ``i`` are ``first_window[i] .. first_window[i + 1]``."""
    context: Int64[np.ndarray, " window"]
    start: Int64[np.ndarray, " window"]
    """First position in the context: a multiple of ``window_len``."""
    split: Int8[np.ndarray, " window"]
    """Index into :data:`SPLITS`."""
    block: Int64[np.ndarray, " window"]
    """Which document block it belongs to; documents of equal content share their blocks."""
    place: Int64[np.ndarray, " window"]
    """Index of each window in its context."""
    window_id: UInt64[np.ndarray, " window"]
    """``context << 16 | start``: what names a window in tables and in hashes."""
    strata: Strata
    shingles: Shingles | None
    """Null where near-duplicates are not looked for, or not among the grid's windows alone."""
    tail: UInt64[np.ndarray, " window"] | None
    """A hash of the last ``N_TAIL`` tokens; null where near-duplicates are looked for."""

    @property
    def n_windows(self) -> int:
        """Windows in the grid."""
        return len(self.context)

    def window_at(
        self, context: Int64[np.ndarray, " token"], position: Integer[np.ndarray, " token"]
    ) -> Int64[np.ndarray, " token"]:
        """The window that holds each (context, position); -1 past a context's last whole one."""
        window = self.first_window[context]
        # Of short integers a division is 10 times as fast; no position is beyond 65,535.
        window += np.floor_divide(position, self.window_len, dtype=np.uint32, casting="unsafe")
        np.copyto(window, -1, where=window >= self.first_window[1:][context])
        return window


def window_grid(dataset: TokenDataset, config: SamplingConfig) -> WindowGrid:
    """The windows of a token dataset; no draw and no latent enters.

    Documents that are appended to the dataset change neither windows nor splits of the others.

    Raises:
        ValueError: If a context is longer than 65,536 tokens, which no window id can address, or
            the dataset's tables disagree.
    """
    lengths = np.diff(dataset.offsets)
    if dataset.contexts.height != len(lengths):
        raise ValueError(
            f"token dataset: {dataset.contexts.height} context rows for {len(lengths)} contexts."
        )
    if len(lengths) and lengths.max() > 65_536:
        raise ValueError(f"token dataset: a context of {lengths.max()} tokens; at most 65536 fit.")
    n_windows = lengths // config.window_len
    first_window = np.concatenate([[0], np.cumsum(n_windows)]).astype(np.int64)
    context = np.repeat(np.arange(len(lengths), dtype=np.int64), n_windows)
    place = np.arange(len(context)) - first_window[context]
    start = place * config.window_len
    block, split_of_block = _context_blocks(dataset, config)
    split = split_of_block[block[context]]
    return WindowGrid(
        window_len=config.window_len,
        first_visible=dataset.first_visible,
        n_kept_tokens=int(np.maximum(lengths - dataset.first_visible, 0).sum()),
        first_window=first_window,
        context=context,
        start=start,
        split=split,
        block=block[context],
        place=place,
        window_id=(context << 16 | start).astype(np.uint64),
        strata=_strata(split, place),
        shingles=_shingles(dataset, context, start, config),
        tail=_tail(dataset, context, start, config),
    )


def _strata(split: Int8[np.ndarray, " window"], place: Int64[np.ndarray, " window"]) -> Strata:
    n_places = int(place.max(initial=-1)) + 1
    stratum = split.astype(np.int64) * n_places + place
    sizes = np.bincount(stratum, minlength=len(SPLITS) * n_places)
    first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Strata(np.argsort(stratum, kind="stable"), first, n_places)


def _shingles(
    dataset: TokenDataset,
    context: Int64[np.ndarray, " window"],
    start: Int64[np.ndarray, " window"],
    config: SamplingConfig,
) -> Shingles | None:
    threshold = config.near_duplicate_jaccard
    if threshold is None or config.window_mode == "centred":
        return None
    return shingles_of(dataset, context, start, config.window_len, threshold)


def _tail(
    dataset: TokenDataset,
    context: Int64[np.ndarray, " window"],
    start: Int64[np.ndarray, " window"],
    config: SamplingConfig,
) -> UInt64[np.ndarray, " window"] | None:
    if config.near_duplicate_jaccard is not None:
        return None
    return tail_hashes(dataset, context, start, config.window_len, N_TAIL)


def context_splits(dataset: TokenDataset, config: SamplingConfig) -> Int8[np.ndarray, " context"]:
    """The split of each context, an index into :data:`SPLITS`: that of all of its windows.

    A context that is too short for a window has one, too.
    """
    block, split = _context_blocks(dataset, config)
    return split[block]


def _context_blocks(
    dataset: TokenDataset, config: SamplingConfig
) -> tuple[Int64[np.ndarray, " context"], Int8[np.ndarray, " block"]]:
    """The block of each context, and the split of each block.

    Block 0 is drawn alike for a short and a long document, so a last document that grows when
    tokens are appended keeps the split of its first contexts.
    """
    contexts = (
        dataset.contexts.sort("context")
        .with_columns(number=pl.int_range(pl.len()).over("document") // config.split_block)
        .join(dataset.documents, on="document", how="left", maintain_order="left")
    )
    if contexts["content_hash"].null_count():
        raise ValueError("token dataset: a context belongs to a document without content hash.")
    keyed = contexts.select("content_hash", "number")
    blocks = keyed.unique(maintain_order=True).with_row_index("block")
    block = keyed.join(blocks, on=["content_hash", "number"], how="left", maintain_order="left")
    draws = np.array(
        [
            address_key(config.seed, None, None, f"split\0{content_hash}\0{number}")
            for _, content_hash, number in blocks.iter_rows()
        ],
        dtype=np.float64,
    )
    bounds = np.array([config.train_share, config.train_share + config.select_share])
    split = np.searchsorted(bounds, draws / 2.0**64, side="right").astype(np.int8)
    return block["block"].to_numpy().astype(np.int64), split


def check_splits(
    grid: WindowGrid, window: Int64[np.ndarray, " row"], split: Int64[np.ndarray, " row"]
) -> None:
    """Verify that each document block is in its own split alone, whatever drew the windows.

    Args:
        grid: Knows the blocks.
        window: Of each row, an index into the grid.
        split: What each was drawn for, not what the grid says of it.

    Raises:
        RuntimeError: If one is not; a bug here, never a fault of the data.
    """
    seen = np.full(int(grid.block.max(initial=-1)) + 1, -1, dtype=np.int64)
    blocks = grid.block[window]
    seen[blocks] = split
    other = np.where(seen[blocks] != split, seen[blocks], grid.split[window])
    wrong = np.flatnonzero(other != split)
    if len(wrong):
        at = window[wrong[0]]
        raise RuntimeError(
            f"context {grid.context[at]} window at {grid.start[at]}: its document block is in "
            f"{SPLITS[split[wrong[0]]]} and in {SPLITS[other[wrong[0]]]}. Report this bug."
        )
