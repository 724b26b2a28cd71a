"""A cell's records are the same however much of it is in memory at a time."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from autointerp_dagster.adapters.datasets import write_dataset
from autointerp_dagster.adapters.manifests import Blob, Manifest, Provenance, content_hash_of
from autointerp_dagster.adapters.shards import write_shard
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.config import TokenConfig
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.latent_records import latent_records_of
from autointerp_dagster.core.schemas import ACTIVATIONS, FIRING_COUNTS, LATENTS, WINDOWS
from autointerp_dagster.core.tokens import Document, TokenDataset, build_token_dataset
from autointerp_dagster.core.types import Cell, Place, WholeStudy
from autointerp_dagster.core.windows import window_grid
from autointerp_dagster.resources.negative_sources import RecordSources
from autointerp_dagster.resources.recording import store_records, stored_records
from autointerp_dagster.resources.stage_inputs import StageInputs
from autointerp_dagster.study import Study

WIDTH, RANGE = 26, 16


def study_of(**sampling: object) -> Study:
    return Study.model_validate(
        {
            "name": "s",
            "models": {
                "subject": {"source": "none"}, "explainer": {"source": "none"},
                "embedder": {"source": "none", "query_prefix": "", "device": "cpu"},
            },
            "corpus": {"kind": "embedded"},
            "coders": {"sae": {"path": "none"}},
            "layers": ["h.0"],
            "max_num_latents": 48,
            "range_size": RANGE,
            "explainers": {"default": {"kind": "default"}},
            "floors": {"donor_block": RANGE},
            "tokens": {"context_len": 16},
            "sampling": {
                "window_len": 4, "min_tokens": 5, "min_test_windows": 1, "n_train": 8,
                "n_select": 2, "n_test": 8, "n_negative_train": 4, "n_negative_select": 2,
                "n_negative_test": 8, **sampling,
            },
        }
    )  # fmt: skip


def corpus() -> TokenDataset:
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, 300, rng.integers(8, 60)) for _ in range(80)]
    return build_token_dataset(
        (Document(f"{i}", " ".join(map(str, text))) for i, text in enumerate(texts)),
        lambda batch: [[int(word) for word in text.split()] for text in batch],
        0,
        TokenConfig(n_tokens=10_000, context_len=16),
    )


def layer_activations(dataset: TokenDataset) -> pl.DataFrame:
    """Latent 0 fires everywhere, the fifth ones nowhere, the others now and then."""
    rng = np.random.default_rng(1)
    length = np.diff(dataset.offsets)
    context = np.repeat(np.arange(len(length)), length)
    position = np.arange(len(dataset.tokens)) - dataset.offsets[context]
    frames = []
    for latent in range(WIDTH):
        rate = 1.0 if latent == 0 else 0.0 if latent % 5 == 4 else 0.01 * (latent % 7 + 1)
        fires = (rng.random(len(context)) < rate) & (position > 0)
        values = rng.integers(1, 40, fires.sum()) / 8
        frames.append(
            pl.DataFrame(
                {"context": context[fires], "position": position[fires], "activation": values}
            ).with_columns(latent=pl.lit(latent))
        )
    frame = pl.concat(frames).with_columns(pl.col("activation").cast(pl.Float32))
    return ACTIVATIONS.conform(frame)


def counts_of(activations: pl.DataFrame) -> pl.DataFrame:
    counted = activations.group_by("latent").agg(
        n_tokens=pl.len(),
        n_contexts=pl.col("context").n_unique(),
        max_activation=pl.col("activation").max(),
    )
    every = pl.DataFrame({"latent": range(WIDTH)}, schema={"latent": pl.UInt32})
    both = every.join(counted, on="latent", how="left")
    return FIRING_COUNTS.conform(both.with_columns(pl.col("n_tokens", "n_contexts").fill_null(0)))


class World:
    """A corpus and one layer's cache in a store."""

    def __init__(self, folder: Path, **sampling: object) -> None:
        self.store, self.study = Store(folder), study_of(**sampling)
        self.dataset = corpus()
        self.activations = layer_activations(self.dataset)
        self.counts = counts_of(self.activations)
        self.grid = window_grid(self.dataset, self.study.sampling)
        external = {"sparse_coders": lambda place: "v", "subject_model": lambda place: "v"}
        self.stage = StageInputs.of(self.store, self.study, "latent_records", external=external)
        dataset = self._committed("token_dataset", "all", write_dataset(self.store, self.dataset))
        self.stage.take("token_dataset", WholeStudy(), dataset)
        for cell in self.cells:
            self.stage.take("activation_cache", cell, self._cached(cell))

    @property
    def sources(self) -> RecordSources:
        """As of a new run."""
        return RecordSources(self.stage, self.study, self.dataset, self.grid)

    @property
    def cells(self) -> list[Cell]:
        """But for the one beyond the coder's width."""
        return [cell for cell in self.study.cells if cell.range.start < WIDTH]

    def latents(self, cell: Cell) -> range:
        return range(cell.range.start, min(cell.range.stop, WIDTH))

    def _cached(self, cell: Cell) -> Manifest:
        latents = self.latents(cell)
        mine = self.activations.filter(pl.col("latent").is_in(list(latents)))
        n_rows = self.counts["n_tokens"].to_numpy()[latents.start : latents.stop]
        blobs = write_shard(self.store, [mine], n_rows.astype(np.int64))
        blobs.append(self.store.put_table(FIRING_COUNTS, self.counts))
        return self._committed("activation_cache", str(cell), blobs)

    def _committed(self, stage: str, place: str | Place, blobs: list[Blob]) -> Manifest:
        return self.store.commit(
            Manifest(
                stage=stage, stage_version="2", cell=str(place), input_fingerprint="f",
                content_hash=content_hash_of(blobs, "ok"), complete=True, parameters={},
                upstream=(), blobs=tuple(blobs),
                provenance=Provenance(study="s", run_id="r", started="", finished="", seconds=0.0),
            )
        )  # fmt: skip


@pytest.mark.parametrize(
    "sampling", [{}, {"window_mode": "centred", "max_window_firing_rate": 1.0}]
)
def test_blocks_of_any_size_store_the_same_bytes(tmp_path: Path, sampling: dict[str, object]):
    world = World(tmp_path, **sampling)
    for cell in world.cells:
        latents = world.latents(cell)
        mine = world.activations.filter(pl.col("latent").is_in(list(latents)))
        tables = latent_records_of(
            mine, world.counts, world.dataset, cell.layer, latents, world.study.sampling
        )
        found = [store_records(world.sources, cell, block_rows) for block_rows in (1, 100, 10**9)]
        assert {blob.checksum for stored in found for blob in stored.blobs} == {
            blob.checksum for blob in found[0].blobs
        }
        blobs = {blob.name: blob for blob in found[0].blobs}
        assert world.store.table(blobs[LATENTS.name]).equals(tables.latents)
        assert world.store.table(blobs[WINDOWS.name]).equals(tables.windows)
        assert found[0].latents.equals(tables.latents)
        counts = found[0].counts
        assert counts.n_windows == tables.windows.height > 0
        assert counts.ok + counts.dead + counts.rare + counts.dense == len(latents)
        assert counts.dead > 0


def test_cells_share_the_corpus_and_come_in_the_order_asked_for(tmp_path: Path):
    world = World(tmp_path)
    found = list(stored_records(world.stage, world.study, world.cells[::-1]))
    assert [cell for cell, _ in found] == world.cells[::-1]
    assert sum(stored.latents.height for _, stored in found) == WIDTH
    assert list(stored_records(world.stage, world.study, [])) == []


def test_a_range_in_which_nothing_fires_has_a_row_for_each_latent(tmp_path: Path):
    world = World(tmp_path)
    cell = world.cells[0]
    world.activations = world.activations.clear()
    world.counts = counts_of(world.activations)
    world.stage.take("activation_cache", cell, world._cached(cell))
    stored = store_records(world.sources, cell)
    assert stored.latents["status"].to_list() == ["dead"] * RANGE
    assert stored.counts.n_windows == 0
    blobs = {blob.name: blob for blob in stored.blobs}
    assert world.store.table(blobs[WINDOWS.name]).is_empty()


def test_a_damaged_cache_is_an_error_that_names_the_cell_and_leaves_no_table(tmp_path: Path):
    world = World(tmp_path)
    cell = world.cells[0]
    blob = world.stage.input("activation_cache", cell).blob(ACTIVATIONS.name)
    path = tmp_path / blob.path
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 255
    path.write_bytes(bytes(data))
    before = set(tmp_path.rglob("*.parquet"))
    with pytest.raises(StoreError, match=r"activation_cache sae@h\.0"):
        store_records(world.sources, cell)
    assert set(tmp_path.rglob("*.parquet")) == before
    assert not list(tmp_path.rglob("*.tmp"))
