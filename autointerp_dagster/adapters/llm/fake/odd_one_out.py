"""Which of several marked windows an ideal judge takes for the intruder."""

from collections.abc import Callable, Iterable, Sequence

from autointerp_dagster.core.highlight import marked_runs, unescape


def odd_one_out(windows: Sequence[str], rules: Iterable[Callable[[str], bool]] = ()) -> str:
    """The number, from 1, of the window that does not belong.

    It is the only one of which a rule does not hold, else the one whose marked words fewest others
    share, the first of equals.

    Args:
        windows: Escaped and marked, as shown.
        rules: Predicates over the plain text of a marked run; all of a window's runs must hold.
    """
    runs = [[unescape(run) for run in marked_runs(window)] for window in windows]
    for rule in rules:
        strangers = [i for i, found in enumerate(runs) if not found or not all(map(rule, found))]
        if len(strangers) == 1:
            return str(strangers[0] + 1)
    words = [{word.strip().lower() for word in found} for found in runs]
    n_alike = [sum(bool(own & other) for other in words) for own in words]
    return str(n_alike.index(min(n_alike)) + 1)
