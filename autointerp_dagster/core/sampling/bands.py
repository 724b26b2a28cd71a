"""Quantile bands of a latent's windows by their maxima, without sorting them.

1. Maxima are counted in bins of neighbouring values; how many stand before a bin is the rank of its
   first window.
2. A bin that lies between two edges is in one band. Only windows of the bins that an edge cuts are
   ranked, by maximum and then by priority: a few per cent of a frequent latent's.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int8, Int64, UInt32, UInt64

from autointerp_dagster.core.sampling.draws import ranks_within

Ties = Callable[[Int64[np.ndarray, " some"]], UInt64[np.ndarray, " some"]]
"""The priorities by which some of the windows stand among others of the same maximum."""


class _Bins(NamedTuple):
    """Windows counted by latent and maximum."""

    bin: Int64[np.ndarray, " window"]
    """Index into ``counts``: the bins of a latent follow each other, the strongest first."""
    rest: UInt32[np.ndarray, " window"]
    """By how much the maximum is below the bin's largest value, in units of the last place."""
    counts: Int64[np.ndarray, "latent bin"]
    """The last bin of a latent is empty."""


def quantile_bands(
    latent: Int64[np.ndarray, " window"],
    maximum: Float32[np.ndarray, " window"],
    ties: Ties,
    n_quantiles: int,
) -> Int8[np.ndarray, " window"]:
    """The quantile of each window, 0 strongest: bands of equal count within a latent.

    Where the count is no multiple of ``n_quantiles``, the larger bands are spread; fewer windows
    than bands leave bands empty.

    Args:
        latent: From 0, in any order.
        maximum: The largest activation in the window, > 0.
        ties: Asked about those windows whose order among equal ones decides.
        n_quantiles: At most 127.
    """
    if not len(latent):
        return np.zeros(0, dtype=np.int8)
    bins = _bins_of(latent, maximum)
    n_windows = bins.counts.sum(axis=1)
    stop = np.cumsum(bins.counts)
    first = stop - bins.counts.reshape(-1)
    start = (np.cumsum(n_windows) - n_windows)[:, None]
    # Band k begins at the first rank r with r * n_quantiles >= k * n_windows.
    edge = -(-np.arange(1, n_quantiles) * n_windows[:, None] // n_quantiles)
    edge = (start + edge)[edge < n_windows[:, None]]
    cut = np.searchsorted(stop, edge, side="right")
    is_inside = first[cut] < edge
    begins = np.zeros(bins.counts.shape, dtype=np.int8)
    np.add.at(begins.reshape(-1), cut + is_inside, np.int8(1))
    band_of_bin = np.cumsum(begins, axis=1, dtype=np.int8).reshape(-1)
    band_of_bin[cut[is_inside]] = -1
    band = band_of_bin[bins.bin]
    rows = np.flatnonzero(band < 0)
    if len(rows):
        at = bins.bin[rows]
        rank = first[at] - start[latent[rows], 0]
        rank += ranks_within(at, ties(rows), bins.rest[rows].astype(np.int64))
        band[rows] = rank * n_quantiles // n_windows[latent[rows]]
    return band


def _bins_of(
    latent: Int64[np.ndarray, " window"], maximum: Float32[np.ndarray, " window"]
) -> _Bins:
    """As fine as it can be with no more bins than windows: of bfloat16 mostly a bin per value."""
    # The bits of positive floats sort as the floats do.
    bits = np.ascontiguousarray(maximum).view(np.uint32)
    below = bits.max() - bits
    n_latents, span = int(latent.max()) + 1, int(below.max())
    ends = int(np.bitwise_or.reduce(below))
    shift = (ends & -ends).bit_length() - 1 if ends else 0  # bfloat16 leaves the last 16 bits 0
    while shift < 31 and n_latents * ((span >> shift) + 2) > len(bits):
        shift += 1
    n_bins = (span >> shift) + 2
    bin_ = latent * n_bins
    bin_ += below >> np.uint32(shift)
    count = np.bincount(bin_, minlength=n_latents * n_bins).reshape(n_latents, n_bins)
    below &= np.uint32((1 << shift) - 1)
    return _Bins(bin_, below, count)
