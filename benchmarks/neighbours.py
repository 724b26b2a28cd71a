"""Neighbours of a layer: co-firing against a plain matrix of width x width, and peak memory.

Latents whose number of firing tokens is log-normal, 32 on a token on average; those of a group of
eight draw half of their tokens from the same ones. Frames are made from the latent's number when
they are asked for, so that the activations themselves take no memory.
"""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import scipy.sparse

from autointerp_dagster.core.neighbours import (
    CountedTokens,
    Incidence,
    Ranked,
    WindowDraw,
    cofiring_neighbours,
    drawn_windows,
    neighbour_windows_table,
    neighbours_table,
)
from autointerp_dagster.core.schemas import ACTIVATIONS
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LayerKey
from benchmarks.measure import Result, by_turns

LAYER = LayerKey("sae", "layers.9")
CONTEXT_LEN, FIRING, GROUP = 256, 32, 8
N_NEIGHBOURS = 10
WIDTH, N_CONTEXTS = 8192, 1028  # 262k tokens
WIDE, N_MANY_CONTEXTS, RANGE = 32_768, 3_922, 4096  # 1M tokens
TOKENS_AT_ONCE = 20_000
TIME_BAR = 2.0
MEMORY_BAR = 2.0


@dataclass(frozen=True)
class Layer:
    """Made-up activations of a whole layer."""

    width: int
    n_contexts: int

    @property
    def dataset(self) -> TokenDataset:
        """Full contexts with BOS; what the tokens are plays no part."""
        offsets = np.arange(self.n_contexts + 1, dtype=np.int64) * CONTEXT_LEN
        tokens, no_table = np.ones(offsets[-1], np.int32), pl.DataFrame()
        return TokenDataset(tokens, offsets, no_table, no_table, bos_id=0)

    @property
    def n_tokens(self) -> int:
        """Without BOS."""
        return self.n_contexts * (CONTEXT_LEN - 1)

    @cached_property
    def n_firing(self) -> np.ndarray:
        """Tokens of each latent, before repeated ones are dropped."""
        numbers = np.random.default_rng(0).lognormal(0, 1.2, self.width)
        numbers *= self.n_tokens * FIRING / numbers.sum()
        return np.minimum(numbers, self.n_tokens // 4).astype(np.int64) + 1

    def tokens_of(self, latent: int) -> np.ndarray:
        """Ascending numbers of the tokens it fires on."""
        own, n = np.random.default_rng([1, latent]), self.n_firing[latent]
        shared = np.random.default_rng([2, latent // GROUP]).integers(0, self.n_tokens, n // 2)
        return np.unique(np.concatenate([shared, own.integers(0, self.n_tokens, n - n // 2)]))

    def frames(self, latents: range, at_once: int = 64) -> Iterator[pl.DataFrame]:
        """``schemas.ACTIVATIONS``."""
        for start in range(latents.start, latents.stop, at_once):
            block = range(start, min(start + at_once, latents.stop))
            tokens = [self.tokens_of(latent) for latent in block]
            token = np.concatenate(tokens)
            frame = {
                "latent": np.repeat(np.array(block), [len(mine) for mine in tokens]),
                "context": token // (CONTEXT_LEN - 1),
                "position": token % (CONTEXT_LEN - 1) + 1,
                "activation": np.ones(len(token), dtype=np.float32),
            }
            yield pl.DataFrame(frame).cast(pl.Schema(ACTIVATIONS.columns))


def run() -> list[Result]:
    """CPU time against the plain version, and gigabytes at full width."""
    layer = Layer(WIDTH, N_CONTEXTS)
    frames = list(layer.frames(range(WIDTH)))
    pair = by_turns(lambda: ours(layer, frames), lambda: plain(layer, frames))
    for mine, expected in zip(pair.ours, pair.plain, strict=True):
        np.testing.assert_array_equal(mine, expected)  # the values too: difference 0.0
    ratio = f"co-firing neighbours of {WIDTH} latents against a matrix of width x width"
    peak = (
        f"neighbours of {WIDE} latents, {N_MANY_CONTEXTS * (CONTEXT_LEN - 1)} tokens: peak memory"
    )
    return [
        Result(ratio, pair.ratio, TIME_BAR, "x"),
        Result(peak, peak_gigabytes(), MEMORY_BAR, "GB", is_cost=True),
    ]


def ours(layer: Layer, frames: list[pl.DataFrame]) -> Ranked:
    """The package's way, from the stored activations."""
    counted = CountedTokens.of(layer.dataset, LAYER, 1 << 40, seed=0)
    incidence = Incidence.of(lambda: frames, layer.width, counted)
    return cofiring_neighbours(frames, counted, incidence, N_NEIGHBOURS)


def plain(layer: Layer, frames: list[pl.DataFrame]) -> Ranked:
    """All counts at once: sparse products of batches of tokens, added into a dense matrix."""
    firing = pl.concat(frames)
    latent = firing["latent"].to_numpy()
    token = firing["context"].to_numpy().astype(np.int64) * (CONTEXT_LEN - 1)
    token += firing["position"].to_numpy().astype(np.int64) - 1
    matrix = scipy.sparse.csr_array(
        (np.ones(len(token), np.int32), (token, latent)), shape=(layer.n_tokens, layer.width)
    )
    shared = np.zeros((layer.width, layer.width), dtype=np.int32)
    for start in range(0, layer.n_tokens, TOKENS_AT_ONCE):
        part = matrix[start : start + TOKENS_AT_ONCE]
        shared += (part.T @ part).toarray()
    n_firing = shared.diagonal()
    value = shared / (n_firing[:, None] + n_firing - shared)
    np.fill_diagonal(value, 0.0)
    least = np.partition(value, -N_NEIGHBOURS, axis=1)[:, -N_NEIGHBOURS, None]
    row, other = np.nonzero((value >= least) & (value > 0))
    order = np.lexsort((other, -value[row, other], row))
    row, other = row[order], other[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    row, rank, other = (column[rank < N_NEIGHBOURS] for column in (row, rank, other))
    return Ranked(row, rank, other, value[row, other])


def peak_gigabytes() -> float:
    """Of a process of its own, beyond what it has after its imports."""
    command = [sys.executable, "-c", "from benchmarks import neighbours; neighbours.search_all()"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def search_all() -> None:
    """Every range of the wide layer with its tables, as the stage does; writes the peak in GB."""
    before = _kilobytes("VmRSS")
    layer = Layer(WIDE, N_MANY_CONTEXTS)
    ranges = [range(start, start + RANGE) for start in range(0, WIDE, RANGE)]
    dataset = layer.dataset
    counted = CountedTokens.of(dataset, LAYER, 1 << 40, seed=0)
    incidence = Incidence.of(lambda: layer.frames(range(WIDE)), WIDE, counted)
    found = [
        cofiring_neighbours(layer.frames(part), counted, incidence, N_NEIGHBOURS) for part in ranges
    ]
    del incidence
    wanted = np.unique(np.concatenate([ranked.neighbour for ranked in found]))
    windows = drawn_windows(
        layer.frames(range(WIDE)), WindowDraw(dataset, LAYER, 32, 64, 0, wanted)
    )
    for ranked in found:
        neighbours_table({"cofiring": ranked}, LAYER)
        neighbour_windows_table(windows.of(np.unique(ranked.neighbour)), 32, LAYER)
    sys.stdout.write(f"{(_kilobytes('VmHWM') - before) / 2**20}\n")


def _kilobytes(field: str) -> int:
    """Of this process, by Linux: what ``getrusage`` says is at least what the parent had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
