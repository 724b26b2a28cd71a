"""Neighbours by co-firing: the Jaccard index of the sets of tokens on which two latents fire.

1. Latents are taken in blocks, sized by the pairs (token of the latent, latent on that token).
2. The pairs of a block are counted: in a table of block x width while that is no larger than the
   work, else by sorting them. Counts are integers, so both give the same.
3. Of each latent the n largest indices are kept. A quotient of integers below 2**26 is exact
   enough in float64 that equal indices are equal numbers and others are not.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from jaxtyping import Int32, Int64

from autointerp_dagster.core.grouping import number_in_group
from autointerp_dagster.core.neighbours.counted import CountedTokens, Firings
from autointerp_dagster.core.neighbours.incidence import Incidence
from autointerp_dagster.core.neighbours.ranked import Ranked

_TABLE_CELLS = 1 << 17
"""Of a block's table of counts, so that it stays in the processor's second cache."""
_BLOCK_PAIRS = 1 << 16
"""Pairs for which the overhead of a block does not matter."""
_PAIRS_AT_ONCE = 1 << 20
"""Pairs that exist at once (8 bytes each)."""
_SORTING_COST = 3
"""Cells of a table that cost as much as sorting one pair."""


class Block(NamedTuple):
    """Some latents with all the counted tokens on which they fire."""

    latents: Int64[np.ndarray, " latent"]
    """Ascending; each fires somewhere."""
    bounds: Int64[np.ndarray, " boundary"]
    """Tokens of latent ``i`` are ``tokens[bounds[i]:bounds[i + 1]]``."""
    tokens: Int32[np.ndarray, " firing"]


def cofiring_neighbours(
    frames: Iterable[pl.DataFrame],
    counted: CountedTokens,
    incidence: Incidence,
    n: int,
    table_cells: int = _TABLE_CELLS,
    block_pairs: int = _BLOCK_PAIRS,
) -> Ranked:
    """The ``n`` latents of the layer that fire most on the same tokens as each latent of a cell.

    Exact on the counted tokens, and the same whatever the blocks, frames and cell. Only latents
    that fire together at least once are neighbours. Memory: a table of ``max(table_cells, 3 times
    the pairs of a block, width)`` counts, besides the incidence; never width x width.

    Args:
        frames: ``schemas.ACTIVATIONS`` of the cell, ascending; a frame may end inside a latent.
        counted: The tokens that count.
        incidence: Of the whole layer on these tokens.
        n: Neighbours wanted of each latent, at least 1.
        table_cells: Latents of a block x width at most, unless the pairs are few.
        block_pairs: Pairs of a block at most, unless the table is small.

    Returns:
        Values in (0, 1]. A latent that fires on no counted token, or alone, has no rows.
    """
    parts = [
        _nearest(_shared_counts(block, incidence), n)
        for whole in _whole_latents(counted.firings(frames))
        for block in _blocks(whole, incidence, table_cells, block_pairs)
    ]
    return Ranked.concat(parts)


def _whole_latents(firings: Iterable[Firings]) -> Iterator[Block]:
    """The latents of each part, the last one held back until it is known to be complete."""
    held: list[Firings] = []
    for part in firings:
        if held and held[0].latent[0] != part.latent[0]:
            yield _joined(held)
            held = []
        last = int(np.searchsorted(part.latent, part.latent[-1]))
        if last:
            yield _joined([*held, Firings(part.latent[:last], part.token[:last])])
            held = []
        held.append(Firings(part.latent[last:], part.token[last:]))
    if held:
        yield _joined(held)


def _joined(parts: list[Firings]) -> Block:
    latent = np.concatenate([part.latent for part in parts])
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(latent)) + 1, [len(latent)]])
    return Block(latent[bounds[:-1]], bounds, np.concatenate([part.token for part in parts]))


def _blocks(
    whole: Block, incidence: Incidence, table_cells: int, block_pairs: int
) -> Iterator[Block]:
    """Divides between latents, as late as the table is small enough or the pairs are few."""
    pairs = np.diff(whole.bounds) * incidence.pairs_per_firing
    most_rows = max(1, table_cells // (incidence.n_latents + 1))
    begin, total = 0, 0.0
    for i, mine in enumerate(pairs.tolist()):
        if i > begin and i - begin >= most_rows and total + mine > block_pairs:
            yield _part(whole, begin, i)
            begin, total = i, 0.0
        total += mine
    yield _part(whole, begin, len(pairs))


def _part(whole: Block, begin: int, end: int) -> Block:
    bounds = whole.bounds[begin : end + 1]
    tokens = whole.tokens[bounds[0] : bounds[-1]]
    return Block(whole.latents[begin:end], bounds - bounds[0], tokens)


class _Counts(NamedTuple):
    """Tokens that latents share with others; 0 with themselves and where nothing stands."""

    latents: Int64[np.ndarray, " latent"]
    others: Int64[np.ndarray, "latent slot"]
    shared: Int64[np.ndarray, "latent slot"]
    either: Int64[np.ndarray, "latent slot"]
    """Tokens on which at least one of the two fires."""


def _shared_counts(block: Block, incidence: Incidence) -> _Counts:
    n_own = np.diff(block.bounds)
    stride = incidence.n_latents + 1
    label = np.repeat(np.arange(len(n_own)) * stride, n_own)
    pairs = incidence.beside(block.tokens, label, _PAIRS_AT_ONCE)
    n_cells = len(n_own) * stride
    if len(block.tokens) * incidence.pairs_per_firing * _SORTING_COST < n_cells:
        others, shared = _by_sorting(np.concatenate(list(pairs)), block.latents, stride)
    else:
        others, shared = _by_table(pairs, n_cells, block.latents)
    either = n_own[:, None] + incidence.n_firing[others] - shared
    return _Counts(block.latents, np.broadcast_to(others, shared.shape), shared, either)


def _by_table(
    pairs: Iterable[Int64[np.ndarray, " pair"]], n_cells: int, latents: Int64[np.ndarray, " latent"]
) -> tuple[Int64[np.ndarray, "1 slot"], Int64[np.ndarray, "latent slot"]]:
    """A slot for every latent of the layer."""
    table = np.zeros(0, dtype=np.int64)
    for part in pairs:
        counted = np.bincount(part, minlength=n_cells)
        table = counted + table if len(table) else counted
    shared = table.reshape(len(latents), -1)[:, :-1]
    shared[np.arange(len(latents)), latents] = 0
    return np.arange(shared.shape[1])[None], shared


def _by_sorting(
    pairs: Int64[np.ndarray, " pair"], latents: Int64[np.ndarray, " latent"], stride: int
) -> tuple[Int64[np.ndarray, "latent slot"], Int64[np.ndarray, "latent slot"]]:
    """A slot for every latent that fires on the same tokens, as many as the row with most has."""
    keys, n = np.unique(pairs, return_counts=True)
    row, other = np.divmod(keys, stride)
    is_other = (other != stride - 1) & (other != latents[row])
    row, other, n = row[is_other], other[is_other], n[is_other]
    slot = number_in_group(row)
    others = np.zeros((len(latents), int(slot.max(initial=0)) + 1), dtype=np.int64)
    shared = np.zeros_like(others)
    others[row, slot], shared[row, slot] = other, n
    return others, shared


def _nearest(counts: _Counts, n: int) -> Ranked:
    """The best of each row.

    A first look at float32 finds what is large enough: rounding keeps the order, so nothing that
    belongs to the best is lost, and only what is left is sorted by the exact values.
    """
    value = counts.shared / counts.either
    rough = value.astype(np.float32)
    n_slots = rough.shape[1]
    least = torch.from_numpy(rough).topk(min(n, n_slots), dim=1).values[:, -1].numpy()
    row, slot = np.nonzero((rough >= least[:, None]) & (rough > 0))
    return Ranked.best(counts.latents[row], counts.others[row, slot], value[row, slot], n)
