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
        constant = {} if layer is None else {"coder": layer.coder, "hookpoint": layer.hookpoint}
        given = [*frame.columns, *constant]
        missing = [name for name in self.columns if name not in given]
        unknown = [name for name in given if name not in self.columns]
        if missing or unknown:
            raise ValueError(
                f"table {self.name}: missing columns {missing}, unknown columns {unknown}."
            )
        try:
            frame = frame.select(
                pl.lit(constant[name]).alias(name) if name in constant else pl.col(name).cast(kind)
                for name, kind in self.columns.items()
            )
        except pl.exceptions.InvalidOperationError as error:
            raise ValueError(f"table {self.name}: {error}") from error
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
    tied, to_compare = np.ones(frame.height - 1, dtype=bool), []
    for name, is_same in _same_as_before(frame, key).items():
        column, differs = frame.get_column(name), tied & ~is_same
        if _is_plain(column):
            values = column.to_numpy()
            if (differs & (values[1:] < values[:-1])).any():
                return False
        elif differs.any():  # in few rows: a column that is no number has long runs
            rows = pl.Series(np.flatnonzero(differs))
            to_compare.append(_come_after(pl.col(name), rows).alias(name))
        tied &= is_same
    return not tied.any() and all(frame.select(to_compare).row(0) if to_compare else ())


def _same_as_before(
    frame: pl.DataFrame, key: Sequence[str]
) -> dict[str, Bool[np.ndarray, " pair"]]:
    """Of each column of the key, which values are like the one before."""
    others = [name for name in key if not _is_plain(frame.get_column(name))]
    same = frame.select(pl.col(name).eq_missing(pl.col(name).shift(1)) for name in others)
    found: dict[str, Bool[np.ndarray, " pair"]] = {}
    for name in key:
        if name in others:
            found[name] = same.get_column(name).to_numpy()[1:]
        else:
            values = frame.get_column(name).to_numpy()
            found[name] = values[1:] == values[:-1]
    return found


def _is_plain(column: pl.Series) -> bool:
    """Whether it can be compared as an array, without a query."""
    return column.dtype.is_integer() and not column.null_count()


def _come_after(column: pl.Expr, rows: pl.Series) -> pl.Expr:
    """Whether the values behind these rows are greater, or null where the row's is not."""
    last, here = column.gather(rows), column.gather(rows + 1)
    is_after = (here > last) | (here.is_null() & last.is_not_null())
    return is_after.fill_null(False).all()
