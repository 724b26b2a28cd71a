"""Tables that are not as declared, and windows that stand in two splits. Exact: one is too many."""

from collections.abc import Mapping

import numpy as np
import polars as pl
from jaxtyping import Int8

from autointerp_dagster.core.checks.findings import Findings
from autointerp_dagster.core.checks.outcome import Outcome
from autointerp_dagster.core.schemas import Table
from autointerp_dagster.core.types import Cell, Place
from autointerp_dagster.core.windows import SPLITS


def schema_fault(table: Table, columns: Mapping[str, object], keys: pl.DataFrame) -> str | None:
    """What is wrong with a stored table; null if nothing is.

    Args:
        table: Its declaration.
        columns: Name and polars type of all its columns, in order.
        keys: At least those columns of the key that it has; all rows, as stored.
    """
    wanted = dict(table.columns)
    lacks = [name for name in wanted if name not in columns]
    unknown = [name for name in columns if name not in wanted]
    if lacks or unknown:
        return f"{table.name}: columns missing {lacks}, unknown {unknown}"
    for name, kind in wanted.items():
        if columns[name] != kind:
            return f"{table.name}: column {name} is {columns[name]}, declared {kind}"
    if not table.is_in_order(keys):
        is_repeated = keys.select(table.key).is_duplicated().any()
        return f"{table.name}: {'a key repeats' if is_repeated else 'rows are not sorted by key'}"
    return None


def schema(places: Mapping[Place, Findings]) -> Outcome:
    """Whether all tables are as declared."""
    faults = {str(place): one.table_fault for place, one in places.items() if one.table_fault}
    n_tables = sum(one.n_tables for one in places.values())
    return Outcome(
        "schema",
        not faults,
        f"{len(faults)} places with a table that is not as declared, of {n_tables} tables",
        "none",
        "Something else wrote it, or another version of this package: delete the manifest named "
        "there and run again.",
        {"n_faults": len(faults), "n_tables": n_tables},
        faults,
    )


def split_faults(
    windows: pl.DataFrame, split_of: Int8[np.ndarray, " context"]
) -> tuple[int, str | None]:
    """How many windows stand in a split that is not their document's, and the first in words.

    A document (of a long one each block) belongs to one split, so no text is in two.

    Args:
        windows: ``schemas.WINDOWS``, or its columns ``latent``, ``split`` and ``context``.
        split_of: Of each context, an index into :data:`~core.windows.SPLITS`.
    """
    context = windows["context"].to_numpy()
    codes = {name: code for code, name in enumerate(SPLITS)}
    stands = windows["split"].replace_strict(codes, default=-1, return_dtype=pl.Int8).to_numpy()
    is_known = context < split_of.size
    belongs = np.full(context.size, -1, dtype=np.int8)
    belongs[is_known] = split_of[context[is_known]]
    wrong = np.flatnonzero((stands != belongs) | ~is_known)
    if not wrong.size:
        return 0, None
    row = windows.row(int(wrong[0]), named=True)
    known = f"is of {SPLITS[belongs[wrong[0]]]}" if is_known[wrong[0]] else "is not there"
    return wrong.size, (
        f"{wrong.size} windows, e.g. latent {row['latent']} has context {row['context']} in "
        f"{row['split']}, which {known}"
    )


def splits_disjoint(places: Mapping[Cell, Findings]) -> Outcome:
    """Whether every window stands in the split of its document, or of its block of a long one."""
    faults = {str(place): one.split_fault for place, one in places.items() if one.split_fault}
    n_windows = sum(one.n_windows for one in places.values())
    n_wrong = sum(one.n_wrong_splits for one in places.values())
    return Outcome(
        "splits_disjoint",
        not n_wrong,
        f"{n_wrong} of {n_windows} windows in a split that is not their document's",
        "none",
        "The judge could be asked about what the explainer saw. Delete the manifest named there, "
        "run again, and report this if it returns.",
        {"n_wrong": n_wrong, "n_windows": n_windows},
        faults,
    )
