"""The tokens on which co-firing is counted: all of them, or those of contexts drawn at random."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Int32, Int64

from autointerp_dagster.core.rng import address_key, hash_priority
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LayerKey

_ABSENT = -(1 << 62)
_PURPOSE = "neighbours"


class Firings(NamedTuple):
    """Which latents fire on which counted tokens, ascending by (latent, token)."""

    latent: Int64[np.ndarray, " firing"]
    token: Int32[np.ndarray, " firing"]


@dataclass(frozen=True, slots=True)
class CountedTokens:
    """Some of the kept tokens of a dataset (all but BOS), numbered from 0 without gaps."""

    base: Int64[np.ndarray, " context"]
    """Number of a token of the context, less its position; hugely negative: not counted."""
    n_tokens: int
    """Tokens counted; at most ``max_tokens``, but for a first context that is longer."""

    @classmethod
    def of(
        cls, dataset: TokenDataset, layer: LayerKey, max_tokens: int, seed: int
    ) -> "CountedTokens":
        """All tokens if they are few enough, else those of whole contexts drawn at random.

        Contexts are drawn by a hash of (seed, layer, context) for as long as they fit, at least
        one, so a larger ``max_tokens`` only adds contexts. Never more than 2**31 - 1 tokens.
        """
        max_tokens = min(max_tokens, np.iinfo(np.int32).max)
        kept = np.maximum(np.diff(dataset.offsets) - dataset.first_visible, 0)
        drawn = np.arange(len(kept))
        if kept.sum() > max_tokens:
            order = np.argsort(hash_priority(address_key(seed, layer, None, _PURPOSE), drawn))
            n_fit = int(np.searchsorted(np.cumsum(kept[order]), max_tokens, side="right"))
            drawn = np.sort(order[: max(1, n_fit)])
        base = np.full(len(kept), _ABSENT, dtype=np.int64)
        base[drawn] = np.cumsum(kept[drawn]) - kept[drawn] - dataset.first_visible
        return cls(base, int(kept[drawn].sum()))

    def firings(self, frames: Iterable[pl.DataFrame]) -> Iterator[Firings]:
        """What of activations falls on counted tokens, frame by frame.

        Args:
            frames: ``schemas.ACTIVATIONS``, ascending by latent, context and position.
        """
        for frame in frames:
            context = frame["context"].to_numpy()
            token = self.base[context] + frame["position"].to_numpy()
            latent = frame["latent"].to_numpy()
            is_counted = token >= 0
            if not is_counted.all():
                latent, token = latent[is_counted], token[is_counted]
            if len(token):
                yield Firings(latent.astype(np.int64), token.astype(np.int32))
