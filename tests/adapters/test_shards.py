"""A shard gives the rows of the latents that are asked for, and nothing that is damaged."""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autointerp_dagster.adapters import shards
from autointerp_dagster.adapters.hashing import HASH_BLOCK
from autointerp_dagster.adapters.manifests import Manifest, Provenance
from autointerp_dagster.adapters.shards import ActivationShard, write_shard
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.schemas import ACTIVATIONS, FIRING_COUNTS
from autointerp_dagster.core.types import LatentRange

WIDTH = 40
LATENTS = LatentRange(20, 52)
"""Beyond the coder's width, as the last range of a layer may be."""


def frame_of(n_rows: list[int], first: int) -> pl.DataFrame:
    """That many rows of each latent."""
    latent = np.repeat(np.arange(first, first + len(n_rows)), n_rows)
    place = np.concatenate([np.arange(n) for n in n_rows] + [np.arange(0)])
    frame = pl.DataFrame(
        {
            "latent": latent,
            "context": place // 250,
            "position": place % 250 + 1,
            "activation": (place % 97 + 1).astype(np.float32) / 8,
        }
    )
    return ACTIVATIONS.conform(frame)


def stored(store: Store, n_rows: list[int], latents: LatentRange = LATENTS) -> Manifest:
    counts = np.zeros(WIDTH, dtype=np.int64)
    counts[latents.start : latents.start + len(n_rows)] = n_rows
    frame = frame_of(n_rows, latents.start)
    pieces = (frame[start : start + 100_000] for start in range(0, frame.height, 100_000))
    blobs = write_shard(store, pieces, np.array(n_rows, dtype=np.int64))
    table = pl.DataFrame(
        {"latent": range(WIDTH), "n_tokens": counts, "n_contexts": counts, "max_activation": 1.0}
    )
    blobs.append(store.put_table(FIRING_COUNTS, FIRING_COUNTS.conform(table)))
    return store.commit(
        Manifest(
            stage="activation_cache",
            stage_version="2",
            cell=f"sae@layers.1/{latents}",
            input_fingerprint="f",
            content_hash="c",
            complete=True,
            parameters={},
            upstream=(),
            blobs=tuple(blobs),
            provenance=Provenance(study="s", run_id="r", started="", finished="", seconds=1.0),
        )
    )


N_ROWS = [3, 0, HASH_BLOCK - 3, 0, 5, HASH_BLOCK * 2 + 7, 1, 0, 40_000, *[0] * 10, 2]
"""Row groups end where a latent ends, and within one that fires on more tokens than two hold."""


@pytest.fixture(scope="module", params=["local", "memory"])
def shard(request, tmp_path_factory) -> ActivationShard:
    folder = tmp_path_factory.mktemp("shard")
    store = Store(folder if request.param == "local" else f"memory://{folder.name}")
    return ActivationShard(store, stored(store, N_ROWS))


def test_a_shard_knows_its_latents_and_how_many_rows_each_has(shard):
    assert shard.latents == range(20, 40)
    assert shard.n_rows.tolist() == N_ROWS
    assert shard.firing_counts.height == WIDTH


@given(st.tuples(st.integers(20, 40), st.integers(20, 40)).map(sorted))
@settings(max_examples=30, deadline=None)
def test_any_range_of_latents_reads_as_a_filter_of_the_whole(shard, bounds):
    whole = frame_of(N_ROWS, 20)
    found = shard.read(range(*bounds))
    assert found.equals(whole.filter(pl.col("latent").is_between(*bounds, closed="left")))


@given(st.lists(st.integers(20, 39), max_size=6))
@settings(max_examples=30, deadline=None)
def test_some_latents_read_in_order_whatever_the_order_asked(shard, latents):
    whole = frame_of(N_ROWS, 20)
    assert shard.read_each(latents).equals(whole.filter(pl.col("latent").is_in(latents)))


def test_frames_and_blocks_together_are_the_whole(shard):
    whole = frame_of(N_ROWS, 20)
    frames = list(shard.frames())
    assert pl.concat(frames).equals(whole)
    assert max(frame.height for frame in frames) <= 2 * HASH_BLOCK
    blocks = list(shard.blocks(50_000))
    assert [latent for block in blocks for latent in block] == list(range(20, 40))
    assert pl.concat([shard.read(block) for block in blocks]).equals(whole)


def test_latents_of_another_range_are_refused(shard):
    with pytest.raises(ValueError, match=r"range\(19, 22\).*wanted some of range\(20, 40\)"):
        shard.read(range(19, 22))
    with pytest.raises(ValueError, match="wanted some of"):
        shard.read_each([40])
    assert shard.read(range(30, 30)).is_empty()


@pytest.mark.parametrize("n_rows", [[0] * 20, []])
def test_a_range_in_which_nothing_fires_is_a_shard_without_rows(tmp_path, n_rows):
    store = Store(tmp_path)
    latents = LATENTS if n_rows else LatentRange(40, 60)
    shard = ActivationShard(store, stored(store, n_rows, latents))
    assert shard.read(shard.latents).equals(ACTIVATIONS.empty())
    assert pl.concat(shard.frames()).equals(ACTIVATIONS.empty())
    assert shard.n_rows.tolist() == n_rows


def test_only_the_row_groups_that_are_asked_for_are_read(tmp_path, monkeypatch):
    store = Store(tmp_path)
    shard = ActivationShard(store, stored(store, N_ROWS))
    _ = shard.read(range(39, 40))  # the footer is read once
    n_bytes: list[int] = []
    read_parts = Store.read_parts

    def counted(store, blob, parts):
        data = read_parts(store, blob, parts)
        n_bytes.append(len(data))
        return data

    monkeypatch.setattr(Store, "read_parts", counted)
    shard.read(range(20, 22))
    (read,) = n_bytes
    assert read < (tmp_path / shard._blob.path).stat().st_size / 2


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_damaged_row_group_is_refused_and_the_others_are_read(tmp_path):
    store = Store(tmp_path)
    manifest = stored(store, N_ROWS)
    shard = ActivationShard(store, manifest)
    path = tmp_path / manifest.blob("activations").path
    first = shard._row_groups[0]
    damage(path, first.start + 100)
    fresh = ActivationShard(store, manifest)
    with pytest.raises(
        StoreError, match=rf"sae@layers\.1/0000020-0000051.*{path.name}.*damaged; delete it and mat"
    ):
        fresh.read(range(20, 21))
    assert fresh.read(range(39, 40)).height == 2


@pytest.mark.parametrize("where", ["every part", "short", "gone"])
def test_damage_anywhere_in_what_is_read_is_named(tmp_path, where):
    store = Store(tmp_path)
    manifest = stored(store, [700, 0, 900])
    path = tmp_path / manifest.blob("activations").path
    whole = path.read_bytes()
    if where == "every part":
        places = range(4, len(whole), 61)  # the first four bytes are never read
        for at in places:
            damage(path, at)
            with pytest.raises(StoreError, match="damaged"):
                ActivationShard(store, manifest).read(range(20, 23))
            path.write_bytes(whole)
    elif where == "short":
        for size in (0, 10, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(StoreError, match="damaged"):
                ActivationShard(store, manifest).read(range(20, 23))
    else:
        path.unlink()
        with pytest.raises(StoreError, match=r"missing. Materialize the cell"):
            ActivationShard(store, manifest).read(range(20, 23))


@pytest.mark.parametrize("name", [shards.OFFSETS, "firing_counts"])
def test_a_damaged_side_file_is_named_with_its_cell(tmp_path, name):
    store = Store(tmp_path)
    manifest = stored(store, [7, 0, 9])
    damage(tmp_path / manifest.blob(name).path, 40)
    with pytest.raises(StoreError, match=rf"sae@layers\.1/.*{name}.*checksum.*materialize"):
        ActivationShard(store, manifest)


def test_rows_that_were_lost_on_the_way_are_an_error(tmp_path):
    frame = frame_of([3, 4], 20)
    with pytest.raises(StoreError, match="6 rows, wanted the 7 that were counted"):
        write_shard(Store(tmp_path), [frame[:6]], np.array([3, 4]))


def test_the_content_hash_says_nothing_about_how_the_file_is_laid_out(tmp_path):
    store = Store(tmp_path)
    side = stored(store, N_ROWS).blob(shards.OFFSETS)
    offsets = store.tensors(side)["row_offsets"]
    assert store.put_tensors("x", {"row_offsets": offsets}).content_hash == side.content_hash


@pytest.mark.parametrize("is_local", [True, False])
def test_what_a_killed_process_left_of_a_shard_is_removed_a_day_later(
    tmp_path, monkeypatch, is_local
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "blobs"))
    old, fresh, foreign = (tmp_path / "blobs" / f for f in (
        ".autointerp-1.tmp", ".autointerp-2.tmp", "foreign.tmp"
    ))  # fmt: skip
    (tmp_path / "blobs").mkdir()
    for path in (old, fresh, foreign):
        path.write_bytes(b"x")
    for path in (old, foreign):
        os.utime(path, (time.time() - 90_000, time.time() - 90_000))
    store = Store(tmp_path if is_local else f"memory://{tmp_path.name}")
    store.put_frames(ACTIVATIONS, [ACTIVATIONS.empty()])
    left = {path.name for path in (tmp_path / "blobs").iterdir() if path.is_file()}
    assert left == {fresh.name, foreign.name}
