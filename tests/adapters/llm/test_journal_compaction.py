import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from llm_requests import BLOCK, ask
from upath import UPath

from autointerp_dagster.adapters.llm.backend import Reply
from autointerp_dagster.adapters.llm.journal import compaction
from autointerp_dagster.adapters.llm.journal import journal as journal_module
from autointerp_dagster.adapters.llm.journal.compaction import SizedSegment, due, everything
from autointerp_dagster.adapters.llm.journal.journal import Entry, Journal
from autointerp_dagster.adapters.llm.journal.segments import read_each, read_replies
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.llm import JournalBlock

OTHER_BLOCK = JournalBlock("score_fuzzing", "c0ffee", 3)


def entry(name: str, answer: str = "[1, 0]") -> Entry:
    return Entry.of(name, "model", ask(f"question {name}", n_shared=1), Reply(answer, "stop"))


def segments(root: Path) -> list[Path]:
    return sorted((root / "journal").rglob("*.parquet"))


def seal(root: Path, *entries: Entry, block: JournalBlock = BLOCK) -> None:
    with Journal(UPath(root)) as journal:
        for recorded in entries:
            journal.record(block, recorded).result()


def all_answers(root: Path, names: str) -> list[str | None]:
    journal = Journal(UPath(root))
    replies = [journal.lookup(BLOCK, name) for name in names]
    return [None if reply is None else reply.text for reply in replies]


def python(program: str) -> subprocess.Popen:
    """A process that runs ``program`` with this module's names."""
    header = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    header += "from test_journal_compaction import *\n"
    return subprocess.Popen([sys.executable, "-c", header + program])


def test_many_segments_of_each_block_become_one_with_the_same_calls(tmp_path):
    names = "abcdef"
    for name in names:
        seal(tmp_path, entry(name, f"{name}!"))
        seal(tmp_path, entry(name, "other"), block=OTHER_BLOCK)
    before = [Journal(UPath(tmp_path)).find(name, BLOCK) for name in names]
    with Journal(UPath(tmp_path)) as journal:
        journal.compact()
    assert len(segments(tmp_path)) == 2
    assert all_answers(tmp_path, names) == [f"{name}!" for name in names]
    assert [Journal(UPath(tmp_path)).find(name, BLOCK) for name in names] == before


def test_the_earliest_answer_keeps_winning_and_is_the_only_one_left(tmp_path):
    dated = [("2026-01-02", "late"), ("2026-01-01", "early"), ("2026-01-03", "latest")]
    for day, answer in dated:
        seal(tmp_path, replace(entry("a", answer), time=day), entry(f"only {answer}"))
    assert all_answers(tmp_path, "a") == ["early"]
    Journal(UPath(tmp_path)).compact()
    assert all_answers(tmp_path, "a") == ["early"]
    (segment,) = segments(tmp_path)
    assert sum(batch.num_rows for batch in read_replies(UPath(segment))) == 4
    seal(tmp_path, replace(entry("a", "later still"), time="2026-01-04"))
    assert all_answers(tmp_path, "a") == ["early"]


def test_answers_of_the_same_instant_have_the_same_winner_before_and_after(tmp_path):
    for answer in ("x", "y", "z"):
        seal(tmp_path, replace(entry("a", answer), time="2026-01-01"))
    before = all_answers(tmp_path, "a")
    Journal(UPath(tmp_path)).compact()
    assert all_answers(tmp_path, "a") == before


def test_a_block_in_use_is_merged_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "SEAL_AFTER", 1)
    journal = Journal(UPath(tmp_path))
    names = [f"call {i}" for i in range(3 * compaction.MERGE_FROM)]
    for name in names:
        journal.record(BLOCK, entry(name)).result()
        journal.flush()
    assert len(segments(tmp_path)) < 2 * compaction.MERGE_FROM
    assert all(journal.lookup(BLOCK, name) for name in names)
    journal.close()
    reader = Journal(UPath(tmp_path))
    assert all(reader.lookup(BLOCK, name) for name in names)


def test_the_rule_merges_sizes_alike_and_nothing_too_large():
    small = [SizedSegment(UPath(f"/s{i}"), 3000) for i in range(16)]
    large = [SizedSegment(UPath(f"/l{i}"), 2**26) for i in range(9)]
    assert due([*small[:15], *large]) == []
    assert due([*small, *large]) == [small]
    assert everything(large) == [large[:4], large[4:8]]
    assert everything(small[:1]) == []


def test_a_damaged_segment_stops_compaction_and_nothing_is_deleted(tmp_path):
    for name in "abc":
        seal(tmp_path, entry(name))
    damaged = segments(tmp_path)[1]
    damaged.write_bytes(damaged.read_bytes()[:-20])
    before = segments(tmp_path)
    with pytest.raises(StoreError, match="not a readable journal segment"):
        Journal(UPath(tmp_path)).compact()
    assert segments(tmp_path) == before


def test_a_flipped_bit_in_an_answer_is_noticed(tmp_path):
    seal(tmp_path, *(entry(f"call {i}", f"answer {i}") for i in range(50)))
    (segment,) = segments(tmp_path)
    content = bytearray(segment.read_bytes())
    content[200] ^= 1
    segment.write_bytes(content)
    with pytest.raises(StoreError, match="not a readable journal segment"):
        Journal(UPath(tmp_path)).lookup(BLOCK, "call 0")


def test_a_reader_whose_listing_has_aged_lists_again(tmp_path):
    for name in "abc":
        seal(tmp_path, entry(name))
    is_first = True

    def read(path: UPath) -> list[str]:
        nonlocal is_first
        if is_first:
            Journal(UPath(tmp_path)).compact()  # everything that was listed is gone now
            is_first = False
        return [name for batch in read_replies(path) for name in batch["call_id"].to_pylist()]

    found = read_each(UPath(tmp_path / "journal"), read)
    assert [sorted(names) for names in found] == [["a", "b", "c"]]


def test_a_remote_store_is_compacted_too(tmp_path):
    root = UPath("memory://journal-compaction/store")
    for name in "abc":
        with Journal(root, wal_dir=tmp_path) as journal:
            journal.record(BLOCK, entry(name)).result()
    journal = Journal(root, wal_dir=tmp_path)
    journal.compact()
    assert len(list((root / "journal").rglob("*.parquet"))) == 1
    assert all(journal.lookup(BLOCK, name) for name in "abc")


def test_compactors_writers_and_readers_at_once_lose_nothing(tmp_path):
    writer = """
for i in range(25):
    seal(Path({root!r}), entry({name!r} + str(i)))
"""
    compactor = """
for i in range(25):
    Journal(UPath({root!r})).compact()
"""
    root = str(tmp_path)
    processes = [python(writer.format(root=root, name=name)) for name in "ab"]
    processes += [python(compactor.format(root=root)) for _ in range(2)]
    while any(process.poll() is None for process in processes):
        Journal(UPath(tmp_path)).load(BLOCK)
        time.sleep(0.05)
    assert [process.returncode for process in processes] == [0, 0, 0, 0]
    names = [f"{name}{i}" for name in "ab" for i in range(25)]
    journal = Journal(UPath(tmp_path))
    assert all(journal.lookup(BLOCK, name) for name in names)
    journal.compact()
    assert all(Journal(UPath(tmp_path)).lookup(BLOCK, name) for name in names)


def test_kills_during_compaction_change_no_answer(tmp_path):
    names = [f"call {i}" for i in range(24)]
    for i in range(0, 24, 2):
        seal(tmp_path, entry(names[i], names[i]), entry(names[i + 1], names[i + 1]))
    lots = random.Random(0)
    for _ in range(6):
        ready = tmp_path / "ready"
        process = python(
            f"""
Path({str(ready)!r}).touch()
for i in range(1000):
    Journal(UPath({str(tmp_path)!r})).compact()
    seal(Path({str(tmp_path)!r}), entry("extra" + str(i)))
"""
        )
        while not ready.exists():
            time.sleep(0.01)
        time.sleep(lots.uniform(0.0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        ready.unlink()
        journal = Journal(UPath(tmp_path))
        replies = [journal.lookup(BLOCK, name) for name in names]
        assert [reply.text for reply in replies if reply is not None] == names
