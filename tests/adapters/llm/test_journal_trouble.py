"""Stores that fail, logs that hold odd values, and less memory than a cell needs."""

import json
import logging
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from llm_requests import BLOCK, ask
from upath import UPath

from autointerp_dagster.adapters.durable import write_durably
from autointerp_dagster.adapters.llm.backend import Reply
from autointerp_dagster.adapters.llm.journal import journal as journal_module
from autointerp_dagster.adapters.llm.journal.journal import Entry, Journal
from autointerp_dagster.adapters.llm.journal.replies import BlockReplies
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.llm import JournalBlock, Token, Usage

BLOCKS = [JournalBlock("score_detection", "c0ffee", block) for block in range(4)]
TOKENS = (Token("1", -0.1, (("1", -0.1), ("0", -2.3))), Token("☃", -0.2))


class ForeignError(Exception):
    """As botocore's and gcsfs's: no OSError."""


def entry(name: str, reply: Reply | None = None) -> Entry:
    reply = reply or Reply(f"[{name}]", "stop", TOKENS, Usage(30, 20, 5, 0.001))
    return Entry.of(name, "model", ask(f"question {name}"), reply)


def logs(root: Path, ending: str = "jsonl") -> list[Path]:
    return sorted((root / "journal-wal").glob(f"*.{ending}"))


def fail(monkeypatch, method: str, n_times: int) -> None:
    """Have the store in memory fail the next few times, as remote stores do."""
    real, left = getattr(MemoryFileSystem, method), [n_times]

    def flaky(self, *args, **kwargs):
        left[0] -= 1
        if left[0] >= 0:
            raise ForeignError("Could not connect to the endpoint. secret-key")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, method, flaky)


def test_an_error_of_the_remote_library_is_an_os_error(monkeypatch):
    fail(monkeypatch, "pipe_file", 1)
    with pytest.raises(OSError, match="ForeignError") as caught:
        write_durably(UPath("memory://journal-trouble/file"), b"content")
    assert "secret" not in str(caught.value)
    write_durably(UPath("memory://journal-trouble/file"), b"content")


def test_sealing_goes_on_after_a_remote_store_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "SEAL_EVERY_S", 0.05)
    fail(monkeypatch, "pipe_file", 2)
    root = UPath("memory://journal-trouble/sealing")
    with Journal(root, wal_dir=tmp_path) as journal:
        journal.record(BLOCK, entry("a")).result()
        deadline = time.monotonic() + 20
        while not list((root / "journal").rglob("*.parquet")):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_bug_while_sealing_is_reported_and_sealing_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(journal_module, "SEAL_EVERY_S", 0.05)
    monkeypatch.setattr(journal_module, "SEAL_AFTER", 1)
    real, left = Journal._publish, [1]

    def buggy(self, *args):
        left[0] -= 1
        if left[0] >= 0:
            raise ZeroDivisionError("a bug")
        return real(self, *args)

    monkeypatch.setattr(Journal, "_publish", buggy)
    journal = Journal(UPath(tmp_path))
    journal.record(BLOCK, entry("a")).result()
    deadline = time.monotonic() + 20
    while logs(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    journal.close()
    assert "ZeroDivisionError" in caplog.text
    assert Journal(UPath(tmp_path)).lookup(BLOCK, "a") is not None


@pytest.mark.parametrize("method", ["_open", "find"])
def test_a_remote_store_that_cannot_be_read_is_a_store_error(tmp_path, monkeypatch, method):
    root = UPath("memory://journal-trouble/reading")
    with Journal(root, wal_dir=tmp_path) as journal:
        journal.record(BLOCK, entry("a")).result()
    with monkeypatch.context() as broken:
        fail(broken, method, 100)
        with pytest.raises(StoreError, match="ForeignError") as caught:
            Journal(root, wal_dir=tmp_path).lookup(BLOCK, "a")
    assert "Delete" not in str(caught.value)
    assert Journal(root, wal_dir=tmp_path).lookup(BLOCK, "a") is not None


def test_a_remote_store_that_cannot_be_listed_does_not_end_compaction_in_a_foreign_error(
    tmp_path, monkeypatch
):
    root = UPath("memory://journal-trouble/compaction")
    with Journal(root, wal_dir=tmp_path) as journal:
        journal.record(BLOCK, entry("a")).result()
        fail(monkeypatch, "find", 1)
        journal.flush()  # sealing merges what is due, which can wait
        fail(monkeypatch, "find", 1)
        with pytest.raises(StoreError, match="ForeignError"):
            journal.compact()
        journal.compact()


def test_a_template_that_a_remote_store_cannot_read_is_a_store_error(tmp_path, monkeypatch):
    root = UPath("memory://journal-trouble/template")
    recorded = replace(entry("a"), n_shared=1)
    with Journal(root, wal_dir=tmp_path) as journal:
        journal.record(BLOCK, recorded).result()
    real = MemoryFileSystem.cat_file

    def flaky(self, path, *args, **kwargs):
        if "templates" in path:
            raise ForeignError("secret-key")
        return real(self, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", flaky)
    with pytest.raises(StoreError, match="ForeignError"):
        Journal(root, wal_dir=tmp_path).find("a", BLOCK)


def test_calls_of_a_close_that_failed_are_found_by_the_next_journal_and_by_the_same(tmp_path):
    journal = Journal(UPath(tmp_path))
    journal.load(BLOCK)
    journal.record(BLOCK, entry("a")).result()
    (tmp_path / "journal").write_text("a file in the way")
    with pytest.raises(StoreError, match=r"cannot be written: .* Free space"):
        journal.close()
    assert len(logs(tmp_path)) == 1
    (tmp_path / "journal").unlink()
    other = Journal(UPath(tmp_path))
    assert other.lookup(BLOCK, "a") == journal.lookup(BLOCK, "a") == entry("a").reply
    assert logs(tmp_path) == []


def test_one_call_that_cannot_be_sealed_does_not_hold_up_the_others(tmp_path, caplog):
    odd = [
        replace(entry("odd").reply, finish_reason=7),
        replace(entry("odd").reply, usage=Usage(10**30)),
    ]
    for number, reply in enumerate(odd):
        root = tmp_path / str(number)
        with Journal(UPath(root)) as journal:
            for recorded in (entry("a"), entry("odd", reply), entry("b")):
                journal.record(BLOCK, recorded).result()
        assert "set aside" in caplog.text
        (aside,) = logs(root, "odd")
        assert aside.read_bytes().count(b"\n") == 3
        reader = Journal(UPath(root))
        assert reader.lookup(BLOCK, "a") == entry("a").reply
        assert reader.lookup(BLOCK, "b") == entry("b").reply
        assert reader.lookup(BLOCK, "odd") is None
        assert logs(root) == []


def test_a_log_of_nothing_but_a_call_that_cannot_be_sealed_is_set_aside(tmp_path):
    with Journal(UPath(tmp_path)) as journal:
        journal.record(BLOCK, entry("odd", Reply("", 7))).result()  # pyright: ignore[reportArgumentType] # a backend's fault
    assert len(logs(tmp_path, "odd")) == 1
    assert not (tmp_path / "journal").exists()
    assert Journal(UPath(tmp_path)).lookup(BLOCK, "odd") is None


def test_a_log_with_a_call_that_cannot_be_sealed_is_set_aside_when_its_process_is_gone(
    tmp_path, caplog
):
    program = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_journal_trouble import *
journal = Journal(UPath({str(tmp_path)!r}))
for name in "ab":
    journal.record(BLOCK, entry(name)).result()
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    (log,) = logs(tmp_path)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[0]["reply"][1] = 7
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    journal = Journal(UPath(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert journal.lookup(BLOCK, "b") == entry("b").reply
    assert journal.lookup(BLOCK, "a") is None
    assert logs(tmp_path) == []
    assert len(logs(tmp_path, "odd")) == 1
    assert "set aside" in caplog.text


def count_reads(monkeypatch) -> list[str]:
    reads: list[str] = []
    real = BlockReplies.read.__func__
    monkeypatch.setattr(
        BlockReplies,
        "read",
        classmethod(lambda cls, folder: (reads.append(str(folder)), real(cls, folder))[1]),
    )
    return reads


def test_a_cell_of_several_blocks_reads_each_once_whatever_the_memory(tmp_path, monkeypatch):
    names = [f"{i:03d}" for i in range(200)]
    with Journal(UPath(tmp_path)) as journal:
        for done in [journal.record(BLOCKS[i % 4], entry(name)) for i, name in enumerate(names)]:
            done.result()
    monkeypatch.setattr(journal_module, "BLOCKS_BYTES", 80_000)
    reads = count_reads(monkeypatch)
    journal = Journal(UPath(tmp_path))
    for i, name in enumerate(names):  # the blocks by turns
        assert journal.lookup(BLOCKS[i % 4], name) == entry(name).reply
    assert len(reads) == 4
    assert journal.n_bytes <= 80_000
    for _ in range(2):
        assert [journal.lookup(BLOCKS[i % 4], n) for i, n in enumerate(names)] == [
            entry(name).reply for name in names
        ]
    assert len(reads) == 4


def test_what_is_sealed_while_it_runs_stays_within_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "SEAL_AFTER", 50)
    monkeypatch.setattr(journal_module, "BLOCKS_BYTES", 20_000)
    journal = Journal(UPath(tmp_path))
    for block in BLOCKS:
        journal.load(block)
    for i in range(400):
        journal.record(BLOCKS[i // 100], entry(f"{i:03d}")).result()
    journal.flush()
    assert journal.n_bytes <= 20_000 or len(journal._blocks) == 1
    assert all(journal.lookup(BLOCKS[i // 100], f"{i:03d}") for i in range(400))
    journal.close()


def test_replies_that_were_moved_to_disk_are_the_same_and_leave_no_file(tmp_path, monkeypatch):
    replies = [
        Reply(None, "content_filter"),
        Reply("", "stop", ()),
        Reply("é", "length", TOKENS, Usage(1, 2, 3, 0.5, 4)),
        Reply("", "stop", (Token("x", -1.0),)),
    ]
    for kept in (replies, replies[:1]):  # the latter has no tokens at all
        root = tmp_path / str(len(kept))
        with Journal(UPath(root)) as journal:
            for i, reply in enumerate(kept):
                journal.record(BLOCK, entry(str(i), reply)).result()
        with monkeypatch.context() as small:
            small.setattr(journal_module, "BLOCKS_BYTES", 1)
            journal = Journal(UPath(root))
            assert [journal.lookup(BLOCK, str(i)) for i in range(len(kept))] == kept
        assert list((root / "journal-wal").iterdir()) == []


def test_without_room_on_disk_blocks_are_read_again(tmp_path, monkeypatch, caplog):
    logs_folder = tmp_path / "logs"
    with Journal(UPath(tmp_path), wal_dir=logs_folder) as journal:
        for block in BLOCKS:
            journal.record(block, entry("a")).result()
    monkeypatch.setattr(journal_module, "BLOCKS_BYTES", 1)
    logs_folder.rename(tmp_path / "elsewhere")
    logs_folder.write_text("a file in the way")
    journal = Journal(UPath(tmp_path), wal_dir=logs_folder)
    for _ in range(2):
        for block in BLOCKS:
            assert journal.lookup(block, "a") == entry("a").reply
    assert "will be read again" in caplog.text
