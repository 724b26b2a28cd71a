"""Windows of the grid that nearly repeat one another, found once for all latents.

1. A window's token 8-grams are hashed; those that occur nowhere else are only counted.
2. A window with too many of these repeats no other and is left out.
3. Of the others, only pairs that share one of their rarest n-grams are compared, exactly.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int, Int32, Int64

from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.windows.grams import gram_hashes, gram_len_of

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


def shingles_of(
    dataset: TokenDataset,
    context: Int64[np.ndarray, " window"],
    start: Int64[np.ndarray, " window"],
    window_len: int,
    threshold: float,
) -> Shingles:
    """The n-grams of the windows of a grid.

    Args:
        dataset: The tokens.
        context: Of each window, in the grid's order.
        start: Its first position.
        window_len: Tokens per window.
        threshold: Jaccard similarity at which two windows are near-duplicates.
    """
    if not len(context):
        no_rows = np.zeros(0, dtype=np.int32)
        return Shingles(threshold, no_rows, np.zeros((0, 1), np.int32), no_rows, no_rows)
    gram_len = gram_len_of(window_len, dataset.first_visible)
    hashes = gram_hashes(dataset.tokens, gram_len)
    per_window = np.lib.stride_tricks.sliding_window_view(hashes, window_len - gram_len + 1)
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
    may_repeat = n_unique * threshold <= n_repeated * (1 - threshold) + 1e-6
    may_repeat &= n_repeated > 0
    # Ids ascend with the count: a rare n-gram first makes the shortest lists of pairs to check.
    gram_id = np.empty(len(count), dtype=np.int32)
    gram_id[np.argsort(count, kind="stable")] = np.arange(len(count), dtype=np.int32)
    ids = np.full(grams.size, _NO_GRAM, dtype=np.int32)
    ids[order[repeated]] = gram_id[run[repeated]]
    return _rows_of(ids.reshape(grams.shape), n_unique, np.flatnonzero(may_repeat), threshold)


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
