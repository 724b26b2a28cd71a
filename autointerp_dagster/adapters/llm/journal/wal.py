"""The journal's write-ahead logs: append-only JSONL files, each of one process.

A process holds an exclusive lock on its log for as long as it lives, so a log whose lock can be
taken belongs to a process that is gone (also on another machine, where the folder is shared).
A log carries every template that its calls refer to, so it can be read without the store.
"""

import fcntl
import json
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from autointerp_dagster.adapters.durable import sync_folder
from autointerp_dagster.adapters.llm.journal.entries import Entry, from_line, messages_of
from autointerp_dagster.adapters.llm.journal.templates import Template
from autointerp_dagster.core.llm import JournalBlock, Message

Record = tuple[JournalBlock, Entry]

logger = logging.getLogger(__name__)


class Line(NamedTuple):
    """A call on its way into a log."""

    content: bytes
    """With its newline."""
    template: Template | None
    """What the call refers to."""


class WriteAheadLog:
    """A log that this process writes. Opened by the first append; not thread-safe."""

    def __init__(self, folder: Path) -> None:
        """Describe a log in ``folder``; nothing is written yet."""
        self._folder = folder
        self._path: Path | None = None
        self._descriptor: int | None = None
        self._templates: set[str] = set()
        self._is_torn = False

    def append(self, lines: Sequence[Line]) -> None:
        """Write lines and return once they are on disk.

        Raises:
            OSError: If they cannot be written; what was appended earlier is not affected.
        """
        descriptor = self._open() if self._descriptor is None else self._descriptor
        new = {
            template.address: template
            for _, template in lines
            if template is not None and template.address not in self._templates
        }
        parts = [_template_line(template) for template in new.values()]
        parts += [line.content for line in lines]
        if self._is_torn:  # keeps what failed apart from what follows
            parts.insert(0, b"\n")
        self._is_torn = True
        _write_all(descriptor, b"".join(parts))
        os.fsync(descriptor)
        self._is_torn = False
        self._templates.update(new)

    def discard(self) -> None:
        """Delete the log: everything in it has been sealed."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        self.close()

    def set_aside(self) -> None:
        """As :meth:`discard`, but keep the file for people: a call of it could not be sealed."""
        if self._path is not None:
            set_aside(self._path)
        self.close()

    def close(self) -> None:
        """Give the lock up; what the log holds is left to whoever opens the journal next."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._path, self._descriptor, self._is_torn = None, None, False
        self._templates.clear()

    def _open(self) -> int:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{uuid.uuid4().hex}.jsonl"
        newborn = self._folder / f".{name}.new"  # nobody may claim it before it is locked
        descriptor = os.open(newborn, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._path, self._descriptor = newborn.rename(self._folder / name), descriptor
        sync_folder(self._folder)
        return descriptor


@contextmanager
def orphaned_logs(folder: Path) -> Iterator[Iterator[tuple[Path, list[Record]]]]:
    """Logs whose processes are gone, with their records; the logs go on a normal exit.

    A torn last line was never acknowledged and is ignored. While the context lasts, nobody else
    can claim these logs.
    """
    claimed = [claim for path in sorted(folder.glob("*.jsonl")) if (claim := _claim(path))]
    try:
        yield ((path, _records(path, file)) for path, file in claimed)
        for path, _ in claimed:
            path.unlink(missing_ok=True)
    finally:
        for _, file in claimed:
            file.close()


def set_aside(path: Path) -> None:
    """Rename a log so that no journal takes it for its own."""
    kept = path.replace(path.with_suffix(".odd"))
    logger.warning("%s: set aside, for some of its calls cannot be sealed.", kept)


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _template_line(template: Template) -> bytes:
    return b'{"address":"%s","shared":%s}\n' % (template.address.encode(), template.content)


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


def _records(path: Path, file: BinaryIO) -> list[Record]:
    templates: dict[str, tuple[Message, ...]] = {}
    records: list[Record] = []
    lines = file.read().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn
        try:
            content = json.loads(line)
            if "shared" in content:
                templates[content["address"]] = messages_of(content["shared"])
            else:
                records.append(from_line(content, templates))
        except (ValueError, KeyError, TypeError):
            logger.warning("%s line %d: not a journal record; skipped.", path, number)
    return records
