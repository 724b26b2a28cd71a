"""How far a pass is: what a rerun goes on from after a kill.

``<n_chunks>-<i>.counts`` holds the firing counts of one layer. ``checkpoint.json``, written last,
begins with its own CRC-32 and says which files count, and how many bytes of them.
"""

import json
import logging
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import polars as pl
from safetensors.numpy import load, save

from autointerp_dagster.adapters.local_files import write_whole
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.schemas import FIRING_COUNTS
from autointerp_dagster.core.types import LayerKey

_FILE = "checkpoint.json"

_logger = logging.getLogger(__name__)


class Written(NamedTuple):
    """What a file holds."""

    n_bytes: int
    crc: int
    """CRC-32 of these bytes."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A moment of a pass: these chunks are in these bytes and counts, and no others."""

    n_chunks: int
    """Chunks done."""
    files: Mapping[str, Written]
    """By name; what stands behind these bytes came later."""
    counts: Mapping[LayerKey, str]
    """Name of the file with each layer's counts."""
    batch_size: int | None = None
    """Most contexts that ran at once in any of these chunks, at the least; null: there was none."""

    @classmethod
    def make(
        cls,
        folder: Path,
        n_chunks: int,
        files: Mapping[str, Written],
        tables: Iterable[tuple[LayerKey, pl.DataFrame]],
        batch_size: int | None = None,
    ) -> Self:
        """Replaces the folder's checkpoint at once. One table at a time is in memory.

        Args:
            folder: Of the spool.
            n_chunks: Chunks done, more than in the checkpoint before.
            files: What is spooled; on disk already.
            tables: ``schemas.FIRING_COUNTS`` of each whole layer.
            batch_size: See :attr:`batch_size`.

        Raises:
            OSError: If it cannot be written; the one before stays.
        """
        written, counts = dict(files), {}
        for i, (layer, table) in enumerate(tables):
            filled = table.with_columns(pl.col("max_activation").fill_null(0.0))
            data = save({c.name: c.to_numpy() for c in filled})
            counts[layer] = f"{n_chunks}-{i}.counts"
            write_whole(folder / counts[layer], data)
            written[counts[layer]] = Written(len(data), zlib.crc32(data))
        made = cls(n_chunks, written, counts, batch_size)
        made.write(folder)
        for path in folder.glob("*.counts"):
            if path.name not in written:
                path.unlink()
        return made

    def write(self, folder: Path) -> None:
        """Replaces the folder's checkpoint at once; its files must be there."""
        counts = {str(layer): file for layer, file in self.counts.items()}
        about = {
            "n_chunks": self.n_chunks,
            "files": dict(self.files),
            "counts": counts,
            "batch_size": self.batch_size,
        }
        body = json.dumps(about).encode()
        write_whole(folder / _FILE, b"%08x\n%b" % (zlib.crc32(body), body))

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The folder's checkpoint; null if there is none or it cannot be read."""
        path = folder / _FILE
        try:
            about = json.loads(_checked(path.read_bytes()))
            files = {name: Written(*written) for name, written in about["files"].items()}
            counts = {LayerKey.parse(layer): file for layer, file in about["counts"].items()}
            return cls(about["n_chunks"], files, counts, about.get("batch_size"))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, IndexError, TypeError) as error:
            _logger.warning("%s: cannot be read, the pass begins again: %r", path, error)
            return None

    def only(self, layers: Collection[LayerKey], files: Collection[str]) -> "Checkpoint":
        """The same moment of these layers, with their spooled files."""
        counts = {layer: file for layer, file in self.counts.items() if layer in layers}
        kept = {*files, *counts.values()}
        written = {name: written for name, written in self.files.items() if name in kept}
        return Checkpoint(self.n_chunks, written, counts, self.batch_size)

    def table(self, folder: Path, layer: LayerKey) -> pl.DataFrame:
        """``schemas.FIRING_COUNTS`` of a whole layer.

        Raises:
            StoreError: If the file is missing or damaged.
        """
        path = folder / self.counts[layer]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise damaged(path, str(error)) from error
        if Written(len(data), zlib.crc32(data)) != self.files[path.name]:
            raise damaged(path, "its bytes are not those that were written")
        fired = pl.when(pl.col("n_tokens") > 0)
        frame = pl.DataFrame(load(data)).with_columns(max_activation=fired.then("max_activation"))
        return FIRING_COUNTS.conform(frame)

    def has_counts(self, folder: Path, layers: Iterable[LayerKey]) -> bool:
        """Whether the counts of these layers can be read."""
        try:
            for layer in layers:
                self.table(folder, layer)
        except (StoreError, KeyError) as error:
            _logger.warning("%s", error)
            return False
        return True


def _checked(data: bytes) -> bytes:
    crc, _, body = data.partition(b"\n")
    if int(crc, base=16) != zlib.crc32(body):
        raise ValueError("its bytes are not those that were written")
    return body


def damaged(path: Path, what: str) -> StoreError:
    """The error to raise where a spooled file is not what it was; a rerun sees it and recovers."""
    return StoreError(
        f"spool {path}: {what}. The file is damaged. Run again: the pass then begins anew; should "
        f"it not, remove the folder {path.parent}. Check the disk if it happens again."
    )


def added(before: pl.DataFrame | None, since: pl.DataFrame) -> pl.DataFrame:
    """Firing counts of two parts of a pass together; every context lies in one of them.

    Args:
        before: ``schemas.FIRING_COUNTS``; null: of nothing.
        since: The other part's, of the same layer.
    """
    if before is None:
        return since
    maximum = pl.max_horizontal(pl.col("max_activation"), since["max_activation"])
    together = before.with_columns(
        n_tokens=pl.col("n_tokens") + since["n_tokens"],
        n_contexts=pl.col("n_contexts") + since["n_contexts"],
        max_activation=maximum,
    )
    return FIRING_COUNTS.conform(together)
