"""Scores of a block of latents as the bits of their floats: the largest, and those above a cut.

Integers order as the floats of the same bits where these are positive, and are compared and
partitioned faster; numpy has no bfloat16.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

_SMALLEST = np.nextafter(np.float32(0), np.float32(1))
_MAXIMA = 512
"""Maxima of parts of the latents in which the k-th largest score is looked for, at least."""


class Bound(NamedTuple):
    """``|score - activation| <= absolute + relative * |score|``."""

    absolute: Float64[np.ndarray, " row"]
    relative: float
    is_sound: Bool[np.ndarray, " row"]
    """Where no score can overflow; elsewhere the bound says nothing."""


def cut_of(kth: Float64[np.ndarray, " row"], bound: Bound) -> Float32[np.ndarray, " row"]:
    """The smallest score of a candidate; infinite where the bound says nothing.

    Args:
        kth: At most the k-th largest score, >= 0; 0 where it is not known.
        bound: Of the scores.
    """
    absolute, relative, is_sound = bound
    kth = np.where(is_sound, kth, 0.0)
    needed = np.maximum(kth * (1 - relative) - absolute, 0.0) - absolute
    cut = np.where(needed > 0, needed / (1 + relative), needed / (1 - relative))
    lowered = np.nextafter(cut.astype(np.float32), np.float32(-np.inf))
    lowered = np.where(absolute > 0, lowered, np.maximum(lowered, _SMALLEST))
    return np.where(is_sound, lowered, np.float32(np.inf))


def largest_of(bits: np.ndarray, best: np.ndarray | None, k: int) -> np.ndarray:
    """Scores of k latents of each row, about the largest.

    Maxima of parts of the latents: the k-th largest maximum is at most the k-th largest score, and
    rarely less, because k is small against the number of parts. Integers order as the floats of
    the same bits where they are positive; what is not positive counts as nothing.
    """
    if k == 1 and best is None:
        return bits.max(axis=1, keepdims=True)
    n_maxima = max(_MAXIMA, 8 * k)
    size = bits.shape[1] // n_maxima
    if size > 1:
        bits = bits[:, : size * n_maxima].reshape(len(bits), size, n_maxima).max(axis=1)
    if best is not None:
        bits = np.concatenate([best, bits], axis=1)
    if bits.shape[1] <= k:
        return np.pad(bits, ((0, 0), (0, k - bits.shape[1])))
    return np.partition(bits, bits.shape[1] - k, axis=1)[:, -k:]


def at_least(bits: np.ndarray, cut: Float32[np.ndarray, " row"]) -> Int64[np.ndarray, " flat"]:
    """Flat indices of the scores that are not below the cut of their row, ascending.

    As unsigned integers the bits of floats count up from 0 to infinity, then, with the sign bit,
    from -0 to minus infinity: so what is at least a positive cut is one stretch, and what is at
    least a negative cut is another.
    """
    unsigned = np.uint16 if bits.dtype == np.int16 else np.uint32
    sign = 1 << (8 * bits.dtype.itemsize - 1)
    shift = 32 - 8 * bits.dtype.itemsize
    pattern = cut.view(np.uint32)
    is_negative = np.signbit(cut)
    rounded = (pattern + np.uint64((1 << shift) - 1)) >> np.uint64(shift)
    if not is_negative.any():
        return np.flatnonzero(bits >= rounded.astype(bits.dtype)[:, None])
    low = np.where(is_negative, 0, rounded).astype(unsigned)
    width = np.where(is_negative, rounded, sign - 1 - rounded).astype(unsigned)
    above = bits.view(unsigned) - low[:, None] if low.any() else bits.view(unsigned)
    return np.flatnonzero(above <= width[:, None])


def as_float(bits: np.ndarray) -> Float64[np.ndarray, " row"]:
    """The floats of some bits."""
    shift = np.uint32(32 - 8 * bits.dtype.itemsize)
    unsigned = bits.view(np.uint16 if bits.dtype == np.int16 else np.uint32)
    return (unsigned.astype(np.uint32) << shift).view(np.float32).astype(np.float64)
