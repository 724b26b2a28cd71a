"""Windows anywhere in a context, and which of them nearly repeat another."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt64

from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.windows.grams import gram_hashes, gram_len_of

_SPANS_AT_ONCE = 4096


class Spans(NamedTuple):
    """Windows of latents, in any order."""

    latent: Int64[np.ndarray, " span"]
    context: Int64[np.ndarray, " span"]
    start: Int64[np.ndarray, " span"]
    """First position in the context; the whole window lies in it."""


class _Grams(NamedTuple):
    """The distinct n-grams of some windows."""

    key: UInt64[np.ndarray, " gram"]
    """A hash of (latent, n-gram)."""
    span: Int64[np.ndarray, " gram"]
    """Index of the window that has it, ascending."""
    n: Int64[np.ndarray, " span"]
    """Distinct n-grams of each window."""


def repeating_spans(
    dataset: TokenDataset, window_len: int, threshold: float, shown: Spans, asked: Spans
) -> Bool[np.ndarray, " span"]:
    """Which of the windows asked about nearly repeat a shown window of the same latent.

    The same answer as :func:`near_duplicates` gives, for windows that need not be on the grid and
    of which nothing is known beforehand: the n-grams of every window are compared.

    Args:
        dataset: The tokens.
        window_len: Tokens per window.
        threshold: Jaccard similarity of sets of 8-grams from which on a window repeats another.
        shown: What the explainer may see.
        asked: What is to be judged.
    """
    repeats = np.zeros(len(asked.latent), dtype=bool)
    if not len(shown.latent):
        return repeats
    known = _grams(dataset, window_len, shown)
    order = np.argsort(known.key)
    known = known._replace(key=known.key[order], span=known.span[order])
    for start in range(0, len(repeats), _SPANS_AT_ONCE):
        part = slice(start, start + _SPANS_AT_ONCE)
        grams = _grams(dataset, window_len, Spans(*(column[part] for column in asked)))
        repeats[part] = _most_alike(known, grams) >= threshold
    return repeats


def _most_alike(known: _Grams, asked: _Grams) -> Float64[np.ndarray, " span"]:
    """The largest Jaccard similarity of each window asked about to a known one of its latent."""
    low = np.searchsorted(known.key, asked.key, side="left")
    hits = np.searchsorted(known.key, asked.key, side="right") - low
    within = np.arange(hits.sum()) - np.repeat(np.cumsum(hits) - hits, hits)
    other = known.span[np.repeat(low, hits) + within]
    pairs, shared = np.unique(
        np.repeat(asked.span, hits) * len(known.n) + other, return_counts=True
    )
    a, b = np.divmod(pairs, len(known.n))
    alike = np.zeros(len(asked.n))
    np.maximum.at(alike, a, shared / (asked.n[a] + known.n[b] - shared))
    return alike


def _grams(dataset: TokenDataset, window_len: int, spans: Spans) -> _Grams:
    gram_len = gram_len_of(window_len, dataset.first_visible)
    first = dataset.offsets[spans.context] + spans.start
    hashes = gram_hashes(dataset.tokens[first[:, None] + np.arange(window_len)], gram_len)
    hidden = spans.start[:, None] + np.arange(hashes.shape[1]) < dataset.first_visible
    hashes = np.where(hidden, hashes[:, -1:], hashes)  # the last one is visible in every window
    with np.errstate(over="ignore"):
        keys = hashes + spans.latent.astype(np.uint64)[:, None] * np.uint64(0xD1342543DE82EF95)
    keys.sort(axis=1)
    is_new = np.ones(keys.shape, dtype=bool)
    is_new[:, 1:] = keys[:, 1:] != keys[:, :-1]
    return _Grams(keys[is_new], np.nonzero(is_new)[0], is_new.sum(axis=1))
