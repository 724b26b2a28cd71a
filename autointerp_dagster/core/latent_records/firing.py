"""A range's firing tokens, sorted, and grouped into activating windows."""

from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Float32, Int64

from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.core.windows import SPLITS, WindowGrid


class FiringTokens(NamedTuple):
    """Firing tokens by (latent, context, position)."""

    latent: Int64[np.ndarray, " token"]
    """From 0 at the start of the range."""
    context: Int64[np.ndarray, " token"]
    position: Int64[np.ndarray, " token"]
    token: Int64[np.ndarray, " token"]
    """Where it stands in the dataset's tokens."""
    activation: Float32[np.ndarray, " token"]
    window: Int64[np.ndarray, " token"]
    """-1 past the last whole window of a context."""


class ActiveWindows(NamedTuple):
    """Activating windows by (latent, window)."""

    latent: Int64[np.ndarray, " window"]
    window: Int64[np.ndarray, " window"]
    split: Int64[np.ndarray, " window"]
    maximum: Float32[np.ndarray, " window"]
    first: Int64[np.ndarray, " window"]
    """Its firing tokens are ``first .. first + n_tokens`` of the range's."""
    n_tokens: Int64[np.ndarray, " window"]


def firing_tokens(
    activations: pl.DataFrame,
    dataset: TokenDataset,
    grid: WindowGrid,
    layer: LayerKey,
    latents: range,
) -> FiringTokens:
    """The rows of ``schemas.ACTIVATIONS``, checked and sorted.

    Raises:
        ValueError: As :func:`latent_records_of`.
    """
    latent, context, position = (
        activations[name].to_numpy().astype(np.int64) for name in ("latent", "context", "position")
    )
    activation = activations["activation"].to_numpy()
    lengths = np.append(np.diff(dataset.offsets), 0)
    known = np.minimum(context, len(lengths) - 1)
    faults = {
        f"outside of the range {latents}": (latent < latents.start) | (latent >= latents.stop),
        "not a finite number above 0": ~((activation > 0) & (activation < np.inf)),
        "at a position that is not shown, or not there": (position < grid.first_visible)
        | (position >= lengths[known]),
    }
    for fault, where in faults.items():
        if where.any():
            at = int(np.argmax(where))
            raise ValueError(
                f"{layer} latent {latent[at]}, context {context[at]}, position {position[at]}: "
                f"activation {activation[at]} is {fault}. Make the activation cache again."
            )
    latent = latent - latents.start
    token = dataset.offsets[context] + position
    address = latent * len(dataset.tokens) + token
    if (address[1:] <= address[:-1]).any():
        order = np.argsort(address, kind="stable")
        latent, context, position = latent[order], context[order], position[order]
        activation, token, address = activation[order], token[order], address[order]
        twice = np.flatnonzero(address[1:] == address[:-1])
        if len(twice):
            raise ValueError(
                f"{layer} latent {latents[latent[twice[0]]]}, context {context[twice[0]]}, "
                f"position {position[twice[0]]}: two activations. Make the activation cache again."
            )
    window = grid.window_at(context, position)
    return FiringTokens(latent, context, position, token, activation, window)


def active_windows(firing: FiringTokens, grid: WindowGrid) -> ActiveWindows:
    """The windows in which each latent fires at least once."""
    latent, window = firing.latent, firing.window
    changes = (window[1:] != window[:-1]) | (latent[1:] != latent[:-1])
    first = np.flatnonzero(np.append(np.ones(min(1, len(window)), dtype=bool), changes))
    n_tokens = np.diff(np.append(first, len(window)))
    maximum = np.maximum.reduceat(firing.activation, first) if len(first) else firing.activation
    whole = window[first] >= 0
    first, n_tokens, maximum = first[whole], n_tokens[whole], maximum[whole]
    split = grid.split[window[first]].astype(np.int64)
    return ActiveWindows(latent[first], window[first], split, maximum, first, n_tokens)


def count_by_split(
    latent: Int64[np.ndarray, " row"], split: Int64[np.ndarray, " row"], n_latents: int
) -> Int64[np.ndarray, "latent split"]:
    """Rows of each latent in each split, split codes as in :data:`core.windows.SPLITS`."""
    n = len(SPLITS)
    return np.bincount(latent * n + split, minlength=n_latents * n).reshape(n_latents, n)
