"""Rows of ``schemas.WINDOWS`` from windows that were drawn."""

from collections.abc import Sequence

import numpy as np
import polars as pl
from jaxtyping import Bool, Int64, UInt64

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.latent_records.draw import DrawnWindows
from autointerp_dagster.core.latent_records.firing import FiringTokens
from autointerp_dagster.core.negatives import NegativeSources
from autointerp_dagster.core.sampling import order_within
from autointerp_dagster.core.schemas import NEIGHBOUR_WINDOWS
from autointerp_dagster.core.windows import SPLITS, WindowGrid


def window_rows(
    drawn: DrawnWindows,
    firing: FiringTokens,
    grid: WindowGrid,
    latents: range,
    config: SamplingConfig,
    sources: NegativeSources,
) -> pl.DataFrame:
    """``schemas.WINDOWS``, without the layer and in the table's order.

    Args:
        drawn: Which windows, of all latents.
        firing: The range's firing tokens.
        grid: Of the same dataset.
        latents: The range.
        config: Names the kinds of non-activating windows.
        sources: What these were drawn from.
    """
    n_activating = len(drawn.chosen.row)
    context = grid.context[drawn.window]
    window_id = (context << 16 | drawn.start).astype(np.uint64)
    kind = np.concatenate([np.full(n_activating, len(config.negative_kinds)), drawn.kind])
    order = _key_order(drawn, kind, window_id, config.negative_kinds)
    chosen = _null_where(order >= n_activating, order)
    kinds = pl.Series(config.negative_kinds, dtype=pl.String)
    windows = sources.neighbour_windows
    neighbours = NEIGHBOUR_WINDOWS.empty() if windows is None else windows
    source = np.concatenate([np.full(n_activating, -1), drawn.source])[order]
    neighbour = _null_where(source < 0, source)
    return pl.DataFrame(
        {
            "latent": (drawn.latent + latents.start).astype(np.uint32)[order],
            "split": pl.Series(SPLITS, dtype=pl.String).gather(drawn.split[order]),
            "is_activating": order < n_activating,
            "negative_kind": kinds.gather(_null_where(order < n_activating, kind[order])),
            "window_id": window_id[order],
            "context": context.astype(np.uint32)[order],
            "start": drawn.start.astype(np.uint16)[order],
            "quantile": pl.Series(drawn.chosen.quantile.astype(np.uint8)).gather(chosen),
            "rank": drawn.rank.astype(np.uint16)[order],
            "max_activation": pl.Series(drawn.cuts.maximum[drawn.chosen.row]).gather(chosen),
            "activations": _position_activations(drawn, firing, grid).gather(chosen),
            "neighbour": neighbours["latent"].gather(neighbour),
            "neighbour_activations": neighbours["activations"].gather(neighbour),
        }
    )


def _key_order(
    drawn: DrawnWindows,
    kind: Int64[np.ndarray, " row"],
    window_id: UInt64[np.ndarray, " row"],
    kinds: Sequence[str],
) -> Int64[np.ndarray, " row"]:
    """By latent, split, class, kind and window, names in the order of the alphabet.

    Sorting whole rows with their lists would cost as much as drawing them.
    """
    split_rank = np.argsort(np.argsort(SPLITS))[drawn.split]
    kind_rank = np.append(np.argsort(np.argsort(kinds)), 0)[kind]
    is_activating = np.arange(len(kind)) < len(drawn.chosen.row)
    group = (drawn.latent * len(SPLITS) + split_rank) * 2 + is_activating
    unused = 64 - int(window_id.max(initial=1)).bit_length()
    return order_within(group * len(kinds) + kind_rank, window_id << np.uint64(unused))


def _null_where(is_null: Bool[np.ndarray, " row"], rows: Int64[np.ndarray, " row"]) -> pl.Series:
    """Indices to gather by: a null gathers a null."""
    return pl.select(pl.when(~pl.lit(pl.Series(is_null))).then(pl.Series(rows))).to_series()


def _position_activations(drawn: DrawnWindows, firing: FiringTokens, grid: WindowGrid) -> pl.Series:
    """One list per activating window: the activation at each position, 0 where silent."""
    rows = drawn.chosen.row
    start, first, n_tokens = (column[rows] for column in drawn.cuts[:3])
    slot = np.repeat(np.arange(len(rows)), n_tokens)
    begin = np.cumsum(n_tokens) - n_tokens
    token = np.arange(len(slot)) + np.repeat(first - begin, n_tokens)
    dense = np.zeros((len(rows), grid.window_len), dtype=np.float32)
    dense[slot, firing.position[token] - start[slot]] = firing.activation[token]
    return pl.Series(dense, dtype=pl.Array(pl.Float32, grid.window_len)).arr.to_list()
