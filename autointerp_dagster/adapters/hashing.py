"""Hashes of what data says, not of how a file happens to be written.

Two tables with equal columns and rows have equal hashes whatever their chunking, their null
buffers or the Parquet library's version; that is what makes a rerun recognisable as identical.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from autointerp_dagster.adapters.tensor_files import tensor_places

DIGEST_BYTES = 16
HASH_BLOCK = 131_072
"""Rows of a table that are hashed at once; also a row group of a table in the store."""
_MANY = 65_536
"""From so many values on, repeated strings and mostly silent lists are hashed in a shorter form."""

_PIECE = 8 * 2**20


class _Hasher(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...


def json_hash(value: object) -> str:
    """Hash of a JSON-ready value; keys in any order."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=DIGEST_BYTES).hexdigest()


def table_hash(frame: pl.DataFrame) -> str:
    """Hash of a table's columns (names, types, order) and rows, in the order given.

    A table of more than ``HASH_BLOCK`` rows has the hash of its blocks' hashes, so that it can be
    hashed while it is written, see :func:`blocks_hash`.
    """
    starts = range(0, max(frame.height, 1), HASH_BLOCK)
    return blocks_hash([block_hash(frame.slice(start, HASH_BLOCK)) for start in starts])


def block_hash(frame: pl.DataFrame) -> str:
    """Hash of at most ``HASH_BLOCK`` rows; of a table that has no more, its hash."""
    hasher = hashlib.blake2b(digest_size=DIGEST_BYTES)
    hasher.update(f"table\0{frame.height}".encode())
    for name in frame.columns:
        hasher.update(f"\0{name}\0{frame.schema[name]}\0".encode())
        column = frame.get_column(name)
        if column.dtype == pl.String:
            hasher.update(np.packbits(column.is_not_null().to_numpy()).tobytes())
            _feed_strings(hasher, column)
        else:
            _feed(hasher, _one_chunk(column.to_arrow()))
    return hasher.hexdigest()


def blocks_hash(hashes: Sequence[str]) -> str:
    """Hash of a table whose blocks of ``HASH_BLOCK`` rows, the last perhaps shorter, have these.

    A table without rows has one empty block.
    """
    if len(hashes) == 1:
        return hashes[0]
    return json_hash({"table blocks": list(hashes)})


def tensors_hash(tensors: Mapping[str, np.ndarray]) -> str:
    """Hash of named arrays: names, types, shapes and values."""
    hasher = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        hasher.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        hasher.update(array.tobytes())
    return hasher.hexdigest()


def tensor_file_hash(file: BinaryIO, names: Collection[str] | None = None) -> str:
    """``tensors_hash`` of the arrays in a safetensors file; only a piece of one is in memory.

    Args:
        file: Open for reading, at its beginning.
        names: Only these arrays; null: all.

    Raises:
        ValueError: If it is no safetensors file, or has arrays of a type that numpy lacks.
    """
    places = tensor_places(file)
    hasher = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name in sorted(places if names is None else names):
        dtype, shape, start, stop = places[name]
        hasher.update(f"\0{name}\0{dtype}\0{shape}\0".encode())
        file.seek(start)
        while start < stop and (data := file.read(min(_PIECE, stop - start))):
            hasher.update(data)
            start += len(data)
    return hasher.hexdigest()


def file_checksum(path: Path) -> str:
    """SHA-256 of a file, in hex digits, read in pieces.

    Raises:
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def combined_hash(named_hashes: Iterable[tuple[str, str]]) -> str:
    """Hash of several named hashes, in any order."""
    return json_hash(sorted(named_hashes))


def _one_chunk(array: Any) -> pa.Array:
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    return pa.concat_arrays([array])  # drops the offset of a slice


def _feed(hasher: _Hasher, array: pa.Array) -> None:
    is_whole = array.null_count == 0
    is_valid = np.ones(len(array), bool) if is_whole else np.asarray(array.is_valid())
    hasher.update(np.packbits(is_valid).tobytes())
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = pc.fill_null(array.value_lengths(), 0)
        hasher.update(np.asarray(lengths).astype(np.int64).tobytes())
        _feed_elements(hasher, _one_chunk(array.flatten()))
    elif pa.types.is_boolean(kind):
        hasher.update(np.asarray(pc.fill_null(array, False)).astype(np.uint8).tobytes())
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        numbers = array.to_numpy() if is_whole else np.asarray(pc.fill_null(array, 0))
        hasher.update(np.ascontiguousarray(numbers).view(np.uint8).data)
    elif pa.types.is_null(kind):
        hasher.update(str(len(array)).encode())
    else:
        _feed_strings(hasher, pl.Series(array.cast(pa.large_string())))


def _feed_elements(hasher: _Hasher, array: pa.Array) -> None:
    """Those of all lists; of many floats, most of them 0, which are not and the others' values."""
    if pa.types.is_float32(array.type) and array.null_count == 0 and len(array) >= _MANY:
        bits = array.to_numpy().view(np.uint32)
        is_there = bits != 0
        if 2 * np.count_nonzero(is_there) < len(bits):
            hasher.update(b"sparse")
            hasher.update(np.packbits(is_there).data)
            hasher.update(bits[is_there].view(np.uint8).data)
            return
    _feed(hasher, array)


def _feed_strings(hasher: _Hasher, strings: pl.Series) -> None:
    """Lengths and bytes; of many strings that mostly repeat the one before, those of the runs."""
    strings = strings.fill_null("")
    if len(strings) >= _MANY:
        runs = strings.rle().struct
        if 8 * len(runs.field("value")) < len(strings):
            hasher.update(b"runs")
            hasher.update(np.cumsum(runs.field("len").to_numpy(), dtype=np.int64).tobytes())
            strings = runs.field("value")
    array = _one_chunk(strings.to_arrow().cast(pa.large_string()))
    hasher.update(np.asarray(pc.call_function("binary_length", [array])).astype(np.int64).tobytes())
    offsets, data = array.buffers()[1:3]
    if data is not None and len(array):
        bounds = np.frombuffer(offsets, dtype=np.int64, count=len(array) + 1)
        hasher.update(memoryview(data)[int(bounds[0]) : int(bounds[-1])])
