"""What each window of the grid shows, and in which windows each token is shown."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

from autointerp_dagster.core.negatives.permuting import counts_up
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.windows import SPLITS, WindowGrid


@dataclass(frozen=True, slots=True)
class ShownTokens:
    """The visible tokens of each window: ``dataset.tokens[first:stop]``, without BOS."""

    first: Int64[np.ndarray, " window"]
    stop: Int64[np.ndarray, " window"]


@dataclass(frozen=True, slots=True)
class TokenWindows:
    """For each token and split, the windows that show it: 4 bytes per token of the corpus."""

    first: Int64[np.ndarray, " boundary"]
    """Windows of ``group = token * len(SPLITS) + split`` are ``first[group] .. first[group + 1]``
    of ``window``."""
    window: Int32[np.ndarray, " entry"]
    """Index into the grid; ascending within a group, each once."""

    def bounds(
        self, token: Int64[np.ndarray, " asked"], split: int
    ) -> tuple[Int64[np.ndarray, " asked"], Int64[np.ndarray, " asked"]]:
        """Where the windows of a split that show each token begin and end in ``window``.

        A token that the corpus does not show has none. -1 is no token.
        """
        group = token * len(SPLITS) + split
        is_known = (token >= 0) & (group < len(self.first) - 1)
        group = np.where(is_known, group, 0)
        return np.where(is_known, self.first[group], 0), np.where(
            is_known, self.first[np.minimum(group + 1, len(self.first) - 1)], 0
        )


def shown_tokens(
    dataset: TokenDataset,
    context: Int64[np.ndarray, " window"],
    start: Int64[np.ndarray, " window"],
    window_len: int,
) -> ShownTokens:
    """Where the tokens stand that a reader of each window sees.

    Args:
        dataset: The corpus.
        context: Of each window.
        start: First position of each in its context.
        window_len: Whole windows only.
    """
    at = dataset.offsets[context]
    return ShownTokens(at + np.maximum(start, dataset.first_visible), at + start + window_len)


def token_windows(dataset: TokenDataset, grid: WindowGrid) -> TokenWindows:
    """The inverted index of a corpus, from one sort of its visible tokens."""
    shown = shown_tokens(dataset, grid.context, grid.start, grid.window_len)
    n_shown = shown.stop - shown.first
    at = np.repeat(shown.first, n_shown) + counts_up(n_shown)
    window = np.repeat(np.arange(grid.n_windows), n_shown)
    n_windows = max(1, grid.n_windows)
    key = dataset.tokens[at].astype(np.int64) * len(SPLITS) + grid.split[window]
    key = key * n_windows + window
    key.sort()
    key = key[np.append(True, key[1:] != key[:-1])[: len(key)]]
    group, window = np.divmod(key, n_windows)
    first = np.append(0, np.cumsum(np.bincount(group)))
    return TokenWindows(first.astype(np.int64), window.astype(np.int32))
