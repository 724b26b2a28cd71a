"""From what a log holds to segments, and what waits for that.

A call that cannot be a segment's row, by whatever a server sent, must not hold up the others: its
log is set aside for people to look at, and the call will be asked again.
"""

import logging
import time
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from upath import UPath

from autointerp_dagster.adapters.llm.journal.entries import Entry
from autointerp_dagster.adapters.llm.journal.segments import block_folder, table_of, write_segment
from autointerp_dagster.adapters.llm.journal.templates import (
    Template,
    TemplateStore,
    template_of,
)
from autointerp_dagster.adapters.llm.journal.wal import Line, Record, WriteAheadLog
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.llm import JournalBlock

_ODD = (pa.ArrowException, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

logger = logging.getLogger(__name__)


class Write(NamedTuple):
    """A call that waits for the next commit."""

    block: JournalBlock
    entry: Entry
    line: Line
    done: Future[None]


class Generation:
    """A log and what it holds: durable on this machine, not yet sealed."""

    def __init__(self, folder: Path) -> None:
        """Describe one with a log in ``folder``; nothing is written yet."""
        self.log = WriteAheadLog(folder)
        self.calls: dict[JournalBlock, dict[str, Entry]] = {}
        self.n_calls = 0
        self.born_s = 0.0
        """When the first call came, on the monotonic clock."""

    def add(self, writes: list[Write]) -> None:
        """Take over calls that the log holds; reads the clock."""
        self.born_s = self.born_s if self.n_calls else time.monotonic()
        self.n_calls += len(writes)
        for block, entry, _, _ in writes:
            self.calls.setdefault(block, {}).setdefault(entry.call_id, entry)

    def get(self, block: JournalBlock, call_id: str) -> Entry | None:
        """The first answer to a call."""
        return self.calls.get(block, {}).get(call_id)


class Sealed(NamedTuple):
    """What became of some calls of a block."""

    calls: pa.Table
    """Those in the segment."""
    n_odd: int
    """Those that cannot be in one."""


class Sealer:
    """Writes calls as segments below a root."""

    def __init__(self, root: UPath, templates: TemplateStore) -> None:
        """Describe one; nothing is written yet."""
        self._root = root
        self._templates = templates

    def seal_records(self, records: list[Record]) -> int:
        """Write what a log holds, and return how many of its calls cannot be in a segment.

        Raises:
            StoreError: If a segment cannot be written.
        """
        calls: dict[JournalBlock, dict[str, Entry]] = {}
        for block, entry in records:
            calls.setdefault(block, {}).setdefault(entry.call_id, entry)
        return sum(self.seal(block, list(held.values())).n_odd for block, held in calls.items())

    def seal(self, block: JournalBlock, entries: list[Entry]) -> Sealed:
        """Write calls as one segment; it and the templates that it names are durable on return.

        Raises:
            StoreError: If it cannot be written.
        """
        try:
            calls, templates = _table(entries)
        except _ODD:
            calls, templates = _table([entry for entry in entries if _fits(entry)])
        if calls.num_rows:
            self._write(block, calls, templates)
        return Sealed(calls, n_odd=len(entries) - calls.num_rows)

    def _write(self, block: JournalBlock, calls: pa.Table, templates: set[Template | None]) -> None:
        try:
            for template in templates:
                if template is not None:
                    self._templates.put(template)
            write_segment(block_folder(self._root, block), calls)
        except OSError as error:
            raise unwritable(self._root, error) from error


def unwritable(root: UPath, error: OSError) -> StoreError:
    """The error of a store that did not take a segment."""
    return StoreError(
        f"{root}: a segment of the journal cannot be written: {error}. Free space there or fix the "
        "permissions, and run again: answers that came are in a log and are not paid again."
    )


def _table(entries: list[Entry]) -> tuple[pa.Table, set[Template | None]]:
    templates = [template_of(entry.shared) for entry in entries]
    calls = table_of(entries, [None if t is None else t.address for t in templates])
    return calls, set(templates)


def _fits(entry: Entry) -> bool:
    try:
        _table([entry])
    except _ODD as error:
        logger.warning(
            "call %s cannot be sealed (%s) and will be asked again.",
            entry.call_id,
            type(error).__name__,
        )
        return False
    return True
