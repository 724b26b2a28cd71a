"""One cell's activation cache in the store, readable by latents.

Two blobs: ``activations``, a Parquet file in row groups of ``HASH_BLOCK`` rows, and
``activation_offsets``, which says where each latent's rows begin and where each row group lies. So
a few latents cost their own row groups and no more, and damage there is told from those bytes.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from autointerp_dagster.adapters.hashing import HASH_BLOCK
from autointerp_dagster.adapters.manifests import Blob, Manifest
from autointerp_dagster.adapters.parquet import FilePart, FileWindow, part_arrays, parts_of
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.schemas import ACTIVATIONS, FIRING_COUNTS
from autointerp_dagster.core.types import LatentRange

OFFSETS = "activation_offsets"
"""Name of the blob beside ``activations``: ``row_offsets`` (one more than the cell has latents) and
``start``, ``stop``, ``digest`` of every row group and, last of all, of the footer."""

_ROW_OFFSETS = "row_offsets"
CONTENT = (_ROW_OFFSETS,)
"""The arrays of it that say something; the others tell how ``activations`` happens to be stored."""

_FRAME_GROUPS = 2
"""Row groups in one frame of :meth:`ActivationShard.frames`."""


def write_shard(
    store: Store, frames: Iterable[pl.DataFrame], n_rows: Int64[np.ndarray, " latent"]
) -> list[Blob]:
    """Stores the activations of a cell as they come; no more than a frame is in memory.

    Args:
        store: Where to.
        frames: ``schemas.ACTIVATIONS`` rows of the cell, in order over all frames.
        n_rows: How many rows each latent of the cell has, from the cell's first latent on.

    Returns:
        The two blobs that an :class:`ActivationShard` reads.

    Raises:
        StoreError: If the store cannot be written, or there are more or fewer rows than counted.
        ValueError: If rows are not in order.
    """
    blob, file = store.put_frames(ACTIVATIONS, frames)
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(n_rows, dtype=np.int64)])
    if offsets[-1] != file.n_rows:
        raise StoreError(
            f"activations: {file.n_rows} rows, wanted the {offsets[-1]} that were counted. Where "
            "they came from is damaged; make them again."
        )
    parts = part_arrays([*file.row_groups, file.footer])
    side = store.put_tensors(OFFSETS, {_ROW_OFFSETS: offsets, **parts}, content=CONTENT)
    return [blob, side]


class ActivationShard:
    """The non-zeros of a range of latents. Nothing but what is asked for is in memory."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        """Reads how many rows each latent has and where they are.

        Args:
            store: Where the blobs are.
            manifest: Of a cell of ``activation_cache`` whose status is ``ok``.

        Raises:
            StoreError: If a blob is missing or damaged; says how to make it again.
        """
        self._store, self._cell = store, manifest.cell
        self._blob = manifest.blob(ACTIVATIONS.name)
        cell = LatentRange.parse(manifest.cell.rsplit("/", maxsplit=1)[1])
        with _naming(manifest.cell):
            self.firing_counts = store.table(manifest.blob(FIRING_COUNTS.name))
            """``schemas.FIRING_COUNTS`` of the whole layer."""
            side = store.tensors(manifest.blob(OFFSETS))
        self._offsets: Int64[np.ndarray, " boundary"] = side[_ROW_OFFSETS]
        *self._row_groups, self._footer = parts_of(side)
        self.latents = range(cell.start, cell.start + self._offsets.size - 1)
        """The latents of the cell that the coder has."""
        self.n_rows: Int64[np.ndarray, " latent"] = np.diff(self._offsets)
        """Non-zeros of each of ``latents``."""

    def read(self, latents: range) -> pl.DataFrame:
        """``schemas.ACTIVATIONS`` of consecutive latents of the cell; empty for an empty range.

        Raises:
            StoreError: If what is read is damaged; names the file and how to make it again.
            ValueError: If a latent is not of this cell.
        """
        rows = self._rows(latents)
        if not rows:
            return ACTIVATIONS.empty()
        groups = range(rows.start // HASH_BLOCK, (rows.stop - 1) // HASH_BLOCK + 1)
        return self._decoded(groups).slice(rows.start - groups.start * HASH_BLOCK, len(rows))

    def read_each(self, latents: Sequence[int]) -> pl.DataFrame:
        """``schemas.ACTIVATIONS`` of some latents of the cell; each row group is read once.

        Args:
            latents: In any order; repeats are read once.

        Raises:
            StoreError: As :meth:`read`.
            ValueError: As :meth:`read`.
        """
        spans = [self._rows(range(latent, latent + 1)) for latent in sorted(set(latents))]
        pieces = [ACTIVATIONS.empty()]
        held, group = ACTIVATIONS.empty(), -1
        for span in (span for span in spans if span):
            for g in range(span.start // HASH_BLOCK, (span.stop - 1) // HASH_BLOCK + 1):
                if g != group:
                    held, group = self._decoded(range(g, g + 1)), g
                start = max(span.start - g * HASH_BLOCK, 0)
                pieces.append(held[start : span.stop - g * HASH_BLOCK].clone())
        return pl.concat(pieces, rechunk=True)

    def blocks(self, max_rows: int) -> Iterator[range]:
        """All latents in order, in blocks of at most ``max_rows`` non-zeros.

        A latent is never divided, so one with more stands alone.
        """
        start, n = self.latents.start, 0
        for latent, rows in zip(self.latents, self.n_rows.tolist(), strict=True):
            if n + rows > max_rows and latent > start:
                yield range(start, latent)
                start, n = latent, 0
            n += rows
        if start < self.latents.stop:
            yield range(start, self.latents.stop)

    def frames(self) -> Iterator[pl.DataFrame]:
        """All rows in order, in frames of bounded size that may divide a latent; at least one."""
        if not self._row_groups:
            yield ACTIVATIONS.empty()
        for start in range(0, len(self._row_groups), _FRAME_GROUPS):
            stop = min(start + _FRAME_GROUPS, len(self._row_groups))
            yield self._decoded(range(start, stop))

    def _rows(self, latents: range) -> range:
        """The rows of consecutive latents."""
        if not latents:
            return range(0)
        first, last = latents.start - self.latents.start, latents.stop - self.latents.start
        if first < 0 or last > len(self.latents) or latents.step != 1:
            raise ValueError(
                f"{self._cell}: latents {latents} were asked for, wanted some of {self.latents}."
            )
        return range(int(self._offsets[first]), int(self._offsets[last]))

    def _decoded(self, groups: range) -> pl.DataFrame:
        parts = self._row_groups[groups.start : groups.stop]
        source = pa.PythonFile(FileWindow(parts[0].start, self._bytes(parts)), mode="r")
        with pq.ParquetFile(source, metadata=self._metadata) as file:
            frame = pl.from_arrow(file.read_row_groups(list(groups), use_threads=False))
        assert isinstance(frame, pl.DataFrame)
        return frame

    @cached_property
    def _metadata(self) -> pq.FileMetaData:
        return pq.read_metadata(pa.BufferReader(self._bytes([self._footer])))

    def _bytes(self, parts: Sequence[FilePart]) -> bytes:
        with _naming(self._cell):
            return self._store.read_parts(self._blob, parts)


@contextmanager
def _naming(cell: str) -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        raise StoreError(f"activation_cache {cell}: {error}") from error
