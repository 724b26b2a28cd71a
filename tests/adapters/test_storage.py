import errno
import hashlib
import os
import subprocess
import sys

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from upath import UPath

from autointerp_dagster.adapters.bulk import list_files
from autointerp_dagster.adapters.manifests import Manifest, Part, Provenance, content_hash_of
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.schemas import ACTIVATIONS, TABLES, WINDOWS, Table


def rows(n=3):
    frame = pl.DataFrame({"latent": range(n), "context": 1, "position": 2, "activation": 0.5})
    return ACTIVATIONS.conform(frame)


def manifest(store, blobs=(), *, complete=True, finished="2026-01-01", fingerprint="f"):
    return store.commit(
        Manifest(
            stage="activation_cache",
            stage_version="1",
            cell="sae@layers.1/0000000-0000003",
            input_fingerprint=fingerprint,
            content_hash=content_hash_of(tuple(blobs), "ok"),
            complete=complete,
            parameters={"k": 3},
            upstream=(),
            blobs=tuple(blobs),
            provenance=Provenance(
                study="s", run_id="r", started="2026-01-01", finished=finished, seconds=1.0
            ),
        )
    )


@pytest.fixture(params=["local", "memory", "s3"])
def store(request, tmp_path):
    if request.param == "s3":
        return Store(request.getfixturevalue("s3").new_root())
    return Store(tmp_path if request.param == "local" else f"memory://{tmp_path.name}")


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_declared_table_survives_a_round_trip_even_when_empty(store, table):
    blob = store.put_table(table, table.empty())
    assert store.table(blob).schema == table.empty().schema
    assert blob.n_rows == 0


def test_a_table_with_nulls_and_lists_survives_a_round_trip(store):
    row = dict.fromkeys(WINDOWS.columns) | {
        "latent": 1, "split": "train", "is_activating": True, "window_id": 65_537, "context": 1,
        "start": 1, "rank": 0, "activations": [0.0, 1.5], "coder": "sae", "hookpoint": "h",
    }  # fmt: skip
    frame = WINDOWS.conform(pl.DataFrame([row], schema=WINDOWS.columns))
    assert store.table(store.put_table(WINDOWS, frame)).equals(frame)


def test_tensors_survive_a_round_trip(store):
    arrays = {"tokens": np.arange(5, dtype=np.int32), "offsets": np.array([0, 5])}
    read = store.tensors(store.put_tensors("tokens", arrays))
    assert all(np.array_equal(read[name], arrays[name]) for name in arrays)


def test_equal_content_is_stored_once(store):
    first, second = store.put_table(ACTIVATIONS, rows()), store.put_table(ACTIVATIONS, rows())
    assert first == second
    assert len([p for p in (store.root / "blobs").rglob("*") if p.is_file()]) == 1


def test_a_damaged_blob_is_refused_by_name(tmp_path):
    store = Store(tmp_path)
    blob = store.put_table(ACTIVATIONS, rows())
    path = tmp_path / blob.path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=rf"{blob.checksum}.*checksum.*materialize"):
        store.table(blob)


def test_a_missing_blob_is_named(store):
    blob = store.put_table(ACTIVATIONS, rows())
    (store.root / blob.path).unlink()
    with pytest.raises(StoreError, match=blob.checksum):
        store.table(blob)


def test_a_changed_manifest_is_refused(tmp_path):
    store = Store(tmp_path)
    stored = manifest(store)
    (tmp_path / stored.path).write_text((tmp_path / stored.path).read_text() + " ")
    with pytest.raises(StoreError, match="does not match"):
        store.manifest(stored.path)


def test_a_head_follows_the_newest_commit_and_the_old_manifest_stays(store):
    old, new = manifest(store, finished="2026-01-01"), manifest(store, finished="2026-01-02")
    store.set_head("study", "activation_cache", "cell", old)
    store.set_head("study", "activation_cache", "cell", new)
    assert store.head("study", "activation_cache", "cell") == new
    assert store.manifest(old.path) == old
    assert store.head("study", "activation_cache", "another") is None


def test_a_head_that_stays_is_not_written_again(tmp_path):
    store = Store(tmp_path)
    made = manifest(store)
    store.set_head("study", "activation_cache", "cell", made)
    path = tmp_path / "heads/study/activation_cache/cell"
    before = path.stat()
    store.set_head("study", "activation_cache", "cell", made)
    assert store.link("study", "activation_cache", "cell", made)
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_is_gone_is_not_linked(store):
    gone = manifest(store)
    (store.root / gone.path).unlink()
    assert not store.link("study", "activation_cache", "cell", gone)
    assert store.head("study", "activation_cache", "cell") is None


def test_an_incomplete_manifest_never_satisfies_a_search(store):
    manifest(store, complete=False, finished="2026-01-03")
    assert store.find("activation_cache", "f") is None
    done = manifest(store, finished="2026-01-02")
    assert store.find("activation_cache", "f") == done
    assert store.find("activation_cache", "other") is None


def test_a_part_is_found_by_its_fingerprint(store):
    part = Part(name="default", fingerprint="abc", blob=store.put_table(ACTIVATIONS, rows()))
    store.put_part("explanations", part)
    assert store.find_part("explanations", "abc") == part
    assert store.find_part("explanations", "abd") is None


def test_what_lost_a_blob_counts_as_never_made(store):
    blob = store.put_table(ACTIVATIONS, rows())
    manifest(store, [blob])
    store.put_part("explanations", Part(name="default", fingerprint="abc", blob=blob))
    assert store.find("activation_cache", "f") is not None
    (store.root / blob.path).unlink()
    assert store.find("activation_cache", "f") is None
    assert store.find_part("explanations", "abc") is None


def test_what_another_version_wrote_counts_as_never_made_and_is_named_when_read(tmp_path):
    store = Store(tmp_path)
    blob = store.put_table(ACTIVATIONS, rows())
    store.put_part("explanations", Part(name="default", fingerprint="abc", blob=blob))
    part = tmp_path / "parts" / "explanations" / "abc.json"
    part.write_text(part.read_text().replace('"name": "default"', '"name": "x", "new": 1', 1))
    assert store.find_part("explanations", "abc") is None
    text = (tmp_path / manifest(store).path).read_text().replace('"format": 1', '"format": 2')
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    path = f"activation_cache/other/{name}.json"
    (tmp_path / "activation_cache" / "other").mkdir()
    (tmp_path / path).write_text(text)
    assert store.find("activation_cache", "other") is None
    with pytest.raises(StoreError, match="another version of this package"):
        store.manifest(path)


def test_a_full_disk_leaves_nothing_that_is_read(tmp_path, monkeypatch):
    store = Store(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StoreError, match=r"No space left.*free space"):
        store.put_table(ACTIVATIONS, rows())
    monkeypatch.undo()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert store.table(store.put_table(ACTIVATIONS, rows())).equals(rows())


def test_a_folder_that_a_shared_disk_fails_to_list_is_no_empty_one(tmp_path, monkeypatch):
    store, listing = Store(tmp_path), os.scandir
    store.set_head("study", "activation_cache", "cell", manifest(store))

    def stale(path):
        if str(path).endswith("study"):
            raise OSError(errno.ESTALE, "Stale file handle")
        return listing(path)

    monkeypatch.setattr("os.scandir", stale)
    with pytest.raises(StoreError, match=r"heads: cannot be looked at: .*Stale file handle"):
        list_files(store.root, "heads")


KILLED = """
import os, sys
from autointerp_dagster.adapters.storage import Store
import polars as pl
from autointerp_dagster.core.schemas import ACTIVATIONS
os.fsync = lambda _: os.kill(os.getpid(), 9)
Store(sys.argv[1]).put_table(ACTIVATIONS, ACTIVATIONS.empty())
"""


def test_a_kill_during_a_write_leaves_no_blob(tmp_path):
    died = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert died.returncode == -9
    assert not list((tmp_path / "blobs").rglob("*.parquet"))
    store = Store(UPath(tmp_path))
    assert store.table(store.put_table(ACTIVATIONS, ACTIVATIONS.empty())).is_empty()


def test_activations_take_few_bytes_on_disk(tmp_path):
    # bf16 values in f32, sorted addresses: delta, byte split and zstd leave a few bytes a row.
    rng = np.random.default_rng(0)
    n = 200_000
    bits = rng.lognormal(size=n).astype(np.float32).view(np.uint32) & 0xFFFF0000
    frame = ACTIVATIONS.conform(
        pl.DataFrame(
            {
                "latent": np.sort(rng.integers(0, 4096, n)),
                "context": rng.integers(0, 4000, n),
                "position": rng.integers(0, 256, n),
                "activation": bits.view(np.float32),
            }
        ).unique(["latent", "context", "position"])
    )
    blob = Store(tmp_path).put_table(ACTIVATIONS, frame)
    assert blob.n_bytes / frame.height < 6


def activations(n: int) -> pl.DataFrame:
    frame = pl.DataFrame(
        {
            "latent": np.arange(n) // 1000,
            "context": np.arange(n) % 1000 // 250,
            "position": np.arange(n) % 250,
            "activation": (np.arange(n) % 89 + 1).astype(np.float32),
        }
    )
    return ACTIVATIONS.conform(frame)


@pytest.mark.parametrize("n", [0, 1, 131_072, 300_000])
@pytest.mark.parametrize("step", [1000, 131_072, 10**6])
def test_a_table_written_in_frames_is_the_table_written_at_once(tmp_path, n, step):
    whole, one, two = activations(n), Store(tmp_path / "a"), Store(tmp_path / "b")
    frames = [ACTIVATIONS.empty(), *(whole[start : start + step] for start in range(0, n, step))]
    blob = one.put_table(ACTIVATIONS, whole)
    found = two.put_frames(ACTIVATIONS, frames)
    assert found.blob.content_hash == blob.content_hash
    assert found.blob.n_rows == n
    assert two.table(found.blob).equals(whole)
    if n:
        assert found.blob == blob
    data = (tmp_path / "b" / found.blob.path).read_bytes()
    assert found.file.footer.stop == len(data) == found.blob.n_bytes
    assert [part.start for part in found.file.row_groups[1:]] == [
        part.stop for part in found.file.row_groups[:-1]
    ]
    assert [p.name for p in (tmp_path / "b" / "blobs").iterdir()] == [found.blob.checksum[:2]]


def test_row_groups_lie_where_the_file_says(tmp_path):
    found = Store(tmp_path).put_frames(ACTIVATIONS, [activations(300_000)])
    metadata = pq.read_metadata(tmp_path / found.blob.path)
    assert metadata.num_row_groups == len(found.file.row_groups) == 3
    for i, part in enumerate(found.file.row_groups):
        columns = [metadata.row_group(i).column(j) for j in range(4)]
        assert part.start == min(column.data_page_offset for column in columns)
        assert part.stop - part.start == sum(column.total_compressed_size for column in columns)


@pytest.mark.parametrize(
    "cut",
    [
        lambda frame: [frame[:10], frame[9:]],  # a row twice
        lambda frame: [frame[10:], frame[:10]],
        lambda frame: [frame[::-1]],
    ],
)
def test_frames_out_of_order_are_refused_and_leave_nothing(store, cut):
    with pytest.raises(ValueError, match="not in the order"):
        store.put_frames(ACTIVATIONS, cut(activations(20)))
    assert [p for p in (store.root / "blobs").rglob("*") if p.is_file()] == []


def test_frames_with_null_keys_keep_the_order_of_conform(store):
    lines = Table("lines", {"name": pl.String, "n": pl.UInt8}, ("name", "n"))
    frame = lines.conform(pl.DataFrame({"name": ["b", None, "a", None], "n": [1, 2, None, None]}))
    found = store.put_frames(lines, [frame[:2], frame[2:]])
    assert store.table(found.blob).equals(frame)
    with pytest.raises(ValueError, match="repeat a key"):
        store.put_frames(lines, [frame, frame[3:]])


def test_frames_of_other_columns_are_refused(store):
    with pytest.raises(ValueError, match="table activations: a frame has"):
        store.put_frames(ACTIVATIONS, [activations(3).drop("context")])


def test_part_of_a_blob_reads_without_the_rest(store):
    found = store.put_frames(ACTIVATIONS, [activations(300_000)])
    whole = (store.root / found.blob.path).read_bytes()
    parts = found.file.row_groups[1:]
    assert store.read_parts(found.blob, parts) == whole[parts[0].start : parts[-1].stop]
    wrong = parts[0]._replace(digest=bytes(16))
    with pytest.raises(StoreError, match=r"bytes \d+ to \d+ are not what.*damaged; delete it"):
        store.read_parts(found.blob, [wrong])
