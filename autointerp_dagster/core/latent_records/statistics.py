"""How often, how strongly and on which tokens each latent of a range fires."""

import numpy as np
import polars as pl
from jaxtyping import Float32, Float64, Int32, Int64

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.grouping import number_in_group
from autointerp_dagster.core.latent_records.firing import (
    ActiveWindows,
    FiringTokens,
    count_by_split,
)
from autointerp_dagster.core.sampling import order_within, sorted_keys
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.core.windows import SPLITS, WindowGrid

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_N_TOP_TOKENS = 8


def status_of(config: SamplingConfig) -> pl.Expr:
    """``LatentStatus`` from :func:`statistics_of`: dead, else rare, else dense, else ok."""
    is_rare = (pl.col("n_tokens") < config.min_tokens) | (
        pl.col("n_test") < config.min_test_windows
    )
    is_dense = pl.col("window_firing_rate") > config.max_window_firing_rate
    return (
        pl.when(pl.col("n_tokens") == 0)
        .then(pl.lit("dead"))
        .when(is_rare)
        .then(pl.lit("rare"))
        .when(is_dense)
        .then(pl.lit("dense"))
        .otherwise(pl.lit("ok"))
    )


def statistics_of(
    firing: FiringTokens,
    active: ActiveWindows,
    firing_counts: pl.DataFrame,
    dataset: TokenDataset,
    grid: WindowGrid,
    layer: LayerKey,
    latents: range,
) -> pl.DataFrame:
    """``schemas.LATENTS`` but for ``status`` and what the draws decide."""
    n_tokens = np.bincount(firing.latent, minlength=len(latents))
    n_windows = np.bincount(active.latent, minlength=len(latents))
    in_split = count_by_split(active.latent, active.split, len(latents))
    quantiles = _activation_quantiles(firing, n_tokens)
    frame = pl.DataFrame(
        {
            "latent": np.arange(latents.start, latents.stop, dtype=np.uint32),
            "n_tokens": n_tokens,
            "n_windows": n_windows,
            "token_firing_rate": n_tokens / max(1, grid.n_kept_tokens),
            "window_firing_rate": n_windows / max(1, grid.n_windows),
            **{f"n_{name}": in_split[:, i] for i, name in enumerate(SPLITS)},
            "activation_quantiles": quantiles,
        },
        schema_overrides={"activation_quantiles": pl.Array(pl.Float32, quantiles.shape[1])},
    )
    fires = pl.col("n_tokens") > 0
    frame = frame.with_columns(
        pl.when(fires).then(pl.col("activation_quantiles").arr.to_list()),
        pl.when(fires).then(pl.col("activation_quantiles").arr.last()).alias("max_activation"),
    )
    frame = _join_counts(frame, firing_counts, layer)
    return frame.join(
        _top_tokens(firing, grid, dataset, latents),
        on="latent",
        how="left",
        maintain_order="left",
    ).with_columns(pl.col("top_tokens", "top_token_shares").fill_null([]))


def _join_counts(frame: pl.DataFrame, firing_counts: pl.DataFrame, layer: LayerKey) -> pl.DataFrame:
    """``frame`` with ``n_contexts``, once the counts are found to be those of the activations."""
    counted = firing_counts.select(
        pl.col("latent").cast(pl.UInt32), "n_contexts", counted=pl.col("n_tokens").cast(pl.Int64)
    )
    joined = frame.join(counted, on="latent", how="left", maintain_order="left")
    wrong = joined.filter(pl.col("counted").ne_missing(pl.col("n_tokens")))
    if wrong.height:
        latent, n_tokens, counted_tokens = wrong.select("latent", "n_tokens", "counted").row(0)
        raise ValueError(
            f"{layer} latent {latent}: {n_tokens} activations, but its firing count is "
            f"{counted_tokens}. Make the activation cache again."
        )
    return joined.drop("counted")


def _activation_quantiles(
    firing: FiringTokens, n_tokens: Int64[np.ndarray, " latent"]
) -> Float32[np.ndarray, "latent quantile"]:
    """At ``_QUANTILES``, interpolated linearly as in ``numpy.quantile``; 0 for a dead latent."""
    ordered = np.append(_sorted_by_latent(firing.activation, n_tokens), np.float32(0))
    ordered = ordered.astype(np.float64)
    first = (np.cumsum(n_tokens) - n_tokens)[:, None]
    at = np.maximum(n_tokens - 1, 0)[:, None] * np.array(_QUANTILES)
    low = np.floor(at).astype(np.int64)
    below, above = ordered[first + low], ordered[first + np.ceil(at).astype(np.int64)]
    values = below + (above - below) * (at - low)
    return np.where(n_tokens[:, None] > 0, values, 0).astype(np.float32)


def _sorted_by_latent(
    activation: Float32[np.ndarray, " token"], n_tokens: Int64[np.ndarray, " latent"]
) -> Float32[np.ndarray, " token"]:
    """Each latent's activations in ascending order; the latents follow each other."""
    # Positive floats sort as their bits do, and of bfloat16 half of them are 0: 16 bits sort 15
    # times as fast as 32.
    bits = np.ascontiguousarray(activation).view(np.uint32)
    is_half = not (bits & 0xFFFF).any()
    keys = (bits >> 16).astype(np.uint16) if is_half else bits.copy()
    stop = np.cumsum(n_tokens)
    for latent in np.flatnonzero(n_tokens):
        mine = slice(int(stop[latent] - n_tokens[latent]), int(stop[latent]))
        keys[mine] = np.sort(keys[mine], kind="stable")
    return (keys.astype(np.uint32) << 16 if is_half else keys).view(np.float32)


def _top_tokens(
    firing: FiringTokens, grid: WindowGrid, dataset: TokenDataset, latents: range
) -> pl.DataFrame:
    """``latent``, ``top_tokens``, ``top_token_shares``; only latents with train windows."""
    is_train = np.append(grid.split == 0, False)
    at = np.flatnonzero(is_train[firing.window])  # a token in no window, -1, reads the last
    token = dataset.tokens[firing.token[at]]
    latent, token, summed = _summed_by_token(firing.latent[at], token, firing.activation[at])
    share = summed / np.bincount(latent, weights=summed)[latent] if len(latent) else summed
    rows = np.flatnonzero(summed >= _enough_for_top(latent, summed)[latent])
    # The bits of positive floats sort as the floats do; inverted, the largest come first.
    rows = rows[order_within(latent[rows], ~summed[rows].view(np.uint64))]
    place = number_in_group(latent[rows])
    rows = rows[place < _N_TOP_TOKENS]
    frame = pl.DataFrame(
        {
            "latent": (latent[rows] + latents.start).astype(np.uint32),
            "top_tokens": token[rows].astype(np.uint32),
            "top_token_shares": share[rows],
        }
    )
    return frame.group_by("latent", maintain_order=True).agg(pl.all())


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
