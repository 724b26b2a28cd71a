"""Keyed permutations that are computed only as far as they are needed."""

import numpy as np
from jaxtyping import Int64, UInt64

_ROUNDS = 3
_MIN_DOMAIN = 64  # with fewer values these rounds are not uniform (chi-square of drawn pairs)


def permuted(
    index: Int64[np.ndarray, " row"],
    size: Int64[np.ndarray, " row"],
    key: UInt64[np.ndarray, " row"],
) -> Int64[np.ndarray, " row"]:
    """Where a keyed permutation of ``0 .. size - 1`` sends ``index``, without writing it out.

    Source:
        Cycle walking: a permutation of a power of two, repeated until the value is below ``size``
        (Black and Rogaway 2002).
    """
    bits = np.ceil(np.log2(np.maximum(size, _MIN_DOMAIN))).astype(np.uint64)
    value = _mixed(index.astype(np.uint64), bits, key)
    outside = np.flatnonzero(value >= size.astype(np.uint64))
    while len(outside):
        value[outside] = _mixed(value[outside], bits[outside], key[outside])
        outside = outside[value[outside] >= size[outside].astype(np.uint64)]
    return value.astype(np.int64)


def counts_up(n: Int64[np.ndarray, " group"]) -> Int64[np.ndarray, " row"]:
    """0, 1, .. n - 1 for each n, one after another."""
    return np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)


def _mixed(
    value: UInt64[np.ndarray, " row"],
    bits: UInt64[np.ndarray, " row"],
    key: UInt64[np.ndarray, " row"],
) -> UInt64[np.ndarray, " row"]:
    """A keyed permutation of the numbers of ``bits`` bits: a Feistel network of their halves."""
    low = bits // np.uint64(2)
    high_mask = (np.uint64(1) << (bits - low)) - np.uint64(1)
    low_mask = (np.uint64(1) << low) - np.uint64(1)
    left, right = value >> low, value & low_mask
    for _ in range(_ROUNDS):
        key = key * np.uint64(0xD1342543DE82EF95) + np.uint64(0x9E3779B97F4A7C15)
        left = left ^ (_scrambled(right, key) & high_mask)
        right = right ^ (_scrambled(left, ~key) & low_mask)
    return left << low | right


def _scrambled(
    half: UInt64[np.ndarray, " row"], key: UInt64[np.ndarray, " row"]
) -> UInt64[np.ndarray, " row"]:
    mixed = (half ^ key) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
    return mixed >> np.uint64(40)
