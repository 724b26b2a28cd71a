"""What intruder and example_embedding share: draws of windows, spread evenly over the quantiles."""

from collections.abc import Iterable, Sequence

import numpy as np

from autointerp_dagster.core.latent_records import Window
from autointerp_dagster.core.rng import hash_priority


def drawn_order(windows: Iterable[Window], key: int) -> list[Window]:
    """The windows in an order drawn under an address; their given order does not matter."""
    given = sorted(windows, key=lambda window: window.window_id)
    ids = np.array([window.window_id for window in given], dtype=np.uint64)
    return [given[i] for i in np.argsort(hash_priority(key, ids), kind="stable")]


def drawn_one(windows: Sequence[Window], key: int) -> Window:
    """One of the windows, drawn under an address.

    Raises:
        ValueError: If there is none.
    """
    if not windows:
        raise ValueError("draw: got no window, wanted at least one. Leave the draw out.")
    return drawn_order(windows, key)[0]


def by_quantile(windows: Iterable[Window]) -> dict[int, list[Window]]:
    """Activating windows by their quantile, ascending; each list by rank."""
    bands: dict[int, list[Window]] = {}
    for window in sorted(windows, key=lambda w: (w.rank, w.window_id)):
        if window.quantile is not None:
            bands.setdefault(window.quantile, []).append(window)
    return dict(sorted(bands.items()))


def balanced(quantiles: Iterable[int], key: int) -> list[int]:
    """The quantiles in a drawn order; rounds that go through it in turn use each equally often."""
    given = sorted(quantiles)
    priorities = hash_priority(key, np.array(given, dtype=np.uint64))
    return [given[i] for i in np.argsort(priorities, kind="stable")]
