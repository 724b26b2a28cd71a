"""Parquet files written block by block: how a table is encoded, hashed and checked on its way.

A file is a row of blocks of ``HASH_BLOCK`` rows, each a row group of its own. Only one block is in
memory, and what was written tells where each row group lies and what its bytes hash to, so that a
reader of some of them can tell damage without reading the rest.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from autointerp_dagster.adapters.hashing import DIGEST_BYTES, HASH_BLOCK, block_hash, blocks_hash
from autointerp_dagster.core.schemas import Table


class FilePart(NamedTuple):
    """Consecutive bytes of a file."""

    start: int
    stop: int
    digest: bytes
    """See :func:`digest_of`."""


class WrittenTable(NamedTuple):
    """What there is to say of a Parquet file once it is written."""

    checksum: str
    """SHA-256 of the file, in hex digits."""
    content_hash: str
    """``table_hash`` of all rows."""
    n_bytes: int
    n_rows: int
    row_groups: list[FilePart]
    """In order; every one but the last has ``HASH_BLOCK`` rows. Empty for an empty table."""
    footer: FilePart
    """From the end of the last row group to the end of the file."""


def digest_of(data: bytes | memoryview) -> bytes:
    """Hash of part of a file's bytes."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def write_frames(file: BinaryIO, table: Table, frames: Iterable[pl.DataFrame]) -> WrittenTable:
    """Writes a table that comes in frames; no more than a block and a frame is in memory.

    Args:
        file: Empty and open for writing; left open.
        table: Its declaration.
        frames: Rows in the order of ``table.key``, over all frames, without a repeated key. Of any
            size; where they are cut makes no difference to the file.

    Raises:
        ValueError: If a frame has other columns, or rows are not in order.
    """
    empty = table.empty()
    sink, hashes, row_groups = _Sink(file), [], []
    schema, options = empty.to_arrow().schema, encodings(empty)
    n_rows = 0
    with pq.ParquetWriter(sink, schema, **options) as writer:
        sink.cut()  # what stands before the first row group
        for block in blocks_of(_in_order(table, frames)):
            writer.write_table(block.to_arrow(), row_group_size=HASH_BLOCK)
            row_groups.append(sink.cut())
            hashes.append(block_hash(block))
            n_rows += block.height
    footer = sink.cut()
    content_hash = blocks_hash(hashes or [block_hash(empty)])
    return WrittenTable(sink.checksum(), content_hash, footer.stop, n_rows, row_groups, footer)


def encodings(frame: pl.DataFrame) -> dict[str, Any]:
    """Parquet options: sorted integers and floats shrink 2x against the default encodings.

    The least and the largest element of all lists tell nothing, and cost a seventh of the writing.
    """
    chosen: dict[str, str] = {}
    for name, kind in frame.schema.items():
        if kind.is_integer():
            chosen[name] = "DELTA_BINARY_PACKED"
        elif kind.is_float():
            chosen[name] = "BYTE_STREAM_SPLIT"
    scalars = [name for name, kind in frame.schema.items() if not kind.is_nested()]
    dictionary = [name for name in frame.columns if name not in chosen]
    return {
        "compression": "zstd",
        "use_dictionary": dictionary or False,
        "column_encoding": chosen or None,
        "write_statistics": scalars or False,
    }


def table_file_hash(file: BinaryIO) -> str:
    """``table_hash`` of the rows in a Parquet file; only a block of them is in memory.

    Raises:
        ArrowException, OSError: If it is no Parquet file.
    """
    with pq.ParquetFile(file) as parquet:
        groups = range(parquet.num_row_groups)
        frames = (_frame(parquet.read_row_group(group)) for group in groups)
        hashes = [block_hash(block) for block in blocks_of(frames)]
        return blocks_hash(hashes or [block_hash(_frame(parquet.schema_arrow.empty_table()))])


def flat_columns(data: bytes) -> tuple[pl.Schema, pl.DataFrame]:
    """The types of all columns of a Parquet file, and its rows without the columns of lists.

    Raises:
        ArrowException: If it is no Parquet file.
    """
    with pq.ParquetFile(pa.BufferReader(data)) as parquet:
        schema = _frame(parquet.schema_arrow.empty_table()).schema
        flat = [name for name, kind in schema.items() if not kind.is_nested()]
        return schema, _frame(parquet.read(columns=flat))


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


class FileWindow(io.RawIOBase):
    """A stretch of a file's bytes, read at the places that they have in the file."""

    def __init__(self, start: int, data: bytes) -> None:
        super().__init__()
        self._start, self._data = start, data
        self._position = start

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Place in the file."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """To a place in the file, which ends where the stretch ends."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position}
        self._position = base.get(whence, self._start + len(self._data)) + offset
        return self._position

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes; all that are left if it is negative.

        Raises:
            ValueError: If the place lies before the stretch.
        """
        first = self._position - self._start
        if first < 0:
            raise ValueError(f"byte {self._position}: before the stretch at {self._start}.")
        data = self._data[first : None if size < 0 else first + size]
        self._position += len(data)
        return data


class _Sink(io.RawIOBase):
    """Passes bytes on to a file, hashing all of them and each part between two cuts."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._whole = hashlib.sha256()
        self._part = hashlib.blake2b(digest_size=DIGEST_BYTES)
        self._start = self._position = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any, /) -> int:
        self._file.write(data)
        self._whole.update(data)
        self._part.update(data)
        n_bytes = memoryview(data).nbytes
        self._position += n_bytes
        return n_bytes

    def cut(self) -> FilePart:
        """What was written since the last cut."""
        part = FilePart(self._start, self._position, self._part.digest())
        self._start, self._part = self._position, hashlib.blake2b(digest_size=DIGEST_BYTES)
        return part

    def checksum(self) -> str:
        return self._whole.hexdigest()


def blocks_of(frames: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """The same rows in frames of ``HASH_BLOCK``, the last perhaps shorter; none is empty."""
    held: list[pl.DataFrame] = []
    n_held = 0
    for frame in frames:
        start = 0
        while start < frame.height:
            piece = frame.slice(start, HASH_BLOCK - n_held)
            held.append(piece)
            n_held, start = n_held + piece.height, start + piece.height
            if n_held == HASH_BLOCK:
                yield pl.concat(held, rechunk=True)
                held, n_held = [], 0
    if held:
        yield pl.concat(held, rechunk=True)


def _in_order(table: Table, frames: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """The frames, each compared with its declaration and with the last row before it."""
    schema = pl.Schema(table.columns)
    before = table.empty().select(table.key)
    for frame in frames:
        if frame.schema != schema:
            raise ValueError(f"table {table.name}: a frame has {frame.schema}, wanted {schema}.")
        if frame.is_empty():
            continue
        keys = frame.select(table.key)
        if not (table.is_in_order(pl.concat([before, keys.head(1)])) and table.is_in_order(keys)):
            raise ValueError(
                f"table {table.name}: rows are not in the order of {table.key}, or repeat a key."
            )
        before = keys.tail(1)
        yield frame


def part_arrays(parts: list[FilePart]) -> dict[str, np.ndarray]:
    """Parts of a file as arrays ``start``, ``stop`` and ``digest``, for a tensor file."""
    digests = b"".join(part.digest for part in parts)
    return {
        "start": np.array([part.start for part in parts], dtype=np.int64),
        "stop": np.array([part.stop for part in parts], dtype=np.int64),
        "digest": np.frombuffer(digests, dtype=np.uint8).reshape(len(parts), DIGEST_BYTES),
    }


def parts_of(arrays: dict[str, np.ndarray]) -> list[FilePart]:
    """What :func:`part_arrays` made arrays of."""
    columns = (arrays["start"].tolist(), arrays["stop"].tolist(), arrays["digest"])
    return [FilePart(a, b, digest.tobytes()) for a, b, digest in zip(*columns, strict=True)]
