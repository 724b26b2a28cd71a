"""Long lists in a few words."""

from collections.abc import Sequence


def first_few(items: Sequence[str], n: int, between: str = ", ") -> str:
    """The first ``n`` of ``items`` (at least 1), and how many more there are.

    ``"a, b and 3 more"``; where ``between`` begins a new line, the rest is counted on one of its
    own. Empty if there are no items.
    """
    shown, n_left = between.join(items[:n]), len(items) - n
    if n_left <= 0:
        return shown
    last = between if "\n" in between else " "
    return f"{shown}{last}and {n_left:,} more"
