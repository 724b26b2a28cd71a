"""How far a pass is: what a rerun goes on from after a kill."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import polars as pl
from safetensors import SafetensorError
from safetensors.numpy import load, save

from autointerp_dagster.adapters.storage import write_whole
from autointerp_dagster.core.schemas import FIRING_COUNTS
from autointerp_dagster.core.types import LayerKey

_FILE = "checkpoint.safetensors"
_N_CHUNKS, _SIZE, _COUNTS = "n_chunks", "size", "counts"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A moment of a pass: these chunks are in these bytes and counts, and no others."""

    n_chunks: int
    """Chunks done."""
    sizes: Mapping[str, int]
    """Bytes of each file that count; what stands behind them came later."""
    counts: Mapping[LayerKey, pl.DataFrame]
    """``schemas.FIRING_COUNTS`` of each whole layer."""

    def write(self, folder: Path) -> None:
        """Replaces the folder's checkpoint at once. The files must be on disk already.

        Raises:
            OSError: If it cannot be written; the one before stays.
        """
        arrays = {_N_CHUNKS: np.array([self.n_chunks], dtype=np.int64)}
        arrays |= {
            f"{_SIZE}/{file}": np.array([n_bytes], dtype=np.int64)
            for file, n_bytes in self.sizes.items()
        }
        for layer, table in self.counts.items():
            filled = table.with_columns(pl.col("max_activation").fill_null(0.0))
            arrays |= {f"{_COUNTS}/{layer}/{c.name}": c.to_numpy() for c in filled}
        write_whole(folder / _FILE, save(arrays))

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The folder's checkpoint; null if there is none or it cannot be read."""
        path = folder / _FILE
        if not path.exists():
            return None
        try:
            arrays = load(path.read_bytes())
        except SafetensorError as error:
            _logger.warning("%s: cannot be read, the pass begins again: %s", path, error)
            return None
        sizes = {
            name.removeprefix(f"{_SIZE}/"): int(array[0])
            for name, array in arrays.items()
            if name.startswith(f"{_SIZE}/")
        }
        columns: dict[str, dict[str, np.ndarray]] = {}
        for name, array in arrays.items():
            if name.startswith(f"{_COUNTS}/"):
                layer, column = name.removeprefix(f"{_COUNTS}/").rsplit("/", maxsplit=1)
                columns.setdefault(layer, {})[column] = array
        counts = {LayerKey.parse(layer): _table(of) for layer, of in columns.items()}
        return cls(int(arrays[_N_CHUNKS][0]), sizes, counts)


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


def _table(columns: dict[str, np.ndarray]) -> pl.DataFrame:
    fired = pl.col("n_tokens") > 0
    frame = pl.DataFrame(columns).with_columns(max_activation=pl.when(fired).then("max_activation"))
    return FIRING_COUNTS.conform(frame)
