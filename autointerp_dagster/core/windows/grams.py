"""Token n-grams of windows, as hashes."""

import numpy as np
from jaxtyping import Int32, Int64, UInt64

from autointerp_dagster.core.rng import hash_priority
from autointerp_dagster.core.tokens import TokenDataset

GRAM_LEN = 8
"""Tokens per n-gram; fewer if a window shows fewer."""


def gram_len_of(window_len: int, first_visible: int) -> int:
    """Tokens per n-gram, so that a window at the start of a context has one, too."""
    return min(GRAM_LEN, window_len - first_visible)


def gram_hashes(
    tokens: Int32[np.ndarray, "*row token"], gram_len: int
) -> UInt64[np.ndarray, "*row gram"]:
    """A hash of each run of ``gram_len`` tokens: a polynomial in their mixed ids, mod 2**64."""
    mixed = hash_priority(0, tokens.reshape(-1)).reshape(tokens.shape)
    n = tokens.shape[-1] - gram_len + 1
    value = np.zeros((*tokens.shape[:-1], max(0, n)), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for i in range(gram_len):
            value = value * np.uint64(0x9E3779B97F4A7C15) + mixed[..., i : i + n]
    return value


def tail_hashes(
    dataset: TokenDataset,
    context: Int64[np.ndarray, " window"],
    start: Int64[np.ndarray, " window"],
    window_len: int,
    n_last: int,
) -> UInt64[np.ndarray, " window"]:
    """A hash of the last tokens that each window shows; hidden ones are all alike."""
    position = start[:, None] + np.arange(window_len - n_last, window_len)
    tokens = dataset.tokens[dataset.offsets[context][:, None] + position]
    tokens = np.where(position < dataset.first_visible, np.int32(-1), tokens)
    return gram_hashes(tokens, n_last)[:, 0]
