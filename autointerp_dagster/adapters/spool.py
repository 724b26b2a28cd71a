"""The activation cache of many layers in one pass, with non-zeros spooled to disk.

A cell's non-zeros come a few at a time from every chunk of contexts. They are packed, buffered up
to a fixed size, and appended to one raw file per cell in a temporary folder; a cell is sorted when
it is read. So memory is one buffer plus one cell, however many tokens, layers and ranges there are.
"""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import polars as pl

from autointerp_dagster.adapters.coders import check_width
from autointerp_dagster.adapters.subject_models import SubjectModel
from autointerp_dagster.core.activations import FiringCounts, Nonzeros, chunks_of
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.schemas import ACTIVATIONS
from autointerp_dagster.core.sparse_coders import SparseCoder
from autointerp_dagster.core.tokens import TokenDataset, context_batches
from autointerp_dagster.core.types import Cell, LatentRange, LayerKey, Progress

BUFFER_BYTES = 64 << 20
"""Memory for non-zeros that are not on disk yet, all cells together."""

_ROW = np.dtype(
    [("latent", "<u4"), ("context", "<u4"), ("position", "<u2"), ("bfloat16", "<u2")]
)  # 12 bytes


class Spool:
    """Non-zeros on their way from chunks of contexts to cells. Removes its files when closed."""

    def __init__(
        self,
        folder: Path,
        ranges: Mapping[LayerKey, Sequence[LatentRange]],
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        """Make a temporary folder.

        Args:
            folder: Where the temporary folder is made; a local disk with room for 12 bytes per
                non-zero.
            ranges: The cells that are kept; other latents are dropped.
            buffer_bytes: Memory for rows not yet written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=".spool-", dir=folder))
        cells = [Cell(layer, latents) for layer, of in ranges.items() for latents in of]
        self._file_of = {cell: self._folder / f"{i:06d}.rows" for i, cell in enumerate(cells)}
        self._ranges = {layer: tuple(of) for layer, of in ranges.items()}
        self._buffer_bytes = buffer_bytes
        self._buffers: dict[Cell, bytearray] = {}
        self._n_buffered = 0

    def append(self, layer: LayerKey, nonzeros: Nonzeros) -> None:
        """Take in a chunk of one layer; writes to disk when the buffer is full.

        Raises:
            StoreError: If the temporary folder cannot be written, e.g. a full disk.
        """
        for latents in self._ranges[layer]:
            packed = _pack(nonzeros.within(latents))
            if packed:
                self._buffers.setdefault(Cell(layer, latents), bytearray()).extend(packed)
                self._n_buffered += len(packed)
        if self._n_buffered >= self._buffer_bytes:
            self._flush()

    def merge(self, layer: LayerKey, latents: LatentRange) -> pl.DataFrame:
        """``schemas.ACTIVATIONS`` of one cell; empty if nothing fired. Can be asked again.

        Raises:
            ValueError: If the cell is not one of the spool's.
        """
        cell = Cell(layer, latents)
        if cell not in self._file_of:
            raise ValueError(f"spool: cell {cell} was not asked for when the spool was made.")
        self._flush()
        file = self._file_of[cell]
        rows = np.fromfile(file, dtype=_ROW) if file.exists() else np.empty(0, dtype=_ROW)
        return ACTIVATIONS.conform(_unpack(rows))

    def close(self) -> None:
        """Remove the temporary folder."""
        self._buffers.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _flush(self) -> None:
        for cell, buffer in self._buffers.items():
            try:
                with self._file_of[cell].open("ab") as file:
                    file.write(buffer)
            except OSError as error:
                raise StoreError(
                    f"spool {self._file_of[cell]} ({cell}): cannot be written: {error}. It takes "
                    "12 bytes per non-zero; free space there or set TMPDIR, and run again."
                ) from error
        self._buffers.clear()
        self._n_buffered = 0


class CachedLayers:
    """The activation cache of some layers, readable cell by cell until it is closed."""

    def __init__(self, spool: Spool, counts: Mapping[LayerKey, FiringCounts]) -> None:
        self._spool = spool
        self._counts = {layer: of.table() for layer, of in counts.items()}

    def firing_counts(self, layer: LayerKey) -> pl.DataFrame:
        """``schemas.FIRING_COUNTS`` of a whole layer, also of latents outside its ranges."""
        return self._counts[layer]

    def cell(self, layer: LayerKey, latents: LatentRange) -> pl.DataFrame:
        """``schemas.ACTIVATIONS`` of one cell; reads the spool."""
        return self._spool.merge(layer, latents)

    def close(self) -> None:
        """Remove the spooled files."""
        self._spool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def cache_layers(
    subject_model: SubjectModel,
    dataset: TokenDataset,
    coders: Mapping[LayerKey, SparseCoder],
    ranges: Mapping[LayerKey, Sequence[LatentRange]],
    spool_dir: Path,
    progress: Progress,
) -> CachedLayers:
    """Run the subject model once over the dataset and keep what every latent does.

    Use it as ``with cache_layers(...) as cached:``; files are removed at the end of the block, and
    also if the run fails.

    Args:
        subject_model: Runs ``config.batch_size`` contexts at a time.
        dataset: Tokens of this subject model's tokenizer.
        coders: Layers to cache; all share the pass.
        ranges: Cells to keep of each of these layers. Firing counts are of all latents anyway.
        spool_dir: Local folder for temporary files.
        progress: Shown per chunk of contexts.

    Raises:
        ModelError: If the model gives NaN or infinity, or a hookpoint is unknown.
        CoderError: If a coder's width is not that of its hookpoint.
    """
    device, batch_size = subject_model.device, subject_model.config.batch_size
    for layer, coder in coders.items():
        check_width(coder, subject_model, layer)
    on_device = {layer: coder.to(device) for layer, coder in coders.items()}
    counts = {layer: FiringCounts(coder.num_latents) for layer, coder in coders.items()}
    spool = Spool(spool_dir, ranges)
    chunks = chunks_of(subject_model.base_model, dataset, on_device, batch_size, device)
    n_chunks = len(context_batches(dataset, batch_size))
    try:
        for chunk in progress(chunks, total=n_chunks, description="activation cache", unit="chunk"):
            for layer, nonzeros in chunk.nonzeros.items():
                counts[layer].add(nonzeros)
                spool.append(layer, nonzeros)
    except BaseException:
        spool.close()
        raise
    return CachedLayers(spool, counts)


def _pack(nonzeros: Nonzeros) -> bytes:
    rows = np.empty(nonzeros.latent.size, dtype=_ROW)
    rows["latent"], rows["context"] = nonzeros.latent, nonzeros.context
    rows["position"] = nonzeros.position
    rows["bfloat16"] = nonzeros.activation.view(np.uint32) >> 16  # the rest is 0 after rounding
    return rows.tobytes()


def _unpack(rows: np.ndarray) -> pl.DataFrame:
    bits = rows["bfloat16"].astype(np.uint32) << np.uint32(16)
    return pl.DataFrame(
        {
            "latent": np.ascontiguousarray(rows["latent"]),
            "context": np.ascontiguousarray(rows["context"]),
            "position": np.ascontiguousarray(rows["position"]),
            "activation": bits.view(np.float32),
        }
    )
