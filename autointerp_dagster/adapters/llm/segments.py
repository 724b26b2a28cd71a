"""Sealed journal segments: immutable Parquet files, named by their content, in one block's folder.

Layout: ``<root>/journal/<stage>/<coder_hash>/<block>/<content hash>.parquet``.
"""

import hashlib
import io
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from upath import UPath

from autointerp_dagster.adapters.llm.backend import Reply
from autointerp_dagster.adapters.llm.entries import (
    REPLY_COLUMNS,
    SCHEMA,
    Entry,
    reply_from_row,
    to_line,
)
from autointerp_dagster.adapters.llm.wal import sync_folder
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.llm import JournalBlock

_LOCAL = frozenset({"", "file", "local"})


def is_local(root: UPath) -> bool:
    """Whether ``root`` is a folder of this machine."""
    return root.protocol in _LOCAL


def write_segment(root: UPath, block: JournalBlock, entries: list[Entry]) -> None:
    """Write a block's entries as one segment and return once it is durable.

    The same entries give the same name, so sealing them twice leaves one segment.
    """
    ordered = sorted(entries, key=lambda entry: (entry.call_id, entry.time))
    digest = hashlib.blake2b(digest_size=16)
    for entry in ordered:
        digest.update(to_line(block, entry))
    target = _block_folder(root, block) / f"{digest.hexdigest()}.parquet"
    if target.exists():
        return
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_pylist([entry.row() for entry in ordered], schema=SCHEMA),
        sink,
        compression="zstd",
    )
    if is_local(root):
        _write_local(Path(target.path), sink.getvalue())
    else:
        target.write_bytes(sink.getvalue())


def _write_local(target: Path, content: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    newborn = target.parent / f".{uuid.uuid4().hex}.tmp"
    with newborn.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    newborn.rename(target)
    sync_folder(target.parent)


class BlockReplies:
    """The sealed replies of one block, in memory as Arrow columns (no prompts)."""

    def __init__(self, root: UPath, block: JournalBlock) -> None:
        """Read all segments of ``block`` that exist now.

        Raises:
            StoreError: If a segment cannot be read.
        """
        columns = list(REPLY_COLUMNS)
        tables = [_read(path, columns) for path in _segments(_block_folder(root, block))]
        self._table = pa.concat_tables([pa.schema(REPLY_COLUMNS).empty_table(), *tables])
        # Where two processes asked alike, the earlier answer counts for everybody.
        order = sorted(
            zip(
                self._table["time"].to_pylist(),
                self._table["call_id"].to_pylist(),
                range(self._table.num_rows),
                strict=True,
            ),
            reverse=True,
        )
        self._rows = {call_id: row for _, call_id, row in order}
        self._added: dict[str, Reply] = {}

    def get(self, call_id: str) -> Reply | None:
        """The reply to a call, if it is sealed."""
        if call_id in self._added:
            return self._added[call_id]
        row = self._rows.get(call_id)
        return None if row is None else reply_from_row(self._table.slice(row, 1).to_pylist()[0])

    def add(self, entries: list[Entry]) -> None:
        """Take over entries that have just been sealed."""
        for entry in entries:
            if entry.call_id not in self._rows:
                self._added.setdefault(entry.call_id, entry.reply)


def find_entry(root: UPath, call_id: str, block: JournalBlock | None) -> Entry | None:
    """A sealed call with its prompt, searched in one block or everywhere; the earliest if several.

    Raises:
        StoreError: If a segment cannot be read.
    """
    folder = root / "journal" if block is None else _block_folder(root, block)
    found: list[dict[str, Any]] = []
    for path in _segments(folder):
        if call_id in _read(path, ["call_id"])["call_id"].to_pylist():
            rows = _read(path, SCHEMA.names).filter(pc.field("call_id") == call_id)
            found += rows.to_pylist()
    return Entry.from_row(min(found, key=lambda row: row["time"])) if found else None


def _block_folder(root: UPath, block: JournalBlock) -> UPath:
    return root / "journal" / block.stage / block.coder_hash / str(block.block)


def _segments(folder: UPath) -> Iterator[UPath]:
    """Every segment below ``folder``, by name; nothing if there is no such folder."""
    if folder.exists():
        yield from sorted(folder.rglob("*.parquet"), key=str)


def _read(path: UPath, columns: list[str]) -> pa.Table:
    try:
        return pq.read_table(io.BytesIO(path.read_bytes()), columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(
            f"{path}: not a readable journal segment ({error}). Delete it to pay again."
        ) from error
