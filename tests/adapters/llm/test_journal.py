import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from llm_requests import BLOCK, ask
from upath import UPath

from autointerp_dagster.adapters.llm.backend import Reply
from autointerp_dagster.adapters.llm.journal import journal as journal_module
from autointerp_dagster.adapters.llm.journal import sealing as sealing_module
from autointerp_dagster.adapters.llm.journal.journal import Entry, Journal
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.llm import JournalBlock, Token, Usage

REPLY = Reply(
    text="[1, 0]",
    finish_reason="stop",
    tokens=(Token("1", -0.1, (("1", -0.1), ("0", -2.3))), Token("0", -0.2)),
    usage=Usage(30, 20, 5, 0.001),
)
OTHER_BLOCK = JournalBlock("score_fuzzing", "c0ffee", 3)


def entry(name: str, reply: Reply = REPLY) -> Entry:
    return Entry.of(name, "model", ask(f"question {name}"), reply)


def segments(root: Path) -> list[Path]:
    return sorted((root / "journal").rglob("*.parquet"))


def logs(root: Path) -> list[Path]:
    return sorted((root / "journal-wal").glob("*.jsonl"))


def record_and_die(root: Path, names: str, end: str) -> None:
    """Record calls in another process, which ends without sealing."""
    program = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_journal import *
journal = Journal(UPath({str(root)!r}))
for done in [journal.record(BLOCK, entry(name)) for name in {names!r}]:
    done.result()
{end}
"""
    subprocess.run([sys.executable, "-c", program], check=False, timeout=60)


def test_a_recorded_call_is_found_before_and_after_sealing_and_by_the_next_run(tmp_path):
    root = UPath(tmp_path)
    with Journal(root) as journal:
        journal.record(BLOCK, entry("a")).result()
        assert journal.lookup(BLOCK, "a") == REPLY
        journal.flush()
        assert journal.lookup(BLOCK, "a") == REPLY
    with Journal(root) as journal:
        assert journal.lookup(BLOCK, "a") == REPLY
        assert journal.lookup(BLOCK, "b") is None


def test_a_reply_without_text_or_tokens_comes_back_as_null(tmp_path):
    refused = Reply(text=None, finish_reason="content_filter")
    with Journal(UPath(tmp_path)) as journal:
        journal.record(BLOCK, entry("a", refused)).result()
    assert Journal(UPath(tmp_path)).lookup(BLOCK, "a") == refused


def test_find_gives_prompt_parameters_and_answer_with_and_without_the_block(tmp_path):
    recorded = entry("a")
    with Journal(UPath(tmp_path)) as journal:
        journal.record(BLOCK, recorded).result()
        assert journal.find("a") == recorded
        journal.flush()
        journal.record(OTHER_BLOCK, entry("b")).result()
        assert journal.find("a") == journal.find("a", BLOCK) == recorded
        assert journal.find("a", OTHER_BLOCK) is None
    assert '"max_tokens": 64' in recorded.parameters
    assert recorded.messages[-1].content == "question a"


def test_a_block_reads_only_its_own_segments(tmp_path):
    with Journal(UPath(tmp_path)) as journal:
        journal.record(BLOCK, entry("a")).result()
        journal.record(OTHER_BLOCK, entry("b")).result()
    folders = [str(path.parent.relative_to(tmp_path)) for path in segments(tmp_path)]
    assert folders == ["journal/score_detection/c0ffee/0", "journal/score_fuzzing/c0ffee/3"]
    (tmp_path / folders[1] / segments(tmp_path)[1].name).write_bytes(b"broken")
    journal = Journal(UPath(tmp_path))
    assert journal.lookup(BLOCK, "a") == REPLY
    assert journal.lookup(BLOCK, "b") is None
    with pytest.raises(StoreError, match="not a readable journal segment"):
        journal.lookup(OTHER_BLOCK, "b")


@pytest.mark.parametrize("end", ["os._exit(1)", "os.kill(os.getpid(), 9)"])
def test_a_kill_between_record_and_seal_loses_nothing(tmp_path, end):
    record_and_die(tmp_path, "ab", end)
    assert len(logs(tmp_path)) == 1
    assert segments(tmp_path) == []
    journal = Journal(UPath(tmp_path))
    assert journal.lookup(BLOCK, "a") == journal.lookup(BLOCK, "b") == REPLY
    assert logs(tmp_path) == []
    assert len(segments(tmp_path)) == 1


def test_a_torn_last_line_is_ignored_and_the_rest_is_kept(tmp_path):
    record_and_die(tmp_path, "ab", "os._exit(1)")
    (log,) = logs(tmp_path)
    log.write_bytes(log.read_bytes()[:-7])
    journal = Journal(UPath(tmp_path))
    assert journal.lookup(BLOCK, "a") == REPLY
    assert journal.lookup(BLOCK, "b") is None


def test_a_kill_between_segment_and_log_leaves_one_segment_when_sealed_again(tmp_path):
    record_and_die(tmp_path, "ab", "os._exit(1)")
    (log,) = logs(tmp_path)
    kept = log.read_bytes()
    Journal(UPath(tmp_path)).load(BLOCK)
    log.write_bytes(kept)
    before = segments(tmp_path)
    assert Journal(UPath(tmp_path)).lookup(BLOCK, "a") == REPLY
    assert segments(tmp_path) == before
    assert logs(tmp_path) == []


def test_the_log_of_a_process_that_lives_is_left_alone(tmp_path):
    writer = Journal(UPath(tmp_path))
    writer.record(BLOCK, entry("a")).result()
    (log,) = logs(tmp_path)
    assert Journal(UPath(tmp_path)).lookup(BLOCK, "a") is None
    assert logs(tmp_path) == [log]
    writer.close()
    assert Journal(UPath(tmp_path)).lookup(BLOCK, "a") == REPLY


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    threads = [
        threading.Thread(target=record_and_die, args=(tmp_path, names, end))
        for names, end in [("abc", "journal.close()"), ("cde", "os._exit(1)"), ("f", "")]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal = Journal(UPath(tmp_path))
    assert all(journal.lookup(BLOCK, name) == REPLY for name in "abcdef")


def test_the_earliest_of_two_answers_counts_whatever_the_segments_are_called(tmp_path):
    first, second = entry("a"), entry("a", Reply("[0, 0]", "stop"))
    for day, answer in (("2026-01-02", second), ("2026-01-01", first)):
        with Journal(UPath(tmp_path)) as journal:
            journal.record(BLOCK, replace(answer, time=day)).result()
    assert len(segments(tmp_path)) == 2
    assert Journal(UPath(tmp_path)).lookup(BLOCK, "a") == REPLY
    found = Journal(UPath(tmp_path)).find("a")
    assert found is not None
    assert found.reply == REPLY


def test_calls_that_come_together_share_an_fsync(tmp_path, monkeypatch):
    syncs = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (syncs.append(1), real(descriptor))[1])
    journal = Journal(UPath(tmp_path))
    for done in [journal.record(BLOCK, entry(str(i))) for i in range(300)]:
        done.result()
    assert len(syncs) < 30
    journal.close()


def test_a_long_log_is_sealed_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "SEAL_AFTER", 10)
    journal = Journal(UPath(tmp_path))
    for i in range(25):
        journal.record(BLOCK, entry(f"{i:02d}")).result()
    journal.close()
    assert len(segments(tmp_path)) >= 2
    assert sum(pq.read_table(path).num_rows for path in segments(tmp_path)) == 25


def test_a_remote_store_keeps_its_log_in_a_local_folder(tmp_path):
    root = UPath("memory://journal-test/store")
    with pytest.raises(StoreError, match="wal_dir"):
        Journal(root)
    with Journal(root, wal_dir=tmp_path) as journal:
        journal.record(BLOCK, entry("a")).result()
        assert len(list(tmp_path.rglob("*.jsonl"))) == 1
    assert list(tmp_path.rglob("*.jsonl")) == []
    reader = Journal(root, wal_dir=tmp_path)
    assert reader.lookup(BLOCK, "a") == REPLY
    assert reader.find("a") is not None


def test_a_remote_store_gets_its_segments_without_a_flush(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "SEAL_EVERY_S", 0.05)
    root = UPath("memory://journal-test/timed")
    writer = Journal(root, wal_dir=tmp_path)
    writer.record(BLOCK, entry("a")).result()
    while not list((root / "journal").rglob("*.parquet")):
        time.sleep(0.01)
    assert Journal(root, wal_dir=tmp_path).lookup(BLOCK, "a") == REPLY
    writer.close()


def test_two_stores_that_share_a_log_folder_do_not_mix(tmp_path):
    one, two = UPath("memory://journal-test/one"), UPath("memory://journal-test/two")
    writer = Journal(one, wal_dir=tmp_path)
    writer.record(BLOCK, entry("a")).result()
    (log,) = tmp_path.rglob("*.jsonl")
    content = log.read_bytes()
    writer.close()
    one.fs.rm(one.path, recursive=True)
    log.write_bytes(content)  # as if the writer had died before sealing
    assert Journal(two, wal_dir=tmp_path).lookup(BLOCK, "a") is None
    assert Journal(one, wal_dir=tmp_path).lookup(BLOCK, "a") == REPLY


def test_a_folder_that_cannot_be_written_is_an_error_not_a_hang(tmp_path):
    (tmp_path / "journal-wal").write_text("a file in the way")
    with pytest.raises(StoreError, match="cannot be written"):
        Journal(UPath(tmp_path)).record(BLOCK, entry("a")).result(timeout=10)


def test_a_log_that_failed_once_keeps_what_came_before_and_after(tmp_path, monkeypatch):
    journal = Journal(UPath(tmp_path))
    journal.record(BLOCK, entry("before")).result()
    write = os.write
    with monkeypatch.context() as broken:
        broken.setattr(
            os, "write", lambda file, content: _half_then_full_disk(write, file, content)
        )
        with pytest.raises(StoreError, match="cannot be written"):
            journal.record(BLOCK, entry("lost")).result()
    journal.record(BLOCK, entry("after")).result()
    (log,) = logs(tmp_path)
    content = log.read_bytes()
    other = tmp_path / "other"
    (other / "journal-wal").mkdir(parents=True)
    (other / "journal-wal" / log.name).write_bytes(content)
    survivor = Journal(UPath(other))
    assert survivor.lookup(BLOCK, "before") == survivor.lookup(BLOCK, "after") == REPLY
    assert survivor.lookup(BLOCK, "lost") is None
    journal.close()


def _half_then_full_disk(write, file, content):
    write(file, content[: len(content) // 2])
    raise OSError(28, "No space left on device")


def test_calls_are_acknowledged_while_a_segment_is_being_written(tmp_path, monkeypatch):
    is_sealing, may_go_on = threading.Event(), threading.Event()
    real = sealing_module.write_segment

    def slow(*arguments):
        is_sealing.set()
        may_go_on.wait(timeout=30)
        return real(*arguments)

    monkeypatch.setattr(sealing_module, "write_segment", slow)
    journal = Journal(UPath(tmp_path))
    journal.record(BLOCK, entry("a")).result()
    sealing = threading.Thread(target=journal.flush)
    sealing.start()
    assert is_sealing.wait(timeout=30)
    journal.record(BLOCK, entry("b")).result(timeout=30)
    assert journal.lookup(BLOCK, "a") == journal.lookup(BLOCK, "b") == REPLY
    assert journal.find("a") is not None
    assert len(logs(tmp_path)) == 2
    may_go_on.set()
    sealing.join()
    assert journal.lookup(BLOCK, "a") == journal.lookup(BLOCK, "b") == REPLY
    assert len(logs(tmp_path)) == 1
    journal.close()
    assert logs(tmp_path) == []


def test_a_seal_that_failed_keeps_the_calls_and_is_made_up_for(tmp_path):
    journal = Journal(UPath(tmp_path))
    journal.load(BLOCK)
    journal.record(BLOCK, entry("a")).result()
    (tmp_path / "journal").write_text("a file in the way")
    with pytest.raises(StoreError, match="cannot be written"):
        journal.flush()
    assert journal.lookup(BLOCK, "a") == REPLY
    (tmp_path / "journal").unlink()
    journal.record(BLOCK, entry("b")).result()
    journal.close()
    assert logs(tmp_path) == []
    reader = Journal(UPath(tmp_path))
    assert reader.lookup(BLOCK, "a") == reader.lookup(BLOCK, "b") == REPLY


def test_many_threads_may_record_and_look_up_while_it_seals(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "SEAL_AFTER", 20)
    journal = Journal(UPath(tmp_path))
    missing: list[str] = []

    def work(name: str) -> None:
        for i in range(60):
            journal.record(BLOCK, entry(f"{name}{i}")).result()
            missing.extend(f"{name}{k}" for k in (0, i) if not journal.lookup(BLOCK, f"{name}{k}"))

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    assert missing == []
    reader = Journal(UPath(tmp_path))
    assert all(reader.lookup(BLOCK, f"{name}{i}") == REPLY for name in "abc" for i in range(60))


def test_blocks_beyond_the_memory_limit_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "BLOCKS_BYTES", 1)
    with Journal(UPath(tmp_path)) as journal:
        for block in (BLOCK, OTHER_BLOCK):
            journal.record(block, entry("a")).result()
        journal.flush()
        for _ in range(2):
            assert journal.lookup(BLOCK, "a") == journal.lookup(OTHER_BLOCK, "a") == REPLY
