"""How often, how strongly and on which tokens each latent of a range fires."""

import numpy as np
import polars as pl
from jaxtyping import Float32, Int64

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.latent_records.firing import (
    ActiveWindows,
    FiringTokens,
    count_by_split,
)
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
    # Positive floats sort as their bits do: one integer sort orders all latents' activations.
    keys = firing.latent << 32 | np.ascontiguousarray(firing.activation).view(np.uint32)
    keys.sort()
    ordered = np.append((keys & 0xFFFFFFFF).astype(np.uint32).view(np.float32), np.float32(0))
    ordered = ordered.astype(np.float64)
    first = (np.cumsum(n_tokens) - n_tokens)[:, None]
    at = np.maximum(n_tokens - 1, 0)[:, None] * np.array(_QUANTILES)
    low = np.floor(at).astype(np.int64)
    below, above = ordered[first + low], ordered[first + np.ceil(at).astype(np.int64)]
    values = below + (above - below) * (at - low)
    return np.where(n_tokens[:, None] > 0, values, 0).astype(np.float32)


def _top_tokens(
    firing: FiringTokens, grid: WindowGrid, dataset: TokenDataset, latents: range
) -> pl.DataFrame:
    """``latent``, ``top_tokens``, ``top_token_shares``; only latents with train windows."""
    is_train = np.append(grid.split == 0, False)
    at = np.flatnonzero(is_train[firing.window])  # a token in no window, -1, reads the last
    token = dataset.tokens[dataset.offsets[firing.context[at]] + firing.position[at]]
    n_ids = int(token.max(initial=0)) + 1
    key = firing.latent[at] * n_ids + token
    order = np.argsort(key, kind="stable")
    key = key[order]
    is_first = np.append(True, key[1:] != key[:-1])[: len(key)]
    summed = np.bincount(np.cumsum(is_first) - 1, weights=firing.activation[at][order])
    latent, token = np.divmod(key[is_first], n_ids)
    share = summed / np.bincount(latent, weights=summed)[latent] if len(latent) else summed
    by_sum = np.argsort(-summed, kind="stable")
    by_sum = by_sum[np.argsort(latent[by_sum], kind="stable")]
    latent = latent[by_sum]
    top = np.arange(len(latent)) - np.searchsorted(latent, latent) < _N_TOP_TOKENS
    frame = pl.DataFrame(
        {
            "latent": (latent[top] + latents.start).astype(np.uint32),
            "top_tokens": token[by_sum][top].astype(np.uint32),
            "top_token_shares": share[by_sum][top],
        }
    )
    return frame.group_by("latent", maintain_order=True).agg(pl.all())
