"""What a store refuses, or cannot do now, is said: it is no success, no damage, no empty store."""

import errno
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from object_store import BUCKET, ObjectStore
from upath import UPath

from autointerp_dagster.adapters.bulk import list_files, read_files, remove
from autointerp_dagster.adapters.durable import here
from autointerp_dagster.adapters.found_layers import FoundLayers, Refused
from autointerp_dagster.adapters.llm import Entry, Journal, Reply, SpendFile
from autointerp_dagster.adapters.llm.batch.files import BatchWriter, numbered_paths
from autointerp_dagster.adapters.llm.batch.records import Outstanding, Question
from autointerp_dagster.adapters.llm.journal.compaction import compact, everything
from autointerp_dagster.adapters.llm.journal.segments import block_folder
from autointerp_dagster.adapters.manifests import (
    Manifest,
    Provenance,
    content_hash_of,
    fingerprint_of,
)
from autointerp_dagster.adapters.pruning.deleting import prune
from autointerp_dagster.adapters.pruning.survey import DAY_S, Survey
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.adapters.verifying import discard, verify, wrong_with
from autointerp_dagster.core.config.models import RemoteLLMConfig
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.llm import JournalBlock, LabelList, Message, Request, Usage
from autointerp_dagster.core.schemas import ACTIVATIONS

BLOCK = JournalBlock("score_detection", "c0ffee", 7)
CELL = "sae@layers.1/0000000-0000003"
FINGERPRINT = fingerprint_of("activation_cache", "1", CELL, {}, ())


def rows() -> pl.DataFrame:
    frame = pl.DataFrame({"latent": range(3), "context": 1, "position": 2, "activation": 0.5})
    return ACTIVATIONS.conform(frame)


def made(store: Store) -> Manifest:
    blobs = (store.put_table(ACTIVATIONS, rows()),)
    manifest = store.commit(
        Manifest(
            stage="activation_cache",
            stage_version="1",
            cell=CELL,
            input_fingerprint=FINGERPRINT,
            content_hash=content_hash_of(blobs, "ok"),
            complete=True,
            parameters={},
            upstream=(),
            blobs=blobs,
            provenance=Provenance(study="s", run_id="r", started="", finished="", seconds=1.0),
        )
    )
    store.set_head("study", "activation_cache", CELL, manifest)
    return manifest


def asked(question: str) -> Request:
    return Request((Message("user", question),), LabelList(1), "unit", BLOCK)


def answered(root: UPath, wal: Path, *names: str) -> None:
    """A segment for each answer."""
    for name in names:
        with Journal(root, wal_dir=wal) as journal:
            journal.record(BLOCK, Entry.of(name, "m", asked(name), Reply("[1]", "stop"))).result()


def of_gc(store: Store, _: Path) -> Callable[[], object]:
    store.put_table(ACTIVATIONS, rows())
    survey = Survey(store, clock=lambda: time.time() + 40 * DAY_S)
    found = survey.look()
    assert found.doomed
    return lambda: prune(survey, found)


def of_verify(store: Store, _: Path) -> Callable[[], object]:
    path = made(store).blobs[0].path
    (store.root / path).write_bytes(b"damaged")
    found = verify(store, "study")
    assert [fault.path for fault in found.faults] == [path]
    return lambda: discard(store, found)


def of_layers(store: Store, _: Path) -> Callable[[], object]:
    layers, refused = FoundLayers(store, "study"), Refused(name="x", stamp="", reason="", since="")
    layers.refuse(refused)
    return lambda: layers.accept(refused)


def of_the_journal(store: Store, wal: Path) -> Callable[[], object]:
    answered(store.root, wal, "a", "b", "c")
    return Journal(store.root, wal_dir=wal).compact


@pytest.mark.parametrize("deleting", [of_gc, of_verify, of_layers, of_the_journal])
def test_a_file_that_a_store_refuses_to_delete_is_not_called_deleted(
    s3: ObjectStore, tmp_path: Path, deleting
) -> None:
    store = Store(s3.new_root())
    delete = deleting(store, tmp_path)
    deny = {"Action": "s3:DeleteObject", "Resource": [f"arn:aws:s3:::{BUCKET}/*"]}
    with (
        s3.denied(BUCKET, deny),
        pytest.raises(StoreError, match=r"the store keeps .* may delete there"),
    ):
        delete()
    delete()


def three_files(root: UPath) -> dict:
    for name in "abc":
        (root / name).write_bytes(b"old")
    return list_files(root, "")


def test_one_that_is_gone_already_keeps_no_other_from_being_deleted() -> None:
    root = UPath("memory://failures/gone")
    seen = three_files(root)
    (root / "a").unlink()
    remove(root, seen)
    assert not list_files(root, "")


def test_a_file_that_is_written_anew_meanwhile_is_no_failure_to_delete_it(monkeypatch) -> None:
    root, delete = UPath("memory://failures/anew"), MemoryFileSystem.rm
    seen = three_files(root)

    def rm(self, path, **options):
        delete(self, path, **options)
        (root / "b").write_bytes(b"new")

    monkeypatch.setattr(MemoryFileSystem, "rm", rm)
    remove(root, seen)
    assert set(list_files(root, "")) == {"b"}


def failing(number: int, path: object, real: Callable) -> Callable:
    """Opens as the system does, but for one file."""

    def fails(self: Path, *args, **options):
        if str(self) == str(path):
            raise OSError(number, os.strerror(number))
        return real(self, *args, **options)

    return fails


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_what_a_disk_cannot_read_now_is_not_called_damaged(tmp_path, monkeypatch, number) -> None:
    store = Store(tmp_path)
    (blob,) = made(store).blobs
    answered(store.root, tmp_path / "wal", "a")
    (segment,) = list_files(store.root, "journal")
    with monkeypatch.context() as broken:
        broken.setattr(Path, "open", failing(number, tmp_path / blob.path, Path.open))
        with pytest.raises(StoreError, match="cannot be read"):
            wrong_with(store, blob)
        with pytest.raises(StoreError, match="cannot be read"):
            verify(store, "study")
    assert wrong_with(store, blob) is None
    monkeypatch.setattr(Path, "open", failing(number, tmp_path / segment, Path.open))
    with pytest.raises(StoreError, match=r"cannot be read .*nothing is paid twice") as caught:
        Journal(store.root, wal_dir=tmp_path / "wal").load(BLOCK)
    assert "Delete" not in str(caught.value)


def refuse(self, path, *args, **options):
    """As gcsfs does: an OSError without a number."""
    raise OSError("Forbidden")


def test_what_a_remote_store_refuses_to_give_is_not_called_damaged(tmp_path, monkeypatch) -> None:
    root = UPath("memory://failures/refusing")
    answered(root, tmp_path, "a")
    with monkeypatch.context() as broken:
        for method in ("_open", "get_file", "cat_file"):
            broken.setattr(MemoryFileSystem, method, refuse)
        with pytest.raises(StoreError, match=r"Forbidden.*nothing is paid twice"):
            Journal(root, wal_dir=tmp_path).load(BLOCK)
    (segment,) = list_files(root, "journal")
    (root / segment).write_bytes((root / segment).read_bytes()[:-20])
    with pytest.raises(StoreError, match="Delete it to pay again"):
        Journal(root, wal_dir=tmp_path).load(BLOCK)


def test_a_record_of_a_batch_is_read_from_anywhere_and_called_damaged_only_if_it_is(
    tmp_path, monkeypatch
) -> None:
    config = RemoteLLMConfig(base_url="http://127.0.0.1:1/v1", model="m")
    root, question = (
        UPath("memory://failures/batches"),
        Question(asked("q").call_id("me"), asked("q")),
    )
    with BatchWriter(root, "study", numbered_paths(tmp_path / "out.jsonl")) as writer:
        writer.add(question, config, "me")
    (file,) = writer.files
    assert Outstanding(root).batch_of(question) == f"{file.batch} ({file.path})"

    def broken(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "read_table", broken)
        with pytest.raises(StoreError, match=r"cannot be read: .*Input/output error"):
            Outstanding(root)
    (path,) = list_files(root, "batches")
    (root / path).write_bytes(b"damaged")
    with pytest.raises(StoreError, match="not a readable record"):
        Outstanding(root)


def test_a_folder_that_cannot_be_listed_is_neither_unspent_nor_compacted(
    tmp_path, monkeypatch
) -> None:
    store, listing = Store(tmp_path), os.scandir
    SpendFile(store.root, "study", "run").write(Usage(usd=1.0))
    answered(store.root, tmp_path / "wal", "a")

    def stale(path):
        if str(path).rstrip("/").endswith(("/study", f"/{BLOCK.block}")):
            raise OSError(errno.ESTALE, "Stale file handle")
        return listing(path)

    monkeypatch.setattr("os.scandir", stale)
    with pytest.raises(StoreError, match="Stale file handle"):
        SpendFile(store.root, "study", "next").read_others()
    with pytest.raises(StoreError, match="Stale file handle"):
        compact(block_folder(store.root, BLOCK), everything)


@pytest.fixture
def scratch(tmp_path, monkeypatch) -> Path:
    """What TMPDIR names."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_copy_that_a_killed_process_left_goes_a_day_later(scratch: Path) -> None:
    source = UPath("memory://failures/copied")
    source.write_bytes(b"content")
    with here(source) as left:
        pass
    for days in (0.5, 1.5):
        left.write_bytes(b"left")
        os.utime(left, times=(time.time() - days * DAY_S,) * 2)
        with here(source) as copy:
            assert copy.read_bytes() == b"content"
            assert left.exists() == (days < 1)
    assert list(scratch.iterdir()) == []


def test_a_full_temporary_folder_is_not_told_as_the_store_s(scratch: Path, monkeypatch) -> None:
    store = Store("memory://failures/full")
    source = store.root / "file"
    source.write_bytes(b"content")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for attribute, use in {
        "fsspec.implementations.memory.MemoryFileSystem.get_file": lambda: here(source).__enter__(),
        "os.fsync": lambda: store.put_frames(ACTIVATIONS, [rows()]),
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(attribute, full)
            with pytest.raises(StoreError, match="set TMPDIR to a folder with room") as caught:
                use()
        assert str(caught.value).startswith(str(scratch))
    assert list(scratch.iterdir()) == []


def test_a_cell_whose_manifest_cannot_be_read_now_is_not_made_again(monkeypatch) -> None:
    store = Store("memory://failures/finding")
    manifest = made(store)
    with monkeypatch.context() as broken:
        broken.setattr(MemoryFileSystem, "cat_file", refuse)
        with pytest.raises(StoreError, match="Forbidden"):
            store.find("activation_cache", FINGERPRINT)
    assert store.find("activation_cache", FINGERPRINT) == manifest
    (store.root / str(manifest.path)).write_bytes(b"damaged")
    assert store.find("activation_cache", FINGERPRINT) is None


def test_the_name_of_a_table_written_in_frames_is_on_disk_before_anybody_names_it(
    tmp_path, monkeypatch
) -> None:
    store, sync, synced = Store(tmp_path), os.fsync, set[int]()

    def noting(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    monkeypatch.setattr("os.fsync", noting)
    blob = store.put_frames(ACTIVATIONS, [rows()]).blob
    assert (tmp_path / blob.path).parent.stat().st_ino in synced


def test_one_of_many_files_that_may_not_be_read_is_said_with_what_to_do(s3: ObjectStore) -> None:
    store = Store(s3.new_root())
    made(store)
    (head,) = list_files(store.root, "heads")
    blocked = {"Action": "s3:GetObject", "Resource": [f"arn:aws:s3:::{store.root.path}/{head}"]}
    with s3.denied(BUCKET, blocked), pytest.raises(StoreError, match="access denied"):
        list(read_files(store.root, [head]))
