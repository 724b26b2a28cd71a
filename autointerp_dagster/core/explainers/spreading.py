"""Which windows are shown where there are more than asked for: some of every quantile."""

from collections.abc import Sequence

from autointerp_dagster.core.latent_records import Window


def spread_over_quantiles(windows: Sequence[Window], n: int) -> list[Window]:
    """At most ``n`` activating windows, as evenly over their quantiles as they allow.

    Takes the first window by rank of every quantile, then the second of every quantile, and so on;
    where a last round does not need all quantiles, those taken are evenly spaced.

    Returns:
        By quantile (strongest first), then rank.
    """
    left: dict[int | None, list[Window]] = {}
    for window in sorted(windows, key=_strongest_first):
        left.setdefault(window.quantile, []).append(window)
    taken: list[Window] = []
    while left and len(taken) < n:
        quantiles = list(left)
        n_now = min(n - len(taken), len(quantiles))
        for i in range(n_now):
            quantile = quantiles[(2 * i + 1) * len(quantiles) // (2 * n_now)]
            taken.append(left[quantile].pop(0))
        left = {quantile: rest for quantile, rest in left.items() if rest}
    return sorted(taken, key=_strongest_first)


def _strongest_first(window: Window) -> tuple[int, int, int]:
    return (window.quantile or 0, window.rank, window.window_id)
