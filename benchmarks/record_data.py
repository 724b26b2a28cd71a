"""Synthetic activations of a range of latents, and their records as the asset makes them."""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from autointerp_dagster.adapters.manifests import Manifest, Provenance
from autointerp_dagster.adapters.shards import ActivationShard, write_shard
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.latent_records import RecordTables, latent_records_of
from autointerp_dagster.core.schemas import ACTIVATIONS, FIRING_COUNTS, LATENTS, WINDOWS
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LatentRange, LayerKey
from autointerp_dagster.core.windows import WindowGrid

LAYER = LayerKey("sae", "layers.9")
BLOCK_ROWS = 500_000
"""As in ``resources.recording``."""


@dataclass(frozen=True)
class Range:
    """The cache of a range of latents, in a store."""

    store: Store
    shard: ActivationShard
    dataset: TokenDataset

    def blocks(self) -> Iterator[tuple[range, pl.DataFrame]]:
        """Some latents at a time, and their activations."""
        for block in self.shard.blocks(BLOCK_ROWS):
            yield block, self.shard.read(block)

    def tables(
        self,
        blocks: Iterable[tuple[range, pl.DataFrame]],
        config: SamplingConfig,
        grid: WindowGrid,
    ) -> Iterator[RecordTables]:
        """The records, block by block."""
        counts = self.shard.firing_counts
        for block, rows in blocks:
            yield latent_records_of(rows, counts, self.dataset, LAYER, block, config, grid)

    def put(self, config: SamplingConfig, grid: WindowGrid) -> int:
        """Makes the records and stores them as Parquet; how many windows they have."""
        latents: list[pl.DataFrame] = []

        def windows() -> Iterator[pl.DataFrame]:
            for tables in self.tables(self.blocks(), config, grid):
                latents.append(tables.latents)
                yield tables.windows

        with tempfile.TemporaryDirectory() as folder:
            store = Store(folder)
            blob = store.put_frames(WINDOWS, windows()).blob
            store.put_table(LATENTS, pl.concat(latents))
        return blob.n_rows or 0


def log_normal(n_latents: int, mean: float, spread: float, most: int) -> np.ndarray:
    """Firing tokens per latent."""
    rng = np.random.default_rng(2)
    draws = rng.lognormal(np.log(mean) - spread**2 / 2, spread, n_latents)
    return np.minimum(draws, most).astype(np.int64)


def activations_of(dataset: TokenDataset, n_tokens: np.ndarray) -> pl.DataFrame:
    """``schemas.ACTIVATIONS``: each latent on tokens of its own choice, at random.

    Of equal contexts; a token that is chosen twice fires once.
    """
    rng = np.random.default_rng(1)
    first = dataset.first_visible
    visible = int(dataset.offsets[1]) - first
    n_places = (len(dataset.offsets) - 1) * visible
    places = [np.unique(rng.integers(0, n_places, n)) for n in n_tokens]
    place = np.concatenate(places)
    values = rng.lognormal(0, 1, len(place)).astype(np.float32)
    frame = pl.DataFrame(
        {
            "latent": np.repeat(np.arange(len(places)), [len(p) for p in places]),
            "context": place // visible,
            "position": place % visible + first,
            "activation": (values.view(np.uint32) & 0xFFFF0000).view(np.float32),  # bfloat16
        }
    )
    return ACTIVATIONS.conform(frame)


def firing_counts_of(activations: pl.DataFrame, n_latents: int) -> pl.DataFrame:
    """``schemas.FIRING_COUNTS``."""
    counted = activations.group_by("latent").agg(
        n_tokens=pl.len(),
        n_contexts=pl.col("context").n_unique(),
        max_activation=pl.col("activation").max(),
    )
    latents = pl.DataFrame({"latent": range(n_latents)}, schema={"latent": pl.UInt32})
    both = latents.join(counted, on="latent", how="left")
    return FIRING_COUNTS.conform(both.with_columns(pl.col("n_tokens", "n_contexts").fill_null(0)))


def stored_range(folder: str, dataset: TokenDataset, n_tokens: np.ndarray) -> Range:
    """The cache of latents that fire on about that many tokens each."""
    store, n_latents = Store(Path(folder)), len(n_tokens)
    activations = activations_of(dataset, n_tokens)
    counts = firing_counts_of(activations, n_latents)
    blobs = write_shard(store, [activations], counts["n_tokens"].to_numpy().astype(np.int64))
    manifest = Manifest(
        stage="activation_cache",
        stage_version="2",
        cell=f"{LAYER}/{LatentRange(0, n_latents)}",
        input_fingerprint="f",
        content_hash="c",
        complete=True,
        parameters={},
        upstream=(),
        blobs=(*blobs, store.put_table(FIRING_COUNTS, counts)),
        provenance=Provenance(study="s", run_id="r", started="", finished="", seconds=0.0),
    )
    return Range(store, ActivationShard(store, manifest), dataset)
