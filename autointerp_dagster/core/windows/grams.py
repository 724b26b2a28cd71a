"""Token n-grams of windows, as hashes."""

import numpy as np
from jaxtyping import Int32, UInt64

from autointerp_dagster.core.rng import hash_priority

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
