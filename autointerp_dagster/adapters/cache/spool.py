"""Non-zeros on their way from chunks of contexts to cells.

They are packed, buffered up to a fixed size, and appended to one raw file per cell; a cell is
sorted when it is read. So memory does not grow with tokens, layers or ranges.
"""

import ctypes
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import polars as pl

from autointerp_dagster.adapters.cache.checkpoint import Written, damaged
from autointerp_dagster.adapters.cache.merging import BLOCK_KEYS, sorted_keys
from autointerp_dagster.adapters.cache.packing import KEY_BYTES, KeyLayout, Keys, addresses_of
from autointerp_dagster.core.activations import Nonzeros
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.types import Cell, LayerKey

BUFFER_BYTES = 16 << 20
"""Memory for non-zeros that are not on disk yet, all cells together."""

FRAME_ROWS = 1 << 18
"""Rows of a frame that is read back, at most."""

_READ_BYTES = 1 << 20

_MOST_SEGMENTS = 1 << 18
"""Pieces of the buffer: a chunk may bring a cell a single non-zero."""


class Spool:
    """The files of a pass, one per cell. Other latents' non-zeros are dropped."""

    def __init__(
        self,
        folder: Path,
        files: Mapping[Cell, str],
        layouts: Mapping[Cell, KeyLayout],
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        """Nothing is read or written yet.

        Args:
            folder: Of this spool alone; on a local disk with room for 8 bytes per non-zero.
            files: Name of each cell's file.
            layouts: How each cell's non-zeros are packed.
            buffer_bytes: Memory for non-zeros not yet written.
        """
        self._folder = folder
        self._file_of = {cell: folder / file for cell, file in files.items()}
        self._layout_of = dict(layouts)
        self._cells_of: dict[LayerKey, list[Cell]] = {}
        for cell in files:
            self._cells_of.setdefault(cell.layer, []).append(cell)
        # One piece of memory while chunks come: buffers that grow would leave holes in the heap.
        self._buffer: Keys | None = None
        self._capacity = max(buffer_bytes // KEY_BYTES, 1)
        self._n_buffered = 0
        self._segments: list[tuple[Cell, int, int]] = []
        self._unsynced = set(self._file_of.values())
        self._written = dict.fromkeys(files.values(), Written(0, 0))

    def create(self) -> None:
        """Makes the files, empty."""
        for file in self._file_of.values():
            with self._writes(file):
                file.write_bytes(b"")

    def append(self, layer: LayerKey, nonzeros: Nonzeros) -> None:
        """Take in a chunk of one layer; writes to disk when the buffer is full.

        Raises:
            StoreError: If the folder cannot be written, e.g. a full disk.
        """
        for cell in self._cells_of.get(layer, ()):
            inside = nonzeros.within(cell.range)
            if inside.latent.size:
                self._hold(cell, self._layout_of[cell].pack(inside))

    def flush(self) -> None:
        """Appends what is buffered to the files.

        Raises:
            StoreError: If the folder cannot be written.
        """
        segments: dict[Cell, list[tuple[int, int]]] = {}
        for cell, start, stop in self._segments:
            segments.setdefault(cell, []).append((start, stop))
        for cell, bounds in segments.items():
            assert self._buffer is not None  # there are segments of it
            file = self._file_of[cell]
            n_bytes, crc = self._written[file.name]
            with self._writes(file), file.open("ab") as opened:
                for start, stop in bounds:
                    data = self._buffer[start:stop].data
                    opened.write(data)
                    n_bytes, crc = n_bytes + data.nbytes, zlib.crc32(data, crc)
            self._written[file.name] = Written(n_bytes, crc)
            self._unsynced.add(file)
        self._segments.clear()
        self._n_buffered = 0

    def sync(self) -> dict[str, Written]:
        """Brings everything safely to disk; gives what each file holds, by name.

        Raises:
            StoreError: If the folder cannot be written.
        """
        self.flush()
        for file in self._unsynced:
            with self._writes(file), file.open("rb") as opened:
                os.fsync(opened.fileno())
        self._unsynced.clear()
        return dict(self._written)

    def free(self) -> None:
        """Gives the buffer's memory back, until there is more to append.

        Raises:
            StoreError: If the folder cannot be written.
        """
        self.flush()
        self._buffer = None
        _trim()

    @property
    def n_buffered(self) -> int:
        """Bytes that are not written yet, at most ``buffer_bytes``."""
        return self._n_buffered * KEY_BYTES

    def truncate(self, written: Mapping[str, Written]) -> bool:
        """Cuts the files back to what they held; false if one is missing, shorter or unknown."""
        files = self._file_of.values()
        if not all(file.name in written and file.exists() for file in files):
            return False
        self._written = {file.name: written[file.name] for file in files}
        if any(file.stat().st_size < self._written[file.name].n_bytes for file in files):
            return False
        for file in files:
            with self._writes(file):
                os.truncate(file, self._written[file.name].n_bytes)
        return True

    def is_intact(self, cells: Iterable[Cell]) -> bool:
        """Whether the files of some cells hold the very bytes that were written; reads them all."""
        return all(self._crc(cell) == self._written[self._file_of[cell].name].crc for cell in cells)

    def frames(self, cell: Cell, block_keys: int = BLOCK_KEYS) -> Iterator[pl.DataFrame]:
        """``schemas.ACTIVATIONS`` of a cell, in order, cut anywhere. Can be asked again.

        Args:
            cell: Which; what was appended to it must be flushed.
            block_keys: Non-zeros in memory at once, see :func:`merging.sorted_keys`.

        Raises:
            ValueError: If the cell is not one of the spool's.
            StoreError: If its file cannot be sorted, or is not what was written.
        """
        if cell not in self._file_of:
            raise ValueError(f"spool: cell {cell} was not asked for when the spool was made.")
        layout, file = self._layout_of[cell], self._file_of[cell]
        last = -1
        for keys in sorted_keys(file, block_keys, self._written[file.name].crc):
            addresses = addresses_of(keys)
            if addresses[0] == last or (addresses[1:] == addresses[:-1]).any():
                raise damaged(file, "a token has two activations of one latent")
            last = int(addresses[-1])
            for start in range(0, keys.size, FRAME_ROWS):
                yield layout.unpack(keys[start : start + FRAME_ROWS])

    def discard(self, cell: Cell) -> None:
        """Removes the file of a cell, which is needed no more."""
        self._file_of[cell].unlink(missing_ok=True)

    def forget(self, cell: Cell) -> None:
        """From now on the cell is not the spool's; its file, if there is one, stays."""
        file = self._file_of.pop(cell, None)
        if file is not None:
            self._cells_of[cell.layer].remove(cell)
            self._unsynced.discard(file)
            self._written.pop(file.name)

    def cells(self) -> list[Cell]:
        """The cells whose files are there."""
        return [cell for cell, file in self._file_of.items() if file.exists()]

    def _crc(self, cell: Cell) -> int:
        crc = 0
        with self._file_of[cell].open("rb") as file:
            while data := file.read(_READ_BYTES):
                crc = zlib.crc32(data, crc)
        return crc

    def _hold(self, cell: Cell, keys: Keys) -> None:
        if self._buffer is None:
            self._buffer = np.empty(self._capacity, dtype=np.uint64)
        while keys.size:
            if self._n_buffered == self._capacity or len(self._segments) == _MOST_SEGMENTS:
                self.flush()
            start = self._n_buffered
            stop = min(start + keys.size, self._capacity)
            self._buffer[start:stop] = keys[: stop - start]
            self._segments.append((cell, start, stop))
            self._n_buffered, keys = stop, keys[stop - start :]

    @contextmanager
    def _writes(self, file: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unwritable(file, error) from error


def _trim() -> None:
    """Gives freed memory back: glibc keeps it, in a heap that gets holes as models run."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def unwritable(path: Path, error: OSError) -> StoreError:
    """The error to raise where the spool cannot be written."""
    return StoreError(
        f"spool {path}: cannot be written: {error}. It takes 8 bytes per non-zero; free space "
        "there, or name a folder on a larger local disk in AUTOINTERP_SPOOL (move the old one's "
        "content along), and run again: it goes on from the last checkpoint."
    )
