"""How often, how strongly and on which tokens each latent of a range fires."""

import sys
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Float32, Float64, Int32, Int64, Shaped, UInt16, UInt32, UInt64

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.grouping import number_in_group
from autointerp_dagster.core.latent_records.firing import (
    ActiveWindows,
    FiringTokens,
    count_by_split,
)
from autointerp_dagster.core.sampling import order_within, sorted_keys
from autointerp_dagster.core.schemas import LatentStatus
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.core.windows import SPLITS, WindowGrid

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_HIGH_HALF = 1 if sys.byteorder == "little" else 0
_N_TOP_TOKENS = 8
_STATUSES: tuple[LatentStatus, ...] = ("dead", "rare", "dense", "ok")


class Statistics(NamedTuple):
    """What is known of a range's latents before any window is drawn."""

    table: pl.DataFrame
    """``schemas.LATENTS`` but for what the draws decide."""
    is_ok: Bool[np.ndarray, " latent"]
    top_token: Int64[np.ndarray, " latent"]
    """The first of ``top_tokens``; -1: none."""


def statistics_of(
    firing: FiringTokens,
    active: ActiveWindows,
    firing_counts: pl.DataFrame,
    dataset: TokenDataset,
    grid: WindowGrid,
    layer: LayerKey,
    latents: range,
    config: SamplingConfig,
) -> Statistics:
    """How often, how strongly and on which tokens each latent fires, and its status."""
    n_tokens = np.diff(firing.first)
    in_split = count_by_split(active.latent, active.split, len(latents))
    n_windows = in_split.sum(axis=1)
    window_firing_rate = n_windows / max(1, grid.n_windows)
    is_rare = (n_tokens < config.min_tokens) | (in_split[:, -1] < config.min_test_windows)
    is_dense = window_firing_rate > config.max_window_firing_rate
    status = np.select([n_tokens == 0, is_rare, is_dense], [0, 1, 2], 3)
    top = _top_tokens(firing, grid, dataset)
    columns = {
        "latent": np.arange(latents.start, latents.stop, dtype=np.uint32),
        "status": status,
        "n_tokens": n_tokens,
        "n_contexts": _contexts_counted(firing_counts, n_tokens, layer, latents),
        "n_windows": n_windows,
        "token_firing_rate": n_tokens / max(1, grid.n_kept_tokens),
        "window_firing_rate": window_firing_rate,
        **{f"n_{name}": in_split[:, i] for i, name in enumerate(SPLITS)},
        "top_tokens": _rows_of(top.token),
        "top_token_shares": _rows_of(top.share),
        "activation_quantiles": _rows_of(_activation_quantiles(firing)),
    }
    n_top, quantiles = pl.lit(pl.Series(top.n)), pl.col("activation_quantiles")
    fires = pl.col("n_tokens") > 0
    table = pl.DataFrame(columns).with_columns(
        pl.lit(pl.Series(_STATUSES)).gather(pl.col("status")).alias("status"),
        pl.col("top_tokens", "top_token_shares").arr.to_list().list.head(n_top),
        pl.when(fires).then(quantiles.arr.last()).alias("max_activation"),
        pl.when(fires).then(quantiles.arr.to_list()).alias("activation_quantiles"),
    )
    top_token = np.where(top.n > 0, top.token[:, 0].astype(np.int64), -1)
    return Statistics(table, status == _STATUSES.index("ok"), top_token)


def _rows_of(values: Shaped[np.ndarray, "latent place"]) -> pl.Series:
    """A row of the array for each latent."""
    return pl.Series(values, dtype=pl.Array(pl.Series(values[:0, 0]).dtype, values.shape[1]))


def _contexts_counted(
    firing_counts: pl.DataFrame,
    n_tokens: Int64[np.ndarray, " latent"],
    layer: LayerKey,
    latents: range,
) -> UInt64[np.ndarray, " latent"]:
    """``n_contexts``, once the counts are found to be those of the activations."""
    latent = firing_counts["latent"].to_numpy()
    rows = np.flatnonzero((latent >= latents.start) & (latent < latents.stop))
    counted = np.full(len(latents), -1, dtype=np.int64)
    counted[latent[rows] - latents.start] = firing_counts["n_tokens"].to_numpy()[rows]
    wrong = np.flatnonzero(counted != n_tokens)
    if len(wrong):
        found = counted[wrong[0]] if counted[wrong[0]] >= 0 else None
        raise ValueError(
            f"{layer} latent {latents[wrong[0]]}: {n_tokens[wrong[0]]} activations, but its firing "
            f"count is {found}. Make the activation cache again."
        )
    n_contexts = np.zeros(len(latents), dtype=np.uint64)
    n_contexts[latent[rows] - latents.start] = firing_counts["n_contexts"].to_numpy()[rows]
    return n_contexts


def _activation_quantiles(firing: FiringTokens) -> Float32[np.ndarray, "latent quantile"]:
    """At ``_QUANTILES``, interpolated linearly as in ``numpy.quantile``; 0 for a dead latent."""
    n_tokens = np.diff(firing.first)[:, None]
    keys = _sorted_keys_of(firing)
    at = np.maximum(n_tokens - 1, 0) * np.array(_QUANTILES)
    low = np.floor(at).astype(np.int64)
    ends = (firing.first[:-1, None] + end for end in (low, np.ceil(at).astype(np.int64)))
    below, above = (_value_of(keys[np.minimum(end, len(keys) - 1)]) for end in ends)
    values = below + (above - below) * (at - low)
    return np.where(n_tokens > 0, values, 0).astype(np.float32)


def _sorted_keys_of(
    firing: FiringTokens,
) -> UInt16[np.ndarray, " token"] | UInt32[np.ndarray, " token"]:
    """The bits of each latent's activations in ascending order, and a 0 behind the last latent's.

    Positive floats sort as their bits do, and of bfloat16 half of them are 0: 16 bits sort 15 times
    as fast as 32.
    """
    bits = np.append(firing.activation, np.float32(0)).view(np.uint32)
    is_half = not int(np.bitwise_or.reduce(bits)) & 0xFFFF
    keys = bits.view(np.uint16)[_HIGH_HALF::2].copy() if is_half else bits
    for start, stop in pairwise(firing.first.tolist()):
        keys[start:stop].sort(kind="stable")
    return keys


def _value_of(
    keys: UInt16[np.ndarray, "latent quantile"] | UInt32[np.ndarray, "latent quantile"],
) -> Float64[np.ndarray, "latent quantile"]:
    is_half = keys.dtype == np.uint16
    bits = keys.astype(np.uint32) << np.uint32(16 if is_half else 0)
    return bits.view(np.float32).astype(np.float64)


class _TopTokens(NamedTuple):
    """The tokens with the largest summed activation over train windows, the largest first."""

    n: Int64[np.ndarray, " latent"]
    token: UInt32[np.ndarray, "latent place"]
    """0 from ``n`` on."""
    share: Float64[np.ndarray, "latent place"]
    """Of the summed activation."""


def _top_tokens(firing: FiringTokens, grid: WindowGrid, dataset: TokenDataset) -> _TopTokens:
    n_latents = len(firing.first) - 1
    is_train = np.append(grid.split == 0, False)
    at = np.flatnonzero(is_train[firing.window])  # a token in no window, -1, reads the last
    token = dataset.tokens[firing.places(dataset, at)]
    latent, token, summed = _summed_by_token(firing.latent[at], token, firing.activation[at])
    whole = np.bincount(latent, weights=summed, minlength=n_latents)
    rows = np.flatnonzero(summed >= _enough_for_top(latent, summed)[latent])
    # The bits of positive floats sort as the floats do; inverted, the largest come first.
    rows = rows[order_within(latent[rows], ~summed[rows].view(np.uint64))]
    place = number_in_group(latent[rows])
    rows, place = rows[place < _N_TOP_TOKENS], place[place < _N_TOP_TOKENS]
    top = _TopTokens(
        np.bincount(latent[rows], minlength=n_latents),
        np.zeros((n_latents, _N_TOP_TOKENS), dtype=np.uint32),
        np.zeros((n_latents, _N_TOP_TOKENS)),
    )
    top.token[latent[rows], place] = token[rows]
    top.share[latent[rows], place] = summed[rows] / whole[latent[rows]]
    return top


def _summed_by_token(
    latent: Int64[np.ndarray, " row"],
    token: Int32[np.ndarray, " row"],
    activation: Float32[np.ndarray, " row"],
) -> tuple[Int64[np.ndarray, " pair"], Int64[np.ndarray, " pair"], Float64[np.ndarray, " pair"]]:
    """Each (latent, token) with its summed activation, in that order."""
    n_ids = int(token.max(initial=0)) + 1
    key = latent * n_ids + token
    if int(key.max(initial=0)) < 2**32:
        # One sort of one integer: the activation's bits stand below the key.
        packed = key.astype(np.uint64) << np.uint64(32) | activation.view(np.uint32)
        packed = sorted_keys(packed, latent)
        key = (packed >> np.uint64(32)).astype(np.int64)
        activation = packed.astype(np.uint32).view(np.float32)
    else:
        order = np.lexsort((activation, key))
        key, activation = key[order], activation[order]
    first = np.flatnonzero(np.append(True, key[1:] != key[:-1])[: len(key)])
    summed = np.add.reduceat(activation.astype(np.float64), first) if len(first) else np.zeros(0)
    return *np.divmod(key[first], n_ids), summed


def _enough_for_top(
    latent: Int64[np.ndarray, " pair"], summed: Float64[np.ndarray, " pair"]
) -> Float64[np.ndarray, " latent"]:
    """For each latent, a sum that at least ``_N_TOP_TOKENS`` of its pairs reach, if it has them.

    The smallest of the maxima of as many stretches of the latent's pairs.
    """
    count = np.bincount(latent)
    enough = np.zeros(len(count))
    many = np.flatnonzero(count >= 4 * _N_TOP_TOKENS)
    if len(many):
        first = (np.cumsum(count) - count)[many]
        cuts = first[:, None] + count[many][:, None] * np.arange(_N_TOP_TOKENS) // _N_TOP_TOKENS
        ends = np.stack([cuts, np.append(cuts[:, 1:], (first + count[many])[:, None], axis=1)], -1)
        maxima = np.maximum.reduceat(np.append(summed, 0.0), ends.reshape(-1))[::2]
        enough[many] = maxima.reshape(cuts.shape).min(axis=1)
    return enough
