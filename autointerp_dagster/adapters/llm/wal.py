"""The journal's write-ahead logs: one append-only JSONL file per journal and process.

A process holds an exclusive lock on its log for as long as it lives, so a log whose lock can be
taken belongs to a process that is gone (also on another machine, where the folder is shared).
"""

import fcntl
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from autointerp_dagster.adapters.llm.entries import Entry, from_line
from autointerp_dagster.core.llm import JournalBlock

Record = tuple[JournalBlock, Entry]

logger = logging.getLogger(__name__)


class WriteAheadLog:
    """A log that this process writes. Opened by the first append; not thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path: Path | None = None
        self._file: BinaryIO | None = None

    def append(self, lines: list[bytes]) -> None:
        """Write lines and return once they are on disk."""
        file = self._file or self._open()
        file.write(b"".join(lines))
        file.flush()
        os.fsync(file.fileno())

    def discard(self) -> None:
        """Delete the log: everything in it has been sealed."""
        if self._path is not None:
            self._path.unlink()
        self.close()

    def close(self) -> None:
        """Give the lock up; what the log holds is left to whoever opens the journal next."""
        if self._file is not None:
            self._file.close()
        self._path, self._file = None, None

    def _open(self) -> BinaryIO:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{uuid.uuid4().hex}.jsonl"
        newborn = self._folder / f".{name}"  # not seen by others until it is locked
        file = newborn.open("ab")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._path, self._file = newborn.rename(self._folder / name), file
        sync_folder(self._folder)
        return file


@contextmanager
def orphaned_logs(folder: Path) -> Iterator[list[Record]]:
    """The records of logs whose processes are gone; the logs are deleted on a normal exit.

    A torn last line was never acknowledged and is ignored. While the context lasts, nobody else
    can claim these logs.
    """
    claimed = [claim for path in sorted(folder.glob("*.jsonl")) if (claim := _claim(path))]
    try:
        yield [record for path, file in claimed for record in _records(path, file)]
        for path, _ in claimed:
            path.unlink()
    finally:
        for _, file in claimed:
            file.close()


def sync_folder(folder: Path) -> None:
    """Return once new names in ``folder`` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _claim(path: Path) -> tuple[Path, BinaryIO] | None:
    try:
        file = path.open("r+b")
    except FileNotFoundError:  # sealed by another process meanwhile
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    if not path.exists():  # sealed between opening and locking
        file.close()
        return None
    return path, file


def _records(path: Path, file: BinaryIO) -> Iterator[Record]:
    lines = file.read().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn
        try:
            yield from_line(line)
        except (ValueError, KeyError, TypeError):
            logger.warning("%s line %d: not a journal record; skipped.", path, number)
