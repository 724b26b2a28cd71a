"""The window grid: contexts cut into windows, each in one split; windows that nearly repeat.

1. A context is cut at multiples of the window length; only whole windows count.
2. A document's contexts go, in blocks, to one split each, by a hash of content and block number.
3. Windows that could nearly repeat another are found once for the grid, by their token 8-grams.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import numpy as np
import polars as pl
from jaxtyping import Bool, Float64, Int, Int8, Int32, Int64, UInt64

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.rng import address_key, hash_priority
from autointerp_dagster.core.schemas import Split
from autointerp_dagster.core.tokens import TokenDataset

SPLITS: tuple[Split, ...] = get_args(Split)
"""Names of the split codes: 0 ``train``, 1 ``select``, 2 ``test``."""

GRAM_LEN = 8
"""Tokens per n-gram; fewer if a window shows fewer."""

_PAIRS_AT_ONCE = 1_000_000
_NO_GRAM = np.iinfo(np.int32).max


@dataclass(frozen=True, slots=True)
class Shingles:
    """The n-grams of those windows that may nearly repeat another; most windows have no row.

    A window is left out if so many of its n-grams occur nowhere else that no window can reach the
    threshold with it, so the work grows with the repetition in the corpus, not with its size.
    """

    threshold: float
    """Jaccard similarity at which two windows are near-duplicates."""
    row: Int32[np.ndarray, " window"]
    """The window's row below; -1: it is no window's near-duplicate."""
    grams: Int32[np.ndarray, "row gram"]
    """Distinct n-grams that occur elsewhere too, the rarest first (ascending ids), then padding."""
    n_grams: Int32[np.ndarray, " row"]
    """All distinct n-grams of the window, those that occur nowhere else too."""
    n_prefix: Int32[np.ndarray, " row"]
    """Of ``grams``, how many must be compared: near-duplicates share one of their first ones."""


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
    shingles: Shingles

    @property
    def n_windows(self) -> int:
        """Windows in the grid."""
        return len(self.context)

    @property
    def place(self) -> Int64[np.ndarray, " window"]:
        """Index of each window in its context."""
        return self.start // self.window_len

    @property
    def window_id(self) -> UInt64[np.ndarray, " window"]:
        """``context << 16 | start``: what names a window in tables and in hashes."""
        return (self.context << 16 | self.start).astype(np.uint64)

    def window_at(
        self, context: Int64[np.ndarray, " token"], position: Int64[np.ndarray, " token"]
    ) -> Int64[np.ndarray, " token"]:
        """The window that holds each (context, position); -1 past a context's last whole one."""
        window = self.first_window[context] + position // self.window_len
        return np.where(window < self.first_window[context + 1], window, -1)


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
    start = (np.arange(len(context)) - first_window[context]) * config.window_len
    block, split = _context_blocks(dataset, config)
    return WindowGrid(
        window_len=config.window_len,
        first_visible=dataset.first_visible,
        n_kept_tokens=int(np.maximum(lengths - dataset.first_visible, 0).sum()),
        first_window=first_window,
        context=context,
        start=start,
        split=split[block[context]],
        block=block[context],
        shingles=_shingles(dataset, context, start, config),
    )


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
    """Verify that no document block is in two splits, whatever drew the windows.

    Raises:
        RuntimeError: If one is; a bug here, never a fault of the data.
    """
    seen = np.full(int(grid.block.max(initial=-1)) + 1, -1, dtype=np.int64)
    blocks = grid.block[window]
    seen[blocks] = split
    wrong = np.flatnonzero(seen[blocks] != split)
    if len(wrong):
        at = window[wrong[0]]
        raise RuntimeError(
            f"context {grid.context[at]} window at {grid.start[at]}: its document block is in "
            f"{SPLITS[split[wrong[0]]]} and in {SPLITS[seen[blocks[wrong[0]]]]}. Report this bug."
        )


def near_duplicates(
    shingles: Shingles,
    train: tuple[Int64[np.ndarray, " shown"], Int64[np.ndarray, " shown"]],
    candidates: tuple[Int64[np.ndarray, " row"], Int64[np.ndarray, " row"]],
) -> Bool[np.ndarray, " row"]:
    """Which candidates nearly repeat a train window of the same latent.

    Two windows do if the Jaccard similarity of their sets of token 8-grams (BOS left out) is at
    least the threshold; exact but for collisions of 64-bit hashes.

    Args:
        shingles: Of the grid.
        train: Latent and window index of what the explainer may see, in any order.
        candidates: Latent and window index of what is to be judged; never a window that is shown.

    Source:
        Prefix filtering: Chaudhuri, Ganti and Kaushik 2006; Bayardo, Ma and Srikant 2007.
    """
    repeats = np.zeros(len(candidates[0]), dtype=bool)
    shown = _prefix_grams(shingles, *train)
    asked = _prefix_grams(shingles, *candidates)
    if not (len(shown.key) and len(asked.key)):
        return repeats
    by_key = np.argsort(shown.key, kind="stable")
    keys = shown.key[by_key]
    low = np.searchsorted(keys, asked.key, side="left")
    hits = np.searchsorted(keys, asked.key, side="right") - low
    for part in _parts(hits):
        n = hits[part]
        within = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        other = shown.item[by_key[np.repeat(low[part], n) + within]]
        item = np.repeat(asked.item[part], n)
        rows_a = shingles.row[candidates[1][item]].astype(np.int64)
        pairs, pair_of = np.unique(
            rows_a * len(shingles.grams) + shingles.row[train[1][other]], return_inverse=True
        )
        a, b = np.divmod(pairs, len(shingles.grams))
        alike = _jaccard(shingles, a, b) >= shingles.threshold
        repeats[item[alike[pair_of]]] = True
    return repeats


@dataclass(frozen=True, slots=True)
class _PrefixGrams:
    key: Int64[np.ndarray, " gram"]
    """One number for (latent, n-gram)."""
    item: Int64[np.ndarray, " gram"]
    """Index of the window that has it in the arrays asked for."""


def _prefix_grams(
    shingles: Shingles, latent: Int64[np.ndarray, " row"], window: Int64[np.ndarray, " row"]
) -> _PrefixGrams:
    item = np.flatnonzero(shingles.row[window] >= 0)
    row = shingles.row[window[item]]
    n = shingles.n_prefix[row]
    within = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
    gram = shingles.grams[np.repeat(row, n), within]
    item = np.repeat(item, n)
    return _PrefixGrams(latent[item] << 31 | gram, item)


def _parts(hits: Int64[np.ndarray, " gram"]) -> Iterator[slice]:
    """Slices with about ``_PAIRS_AT_ONCE`` hits each, so that memory stays bounded."""
    total = np.cumsum(hits)
    bounds = np.searchsorted(total, np.arange(_PAIRS_AT_ONCE, total[-1], _PAIRS_AT_ONCE)) + 1
    edges = np.unique(np.concatenate([[0], bounds, [len(hits)]]))
    yield from itertools.starmap(slice, itertools.pairwise(edges.tolist()))


def _jaccard(
    shingles: Shingles, a: Int[np.ndarray, " pair"], b: Int[np.ndarray, " pair"]
) -> Float64[np.ndarray, " pair"]:
    """Exact similarity of the gram sets of rows ``a`` and ``b``."""
    similarity = np.empty(len(a), dtype=np.float64)
    step = max(1, _PAIRS_AT_ONCE // max(1, shingles.grams.shape[1]))
    for start in range(0, len(a), step):
        part = slice(start, start + step)
        both = np.concatenate([shingles.grams[a[part]], shingles.grams[b[part]]], axis=1)
        both.sort(axis=1)
        shared = ((both[:, 1:] == both[:, :-1]) & (both[:, 1:] != _NO_GRAM)).sum(axis=1)
        union = shingles.n_grams[a[part]] + shingles.n_grams[b[part]] - shared
        similarity[part] = shared / union
    return similarity


def _shingles(
    dataset: TokenDataset,
    context: Int64[np.ndarray, " window"],
    start: Int64[np.ndarray, " window"],
    config: SamplingConfig,
) -> Shingles:
    if not len(context):
        no_rows = np.zeros(0, dtype=np.int32)
        return Shingles(
            config.near_duplicate_jaccard, no_rows, np.zeros((0, 1), np.int32), no_rows, no_rows
        )
    gram_len = min(GRAM_LEN, config.window_len - dataset.first_visible)
    hashes = _gram_hashes(dataset.tokens, gram_len)
    per_window = np.lib.stride_tricks.sliding_window_view(hashes, config.window_len - gram_len + 1)
    grams = per_window[dataset.offsets[context] + start]
    visible = start[:, None] + np.arange(grams.shape[1]) >= dataset.first_visible
    order = np.argsort(grams, axis=None)
    order = order[visible.reshape(-1)[order]]
    in_order = grams.reshape(-1)[order]
    run = np.concatenate([[0], np.cumsum(in_order[1:] != in_order[:-1])])
    count = np.bincount(run)
    repeated = count[run] > 1
    n_repeated = np.bincount(order[repeated] // grams.shape[1], minlength=len(context))
    n_unique = visible.sum(axis=1) - n_repeated
    share = config.near_duplicate_jaccard
    may_repeat = (n_repeated > 0) & (n_unique * share <= n_repeated * (1 - share) + 1e-6)
    # Ids ascend with the count: a rare n-gram first makes the shortest lists of pairs to check.
    gram_id = np.empty(len(count), dtype=np.int32)
    gram_id[np.argsort(count, kind="stable")] = np.arange(len(count), dtype=np.int32)
    ids = np.full(grams.size, _NO_GRAM, dtype=np.int32)
    ids[order[repeated]] = gram_id[run[repeated]]
    return _rows_of(ids.reshape(grams.shape), n_unique, np.flatnonzero(may_repeat), share)


def _gram_hashes(tokens: Int32[np.ndarray, " token"], gram_len: int) -> UInt64[np.ndarray, " gram"]:
    """A hash of each run of ``gram_len`` tokens: a polynomial in their mixed ids, mod 2**64."""
    mixed = hash_priority(0, tokens)
    n = len(tokens) - gram_len + 1
    value = np.zeros(n, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for i in range(gram_len):
            value = value * np.uint64(0x9E3779B97F4A7C15) + mixed[i : i + n]
    return value


def _rows_of(
    ids: Int32[np.ndarray, "window gram"],
    n_unique: Int64[np.ndarray, " window"],
    windows: Int64[np.ndarray, " row"],
    threshold: float,
) -> Shingles:
    """The sets of the windows that may repeat another, each padded to the widest."""
    grams = np.sort(ids[windows], axis=1)
    grams[:, 1:][grams[:, 1:] == grams[:, :-1]] = _NO_GRAM
    grams.sort(axis=1)
    n_shared = (grams != _NO_GRAM).sum(axis=1)
    n_grams = n_shared + n_unique[windows]
    must_share = np.ceil(threshold * n_grams - 1e-6).astype(np.int64)
    n_prefix = np.minimum(n_grams - must_share + 1 - n_unique[windows], n_shared)
    kept = n_prefix > 0
    row = np.full(len(ids), -1, dtype=np.int32)
    row[windows[kept]] = np.arange(kept.sum(), dtype=np.int32)
    return Shingles(
        threshold,
        row,
        grams[kept],
        n_grams[kept].astype(np.int32),
        n_prefix[kept].astype(np.int32),
    )
