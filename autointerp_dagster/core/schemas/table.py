"""How a table is declared, and what it takes to be one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool

from autointerp_dagster.core.types import LayerKey


@dataclass(frozen=True)
class Table:
    """A declared table: every frame that is stored passes :meth:`conform`."""

    name: str
    columns: Mapping[str, Any]
    """Polars type of each column (a union of polars types has no repr that beartype accepts)."""
    key: tuple[str, ...]
    """Columns that identify a row; rows are sorted by them. A key column may be null."""

    def empty(self) -> pl.DataFrame:
        """The table without rows."""
        return pl.DataFrame(schema=dict(self.columns))

    def conform(self, frame: pl.DataFrame, layer: LayerKey | None = None) -> pl.DataFrame:
        """``frame`` with exactly the declared columns, sorted by key.

        Args:
            frame: At least the declared columns (``coder`` and ``hookpoint`` excepted when
                ``layer`` is given), of types that cast without loss; others are an error.
            layer: Fills ``coder`` and ``hookpoint``.

        Raises:
            ValueError: If a column is missing, unknown or of another type, or a key repeats.
        """
        if layer is not None:
            frame = frame.with_columns(coder=pl.lit(layer.coder), hookpoint=pl.lit(layer.hookpoint))
        missing = [name for name in self.columns if name not in frame.columns]
        unknown = [name for name in frame.columns if name not in self.columns]
        if missing or unknown:
            raise ValueError(
                f"table {self.name}: missing columns {missing}, unknown columns {unknown}."
            )
        try:
            frame = frame.select(pl.col(n).cast(t) for n, t in self.columns.items())
        except pl.exceptions.InvalidOperationError as error:
            raise ValueError(f"table {self.name}: {error}") from error
        constant = () if layer is None else ("coder", "hookpoint")
        key = [name for name in self.key if name not in constant]
        if _ascends(frame, key):  # what is made in order is not sorted again
            return frame
        frame = frame.sort(key, nulls_last=True)
        as_before = [pl.col(name).eq_missing(pl.col(name).shift(1)) for name in self.key]
        repeated = frame.select(pl.all_horizontal(as_before).slice(1).sum()).item()
        if repeated:
            raise ValueError(f"table {self.name}: {repeated} rows repeat a key {self.key}.")
        return frame

    def is_in_order(self, frame: pl.DataFrame) -> bool:
        """Whether the rows of a frame with the key's columns are sorted by it, and none repeats.

        Nulls come last.
        """
        return _ascends(frame, self.key)


def _ascends(frame: pl.DataFrame, key: Sequence[str]) -> bool:
    """Whether each row comes after the one before it, by the first of the columns that differs."""
    if frame.height < 2:
        return True
    tied = np.ones(frame.height - 1, dtype=bool)
    for name in key:
        is_same, is_after = _compared(frame.get_column(name), tied)
        if not is_after:
            return False
        tied &= is_same
    return not tied.any()


def _compared(
    column: pl.Series, tied: Bool[np.ndarray, " pair"]
) -> tuple[Bool[np.ndarray, " pair"], bool]:
    """Which values are like the one before, and whether all others of the tied pairs ascend."""
    if column.dtype.is_integer() and not column.null_count():
        values = column.to_numpy()
        is_same = values[1:] == values[:-1]
        return is_same, bool((is_same | ~tied | (values[1:] > values[:-1])).all())
    last, here = column.head(-1), column.slice(1)
    is_same = here.eq_missing(last).to_numpy()
    rows = np.flatnonzero(tied & ~is_same)  # few: a column that is no number has long runs
    if not len(rows):
        return is_same, True
    last, here = last.gather(rows), here.gather(rows)
    is_after = (here > last) | (here.is_null() & last.is_not_null())
    return is_same, bool(is_after.fill_null(False).all())
