"""What negatives are drawn from is read once for a run, in parts, and gone with it."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from test_recording import WIDTH, World

from autointerp_dagster.adapters.manifests import Part
from autointerp_dagster.adapters.window_vectors import (
    NEAREST,
    EmbeddedWindows,
    NearestWindows,
    numbered,
    put_vectors,
    put_windows,
    unit_vectors,
)
from autointerp_dagster.core.negatives import NegativeSources, TokenWindows
from autointerp_dagster.core.schemas import NEIGHBOUR_WINDOWS, NEIGHBOURS
from autointerp_dagster.core.types import Cell, WholeStudy
from autointerp_dagster.resources.negative_sources import RecordSources
from autointerp_dagster.resources.recording import store_records, stored_records

N_NEIGHBOURS = 3


def embedded(folder: Path, kinds: list[str], dim: int = 6, seed: int = 0) -> World:
    """A world whose windows have made-up vectors."""
    world = World(folder, negative_kinds=kinds)
    rng = np.random.default_rng(seed)
    ids = world.grid.window_id
    text = np.stack([ids, ids], axis=1)
    vectors = unit_vectors(rng.normal(size=(len(ids), dim)).astype(np.float32))
    windows = put_windows(world.store, EmbeddedWindows(ids, text))
    blobs = [windows, *numbered([put_vectors(world.store, vectors)])]
    manifest = world._committed("window_embeddings", "all", blobs)
    world.stage.take("window_embeddings", WholeStudy(), manifest)
    return world


def with_neighbours(folder: Path) -> World:
    """A world in which each latent's neighbours are the next ones, by two measures."""
    world = World(folder, negative_kinds=["random", "neighbour"])
    ids = world.grid.window_id
    rng = np.random.default_rng(0)
    for cell in world.cells:
        rows: list[dict[str, Any]] = [
            {"latent": latent, "measure": measure, "rank": rank, "value": 0.5,
             "neighbour": (latent + step * (rank + 1)) % WIDTH}
            for latent in world.latents(cell)
            for measure, step in (("cofiring", 1), ("decoder", 2))
            for rank in range(N_NEIGHBOURS)
        ]  # fmt: skip
        near = NEIGHBOURS.conform(pl.DataFrame(rows), cell.layer)
        drawn = [
            {
                "latent": other,
                "window_id": int(window),
                "activations": [1.0, 0.0, 0.0, float(other)],
            }
            for other in near.filter(measure="cofiring")["neighbour"].unique()
            for window in rng.choice(ids, 5, replace=False)
        ]
        windows = NEIGHBOUR_WINDOWS.conform(pl.DataFrame(drawn), cell.layer)
        blobs = [
            world.store.put_table(NEIGHBOURS, near),
            world.store.put_table(NEIGHBOUR_WINDOWS, windows),
        ]
        world.stage.take("neighbours", cell, world._committed("neighbours", cell, blobs))
    return world


def tables(world: World, sources: RecordSources, cell: Cell) -> list[str]:
    return [blob.checksum for blob in store_records(sources, cell, block_rows=100).blobs]


@pytest.mark.parametrize("at_once", [1, 5, 1000])
def test_neighbours_read_for_some_latents_at_a_time_are_the_same(
    tmp_path: Path, at_once: int
) -> None:
    world = with_neighbours(tmp_path)
    sources = RecordSources(
        world.stage, world.study, world.dataset, world.grid, latents_at_once=at_once
    )
    for cell in world.cells:
        latents = world.latents(cell)
        near = world.store.table(world.stage.input("neighbours", cell).blob("neighbours"))
        drawn = world.store.table(world.stage.input("neighbours", cell).blob("neighbour_windows"))
        for start in range(latents.start, latents.stop, 3):
            block = range(start, min(start + 3, latents.stop))
            found = sources.of(cell, block)
            expected = near.filter(pl.col("latent").is_in(list(block)), measure="cofiring")
            others = expected["neighbour"].unique().to_list()
            assert_frame_equal(found.neighbours, expected)
            assert_frame_equal(
                found.neighbour_windows, drawn.filter(pl.col("latent").is_in(others))
            )
        again = RecordSources(world.stage, world.study, world.dataset, world.grid)
        assert tables(world, sources, cell) == tables(world, again, cell)


def test_only_what_a_kind_of_the_study_needs_is_read(tmp_path: Path) -> None:
    world = World(tmp_path)  # no neighbours and no embeddings are in the store
    cell = world.cells[0]
    assert world.sources.of(cell, range(2, 5)) == NegativeSources(first_latent=2)


def test_vectors_are_read_once_for_all_cells_of_a_run(tmp_path: Path) -> None:
    world = embedded(tmp_path, ["similar", "same_token"])
    sources = world.sources
    first, last = (sources.of(cell, world.latents(cell)) for cell in world.cells)
    assert isinstance(first.similar, NearestWindows)
    assert first.similar is last.similar
    assert isinstance(first.token_windows, TokenWindows)
    assert first.token_windows is last.token_windows


def test_nothing_of_a_corpus_outlives_the_run(tmp_path: Path) -> None:
    world = embedded(tmp_path, ["similar", "same_token"])
    made = list(stored_records(world.stage, world.study, world.cells))
    assert len(made) == 2
    del made
    gc.collect()
    kinds = (NearestWindows, TokenWindows, RecordSources)
    assert not [kept for kept in gc.get_objects() if type(kept) in kinds]


def parts(folder: Path) -> set[Path]:
    return set(folder.glob("parts/latent_records/*.json"))


def similar(world: World, split: int = 2) -> np.ndarray:
    found = world.sources.of(world.cells[0], world.latents(world.cells[0])).similar
    assert found is not None
    return found.nearest(np.flatnonzero(world.grid.split == split), split)


def test_what_was_found_is_read_by_later_runs_until_vectors_or_splits_change(
    tmp_path: Path,
) -> None:
    world = embedded(tmp_path, ["similar"])
    found = similar(world)
    (path,) = parts(tmp_path)
    part = Part.from_json(path.read_bytes())
    kept = world.store.tensors(part.blob)[NEAREST]
    assert kept.shape == found.shape
    turned = world.store.put_tensors(NEAREST, {NEAREST: kept[:, ::-1].copy()})
    world.store.put_part("latent_records", part.model_copy(update={"blob": turned}))
    np.testing.assert_array_equal(similar(world), found[:, ::-1])  # it was read
    other = embedded(tmp_path, ["similar"], seed=1)
    assert (similar(other) != found[:, ::-1]).any()
    assert len(parts(tmp_path)) == 2
    moved = World(tmp_path, negative_kinds=["similar"], seed=5)
    vectors = world.stage.input("window_embeddings", WholeStudy())
    moved.stage.take("window_embeddings", WholeStudy(), vectors)
    assert (moved.grid.split != world.grid.split).any()
    similar(moved)
    assert len(parts(tmp_path)) == 3
