"""The journal at scale: what recording costs, and how fast a cell finds its calls among 10^7.

One block of 4,096 latents with 25 calls each (20 for 50 + 50 windows at five a prompt with ten
candidates per label, and every fourth latent's floor) is recorded; 99 more blocks are hard links to
its segments, for the claim is that they are not read. Then a fresh journal looks up every call of
the cell and decodes every reply. That is done again after the other blocks were overwritten with
rubbish, and compared with what was written. And a cell of two blocks is looked up by turns with
memory for their indices alone.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from upath import UPath

from autointerp_dagster.adapters.llm import Entry, Journal, Reply
from autointerp_dagster.adapters.llm.journal import journal as journal_module
from autointerp_dagster.adapters.llm.journal.entries import to_line
from autointerp_dagster.core.llm import JournalBlock, LabelList, Request, Token, Usage
from autointerp_dagster.core.prompts.detection import detection_prompt
from benchmarks.measure import Result, cpu_seconds

BLOCK = JournalBlock("score_detection", "c0ffee", 0)
N_LATENTS, CALLS_PER_LATENT = 4096, 25
N_BLOCKS = 100
WINDOWS, WINDOW_WORDS, N_CANDIDATES = 5, 24, 10
LATENTS_AT_ONCE = 128
IN_FLIGHT = 64
INDEX_BYTES = 80 * 2**20
"""Enough for the indices of two blocks, and not for any of their columns."""
IDENTITY = "http://127.0.0.1:8000/v1|judge"

_LABELS = ["0", "1", " 0", " 1", "2", "[", "]", ",", "yes", "no"]


def run() -> list[Result]:
    """CPU seconds of this process, with reading, decompressing and decoding; sizes; counts."""
    folder = Path(tempfile.mkdtemp(prefix="journal-benchmark-"))
    try:
        return [*_lookup(folder / "lookup"), *_recording(folder)]
    finally:
        shutil.rmtree(folder)


def _lookup(root: Path) -> list[Result]:
    written = _cell(root)
    own = root / "journal" / BLOCK.stage / BLOCK.coder_hash / str(BLOCK.block)
    others = [own.parent / str(block) for block in range(1, N_BLOCKS)]
    for other in others:
        shutil.copytree(own, other, copy_function=os.link)
    _forget_pages(own)
    with _files_opened() as opened:
        _, lookup_s = cpu_seconds(lambda: _look_up(root, list(written)))
    segments = _segments(opened)
    assert segments
    moved = _with_little_memory(root, list(written))
    foreign = [path for path in segments if not path.startswith(f"{own}/")]
    for segment in (path for other in others for path in other.iterdir()):
        segment.unlink()
        segment.write_bytes(b"rubbish")
    journal = Journal(UPath(root))
    assert all(hash(journal.lookup(BLOCK, name)) == reply for name, reply in written.items())
    n_calls = len(written) * N_BLOCKS
    return [
        Result(f"finding a cell's calls among {n_calls}", lookup_s, 2.0, "CPU s", is_cost=True),
        Result("other blocks' segments opened for it", len(foreign), 0, "files", is_cost=True),
        *moved,
    ]


def _with_little_memory(root: Path, call_ids: list[str]) -> list[Result]:
    """The same calls in two blocks by turns, with and without memory for all of them."""
    calls = [(replace(BLOCK, block=block), name) for name in call_ids[::5] for block in (0, 1)]
    n_read, seconds = _by_turns(root, calls)
    limit = journal_module.BLOCKS_BYTES
    journal_module.BLOCKS_BYTES = INDEX_BYTES
    try:
        n_read_moved, seconds_moved = _by_turns(root, calls)
    finally:
        journal_module.BLOCKS_BYTES = limit
    again, ratio = n_read_moved - n_read, seconds_moved / seconds
    return [
        Result("segments read again for want of memory", again, 0, "files", is_cost=True),
        Result("a lookup whose columns are on disk", ratio, 2.0, "x CPU", is_cost=True),
    ]


def _by_turns(root: Path, calls: list[tuple[JournalBlock, str]]) -> tuple[int, float]:
    """Segments opened, and CPU seconds of the lookups once their blocks are loaded."""
    journal = Journal(UPath(root))
    with _files_opened() as opened:
        for block in dict.fromkeys(block for block, _ in calls):
            journal.load(block)
        _, seconds = cpu_seconds(lambda: [journal.lookup(*call) for call in calls])
    return len(_segments(opened)), seconds


def _segments(opened: list[str]) -> list[str]:
    return [path for path in opened if path.endswith(".parquet")]


def _cell(root: Path) -> dict[str, int]:
    """Record a cell's calls; the hash of each reply by its call."""
    written: dict[str, int] = {}
    rng = np.random.default_rng(0)
    with Journal(UPath(root)) as journal:
        for first in range(0, N_LATENTS, LATENTS_AT_ONCE):
            entries = list(_entries(rng, range(first, first + LATENTS_AT_ONCE)))
            for done in [journal.record(BLOCK, entry) for entry in entries]:
                done.result()
            written |= {entry.call_id: hash(entry.reply) for entry in entries}
    assert len(written) == N_LATENTS * CALLS_PER_LATENT
    return written


def _look_up(root: Path, call_ids: list[str]) -> None:
    journal = Journal(UPath(root))
    for call_id in call_ids:
        assert journal.lookup(BLOCK, call_id) is not None


def _recording(folder: Path) -> list[Result]:
    entries = list(_entries(np.random.default_rng(1), range(3 * LATENTS_AT_ONCE)))
    whole = [replace(entry, n_shared=0) for entry in entries]
    _, record_s = cpu_seconds(lambda: _record(folder / "templates", entries))
    _record(folder / "whole", whole)
    n_bytes, whole_bytes = (_n_bytes(folder / name) for name in ("templates", "whole"))
    logged, whole_logged = (
        sum(len(to_line(BLOCK, entry, "0" * 32 if entry.n_shared else None)) for entry in each)
        for each in (entries, whole)
    )
    n = len(entries)
    return [
        Result("recording and sealing a call", 1e3 * record_s / n, 0.15, "CPU ms", is_cost=True),
        Result("a sealed call", n_bytes / n, 700, "bytes", is_cost=True),
        Result("a logged call", logged / n, 4000, "bytes", is_cost=True),
        Result("sealed calls without templates", whole_bytes / n_bytes, 1.0, "x bytes"),
        Result("logged calls without templates", whole_logged / logged, 1.5, "x bytes"),
    ]


def _record(root: Path, entries: list[Entry]) -> None:
    """As a client does: some in flight, each waited for."""
    with Journal(UPath(root)) as journal:
        for first in range(0, len(entries), IN_FLIGHT):
            group = entries[first : first + IN_FLIGHT]
            for done in [journal.record(BLOCK, entry) for entry in group]:
                done.result()


def _entries(rng: np.random.Generator, latents: range) -> Iterator[Entry]:
    """Calls as detection makes them; explanations and windows are random words."""
    for latent in latents:
        explanation = _text(rng, 12)
        for _ in range(CALLS_PER_LATENT):
            windows = [_text(rng, WINDOW_WORDS) for _ in range(WINDOWS)]
            chat = detection_prompt(explanation, windows, WINDOWS)
            request = Request(
                messages=chat.messages,
                answer=LabelList(WINDOWS),
                unit=f"sae/layers.9/{latent}/default/own/detection",
                block=BLOCK,
                n_shared=chat.n_shared,
                max_tokens=36,
                top_logprobs=N_CANDIDATES,
            )
            yield Entry.of(request.call_id(IDENTITY), IDENTITY, request, _reply(rng))


def _text(rng: np.random.Generator, n_words: int) -> str:
    return " ".join(f"word{i}" for i in rng.zipf(1.3, n_words) % 5000)


def _reply(rng: np.random.Generator) -> Reply:
    """Labels with their candidates; log-probabilities are floats of 32 bits, as servers have."""
    labels = rng.integers(0, 2, WINDOWS).tolist()
    logprobs = -rng.exponential(5.0, (WINDOWS, N_CANDIDATES)).astype(np.float32)
    tokens = tuple(
        Token(str(label), values[0], tuple(zip(_LABELS, values, strict=True)))
        for label, values in zip(labels, logprobs.astype(np.float64).tolist(), strict=True)
    )
    return Reply(str(labels), "stop", tokens, Usage(900, 640, 16, 0.0001))


def _n_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def _forget_pages(folder: Path) -> None:
    """Make the next read of these files come from the disk."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


_listeners: list[list[str]] = []


@contextmanager
def _files_opened() -> Iterator[list[str]]:
    """The paths that this process opens meanwhile (a hook of the interpreter stays behind)."""
    paths: list[str] = []
    _listeners.append(paths)
    _start_to_hear()
    try:
        yield paths
    finally:
        _listeners.remove(paths)


@cache
def _start_to_hear() -> None:
    sys.addaudithook(_hear)  # for good, so only once


def _hear(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open":
        for paths in _listeners:
            paths.append(str(arguments[0]))
