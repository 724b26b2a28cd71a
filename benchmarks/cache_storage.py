"""A layer's activation cache on disk: bytes, reading 64 latents, and the cost of merging it.

A range of 2,048 latents of a TopK coder of 32,768 latents, k = 32, on a million tokens in contexts
of 256: 2.1 million non-zeros, log-normal in how often latents fire and how strongly, in the order
in which a pass finds them. Bytes are those of both blobs, bfloat16 values included, against the 14
of the row in memory. The merge is sort, unpack, check, hash, encode and write; statistics apart.
"""

import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import torch

from autointerp_dagster.adapters.cache.packing import KeyLayout
from autointerp_dagster.adapters.cache.spool import Spool
from autointerp_dagster.adapters.manifests import Blob, Manifest, Provenance
from autointerp_dagster.adapters.shards import ActivationShard, write_shard
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.activations import Nonzeros
from autointerp_dagster.core.schemas import ACTIVATIONS, FIRING_COUNTS
from autointerp_dagster.core.types import Cell, LatentRange, LayerKey
from benchmarks.measure import Result, cpu_seconds

CELL = Cell(LayerKey("sae", "layers.0"), LatentRange(0, 2048))
WIDTH, K, CONTEXT_LEN, N_CONTEXTS = 32_768, 32, 256, 4096
CHUNK = 8
"""Contexts in a chunk of the pass."""
REPEATS = 7
BYTES_BAR, READ_BAR_MS, MERGE_BAR_NS = 3.5, 10.0, 150.0
"""Merging took 98 to 104 on a busy machine; the bar leaves room for one that is busier."""


def run() -> list[Result]:
    """Bytes per non-zero, milliseconds per read of 64 latents, nanoseconds per non-zero merged."""
    rows = _rows()
    with tempfile.TemporaryDirectory() as folder:
        store, spool = Store(Path(folder) / "store"), _spooled(rows, Path(folder))
        n_rows = np.bincount(rows["latent"], minlength=len(_latents())).astype(np.int64)
        blobs, seconds = cpu_seconds(lambda: write_shard(store, spool.frames(CELL), n_rows))
        manifest = _manifest(store, blobs, n_rows)
        expected = ACTIVATIONS.conform(rows)
        read_ms = _read_ms(store, manifest, expected)
    n_bytes = sum(blob.n_bytes for blob in blobs)
    return [
        Result("activations on disk", n_bytes / rows.height, BYTES_BAR, "bytes", is_cost=True),
        Result("64 neighbouring latents, warm", read_ms, READ_BAR_MS, "ms", is_cost=True),
        Result("merge and write", seconds / rows.height * 1e9, MERGE_BAR_NS, "ns", is_cost=True),
    ]


def _latents() -> range:
    return range(CELL.range.start, CELL.range.stop)


def _rows() -> pl.DataFrame:
    """In the order of the places, as chunks bring them."""
    rng = np.random.default_rng(0)
    n_tokens, n_latents = CONTEXT_LEN * N_CONTEXTS, len(_latents())
    chances = rng.lognormal(0.0, 1.2, n_latents)
    chances *= n_tokens * K * n_latents / WIDTH / chances.sum()
    counts = np.minimum(chances.astype(int), n_tokens // 2)
    latent = np.repeat(np.arange(n_latents), counts)
    place = np.concatenate([rng.choice(n_tokens, n, replace=False) for n in counts])
    value = torch.from_numpy(rng.lognormal(0.0, 0.7, latent.size).astype(np.float32))
    order = np.argsort(place, kind="stable")
    return pl.DataFrame(
        {
            "latent": latent[order].astype(np.uint32),
            "context": (place[order] // CONTEXT_LEN).astype(np.uint32),
            "position": (place[order] % CONTEXT_LEN).astype(np.uint16),
            "activation": value.to(torch.bfloat16).float().numpy()[order],
        }
    )


def _spooled(rows: pl.DataFrame, folder: Path) -> Spool:
    layout = KeyLayout(0, (N_CONTEXTS - 1).bit_length(), (CONTEXT_LEN - 1).bit_length())
    spool = Spool(folder, {CELL: "0.keys"}, {CELL: layout})
    spool.create()
    bounds = np.searchsorted(rows["context"].to_numpy(), np.arange(0, N_CONTEXTS + 1, CHUNK))
    for start, stop in pairwise(bounds):
        chunk = rows[int(start) : int(stop)].sort(ACTIVATIONS.key)
        spool.append(CELL.layer, Nonzeros(*(column.to_numpy() for column in chunk)))
    spool.sync()
    return spool


def _manifest(store: Store, blobs: list[Blob], n_rows: np.ndarray) -> Manifest:
    counts = np.zeros(WIDTH, dtype=np.int64)
    counts[: n_rows.size] = n_rows
    table = pl.DataFrame(
        {"latent": range(WIDTH), "n_tokens": counts, "n_contexts": counts, "max_activation": 1.0}
    )
    return store.commit(
        Manifest(
            stage="activation_cache",
            stage_version="2",
            cell=str(CELL),
            input_fingerprint="f",
            content_hash="c",
            complete=True,
            parameters={},
            upstream=(),
            blobs=(*blobs, store.put_table(FIRING_COUNTS, FIRING_COUNTS.conform(table))),
            provenance=Provenance(study="s", run_id="r", started="", finished="", seconds=0.0),
        )
    )


def _read_ms(store: Store, manifest: Manifest, expected: pl.DataFrame) -> float:
    """The slowest of three places; of each the best of a few reads, since the clock is a wall's."""
    shard = ActivationShard(store, manifest)
    slowest = 0.0
    for first in (0, 1000, len(_latents()) - 64):
        times = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            found = shard.read(range(first, first + 64))
            times.append(time.perf_counter() - started)
        inside = pl.col("latent").is_between(first, first + 64, closed="left")
        assert found.equals(expected.filter(inside))
        slowest = max(slowest, min(times) * 1e3)
    return slowest
