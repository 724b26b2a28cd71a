"""Rows of ``schemas.WINDOWS`` from windows that were drawn."""

from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow as pa
from jaxtyping import Int64, UInt64

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
    windows = sources.neighbour_windows
    neighbours = NEIGHBOUR_WINDOWS.empty() if windows is None else windows
    source = np.concatenate([np.full(n_activating, -1), drawn.source])
    columns = {
        "latent": (drawn.latent + latents.start).astype(np.uint32),
        "split": drawn.split,
        "is_activating": np.arange(len(kind)) < n_activating,
        "negative_kind": kind,
        "window_id": window_id,
        "context": context.astype(np.uint32),
        "start": drawn.start.astype(np.uint16),
        "rank": drawn.rank.astype(np.uint16),
        "source": source,
        "drawn": np.arange(len(kind)),
    }
    rows = pl.DataFrame({name: column[order] for name, column in columns.items()})
    chosen = pl.when("is_activating").then("drawn")  # gathering a null gives a null
    neighbour = pl.when(pl.col("source") >= 0).then("source")
    values = {
        "split": (pl.Series(SPLITS, dtype=pl.String), pl.col("split")),
        "negative_kind": (
            pl.Series(config.negative_kinds, dtype=pl.String),
            pl.when(~pl.col("is_activating")).then("negative_kind"),
        ),
        "quantile": (pl.Series(drawn.chosen.quantile.astype(np.uint8)), chosen),
        "max_activation": (pl.Series(drawn.cuts.maximum[drawn.chosen.row]), chosen),
        "neighbour": (neighbours["latent"], neighbour),
        "neighbour_activations": (neighbours["activations"], neighbour),
    }
    gathered = (pl.lit(of).gather(at).alias(name) for name, (of, at) in values.items())
    activations = _position_activations(drawn, firing, grid, order)
    return rows.with_columns(activations, *gathered).drop("source", "drawn")


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


def _position_activations(
    drawn: DrawnWindows,
    firing: FiringTokens,
    grid: WindowGrid,
    order: Int64[np.ndarray, " row"],
) -> pl.Series:
    """In this order: the activation at each position, 0 where silent; null for silent windows."""
    is_activating = order < len(drawn.chosen.row)
    chosen = order[is_activating]
    rows = drawn.chosen.row[chosen]
    start, first, n_tokens = drawn.start[chosen], drawn.cuts.first[rows], drawn.cuts.n_tokens[rows]
    slot = np.repeat(np.arange(len(rows)), n_tokens)
    begin = np.cumsum(n_tokens) - n_tokens
    token = np.arange(len(slot)) + np.repeat(first - begin, n_tokens)
    dense = np.zeros((len(rows), grid.window_len), dtype=np.float32)
    dense[slot, firing.position[token] - start[slot]] = firing.activation[token]
    # Put together as Arrow lays lists out: to gather lists would take as long as the draw.
    stop = np.cumsum(is_activating) * grid.window_len
    lists = pa.LargeListArray.from_arrays(
        pa.array(np.concatenate([[0], stop])),
        pa.array(dense.reshape(-1)),
        mask=pa.array(~is_activating),
    )
    return pl.Series("activations", lists)
