"""Windows cut around the latent's peaks, instead of at multiples of their length."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64

from autointerp_dagster.core.latent_records.firing import ActiveWindows, FiringTokens
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.windows import WindowGrid


class Cuts(NamedTuple):
    """What is shown of each active window of the grid."""

    start: Int64[np.ndarray, " window"] | None
    """First position in the context; null: where the grid cuts it."""
    first: Int64[np.ndarray, " window"]
    """Its firing tokens are ``first .. first + n_tokens`` of the range's, whichever windows of the
    grid they lie in."""
    n_tokens: Int64[np.ndarray, " window"]
    maximum: Float32[np.ndarray, " window"]
    """Largest activation in it."""


def centred_windows(
    firing: FiringTokens, active: ActiveWindows, dataset: TokenDataset, grid: WindowGrid
) -> tuple[Cuts, Bool[np.ndarray, " window"]]:
    """Cut a window around the maximum of each active one.

    The maximum, or the first of equal ones, comes to stand at ``3 * window_len // 4``, or as near
    to it as the ends of the context allow.

    Args:
        firing: The range's firing tokens.
        active: The windows of the grid in which they lie.
        dataset: Knows how long the contexts are.
        grid: Of the same dataset.

    Returns:
        The cuts; and false for those in which the latent is stronger elsewhere, so that their
        maximum is not where it should be: the stronger place has a window of its own. Tokens past
        a context's last whole window have none, so what is stronger there drops no window: it is
        shown in it, behind the place of the maximum.
    """
    peak = _first_maximum(firing, active)
    context = firing.context[peak]
    length = np.diff(dataset.offsets)[context]
    position = firing.position[peak].astype(np.int64)
    start = position - 3 * grid.window_len // 4
    start = np.clip(start, 0, length - grid.window_len)
    address = firing.latent * len(dataset.tokens) + firing.places(dataset, slice(None))
    begin = address[peak] - position + start
    low = np.searchsorted(address, begin)
    high = np.searchsorted(address, begin + grid.window_len)
    ends = np.stack([low, high], axis=1).reshape(-1)
    of_windows = np.where(firing.window >= 0, firing.activation, np.float32(0))
    shown, rival = (_maxima(values, ends) for values in (firing.activation, of_windows))
    return Cuts(start, low, high - low, shown), rival == firing.activation[peak]


def _maxima(
    values: Float32[np.ndarray, " token"], ends: Int64[np.ndarray, " end"]
) -> Float32[np.ndarray, " window"]:
    """The largest value between every other end and the next one."""
    if not len(ends):
        return values[:0]
    return np.maximum.reduceat(np.append(values, np.float32(0)), ends)[::2]


def _first_maximum(firing: FiringTokens, active: ActiveWindows) -> Int64[np.ndarray, " window"]:
    """The firing token with the largest activation of each window; the first of equal ones."""
    n_tokens = active.n_tokens
    begin = np.cumsum(n_tokens) - n_tokens
    token = np.arange(n_tokens.sum()) + np.repeat(active.first - begin, n_tokens)
    if not len(token):
        return token
    is_maximum = firing.activation[token] == np.repeat(active.maximum, n_tokens)
    return np.minimum.reduceat(np.where(is_maximum, token, len(firing.latent)), begin)


def without_overlaps(
    latent: Int64[np.ndarray, " window"],
    context: Int64[np.ndarray, " window"],
    start: Int64[np.ndarray, " window"],
    strength: Int64[np.ndarray, " window"],
    window_len: int,
) -> Bool[np.ndarray, " window"]:
    """Which windows stay if the strongest is kept, then the next that overlaps no kept one, etc.

    Args:
        latent: Only windows of one latent and one context can overlap.
        context: See ``latent``; windows come by (latent, context, start).
        start: At most one for each window of the grid, whose maximum it holds: so a window overlaps
            none but the one before it and the one after it.
        strength: Rank within the latent, 0 strongest; no two alike.
        window_len: Tokens per window.

    Returns:
        Decided in rounds for all at once: whoever is stronger than both of its neighbours stays,
        and these go. So there are no more rounds than windows in a context.
    """
    same = (latent[1:] == latent[:-1]) & (context[1:] == context[:-1])
    pairs = np.flatnonzero(same & (start[1:] - start[:-1] < window_len))
    kept, undecided = np.zeros(len(latent), dtype=bool), np.ones(len(latent), dtype=bool)
    while undecided.any():
        pairs = pairs[undecided[pairs] & undecided[pairs + 1]]
        weaker = np.where(strength[pairs] < strength[pairs + 1], pairs + 1, pairs)
        winner = undecided.copy()
        winner[weaker] = False
        kept |= winner
        undecided &= ~winner
        undecided[pairs] &= ~winner[pairs + 1]
        undecided[pairs + 1] &= ~winner[pairs]
    return kept
