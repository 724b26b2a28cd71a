"""Numbering rows within their groups."""

import numpy as np
from jaxtyping import Int64, UInt64


def number_in_group(
    group: Int64[np.ndarray, " row"] | UInt64[np.ndarray, " row"],
) -> Int64[np.ndarray, " row"]:
    """How many rows of the same group come before each row.

    Takes one pass where the groups ascend, and a sort otherwise.

    Args:
        group: Of each row; in any order.
    """
    if (group[1:] >= group[:-1]).all():
        return _number_in_run(group)
    order = np.argsort(group, kind="stable")
    numbers = np.empty(len(group), dtype=np.int64)
    numbers[order] = _number_in_run(group[order])
    return numbers


def _number_in_run(
    group: Int64[np.ndarray, " row"] | UInt64[np.ndarray, " row"],
) -> Int64[np.ndarray, " row"]:
    """The same, where rows of a group stand together."""
    starts = np.flatnonzero(np.append(True, group[1:] != group[:-1])[: len(group)])
    sizes = np.diff(starts, append=len(group))
    return np.arange(len(group)) - np.repeat(starts, sizes)
