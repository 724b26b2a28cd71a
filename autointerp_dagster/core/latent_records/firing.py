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
    token = _tokens_at(dataset, grid, latents, latent, context, position, activation)
    if token is None:
        raise _fault(dataset, grid, layer, latents, latent, context, position, activation)
    latent -= latents.start
    address = latent * len(dataset.tokens)
    address += token
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


def _tokens_at(
    dataset: TokenDataset,
    grid: WindowGrid,
    latents: range,
    latent: Int64[np.ndarray, " token"],
    context: Int64[np.ndarray, " token"],
    position: Int64[np.ndarray, " token"],
    activation: Float32[np.ndarray, " token"],
) -> Int64[np.ndarray, " token"] | None:
    """Where the activations stand in the dataset's tokens; null if one is not as it should be."""
    if not len(latent):
        return latent.copy()
    is_sound = (
        latents.start <= latent.min() <= latent.max() < latents.stop
        and 0 <= context.min() <= context.max() < len(dataset.offsets) - 1
        and position.min() >= grid.first_visible
        and 0 < activation.min() <= activation.max() < np.inf  # false of a NaN
    )
    if not is_sound:
        return None
    token = dataset.offsets[context]
    token += position
    return token if (token < dataset.offsets[1:][context]).all() else None


def _fault(
    dataset: TokenDataset,
    grid: WindowGrid,
    layer: LayerKey,
    latents: range,
    latent: Int64[np.ndarray, " token"],
    context: Int64[np.ndarray, " token"],
    position: Int64[np.ndarray, " token"],
    activation: Float32[np.ndarray, " token"],
) -> ValueError:
    """Says which activation is not as it should be, and how."""
    lengths = np.append(np.diff(dataset.offsets), 0)
    known = np.minimum(context, len(lengths) - 1)
    faults = {
        f"outside of the range {latents}": (latent < latents.start) | (latent >= latents.stop),
        "not a finite number above 0": ~((activation > 0) & (activation < np.inf)),
        "at a position that is not shown, or not there": (position < grid.first_visible)
        | (position >= lengths[known]),
    }
    fault, where = next((fault, where) for fault, where in faults.items() if where.any())
    at = int(np.argmax(where))
    return ValueError(
        f"{layer} latent {latent[at]}, context {context[at]}, position {position[at]}: "
        f"activation {activation[at]} is {fault}. Make the activation cache again."
    )


def active_windows(firing: FiringTokens, grid: WindowGrid) -> ActiveWindows:
    """The windows in which each latent fires at least once."""
    latent, window = firing.latent, firing.window
    is_first = np.ones(len(window), dtype=bool)
    np.not_equal(window[1:], window[:-1], out=is_first[1:])
    is_first[1:] |= latent[1:] != latent[:-1]
    first = np.flatnonzero(is_first)
    n_tokens = np.diff(first, append=len(window))
    maximum = firing.activation[first]
    several = np.flatnonzero(n_tokens > 1)
    if len(several):
        # A token more, so that the end of the last window is one of a token's places too.
        ends = np.stack([first[several], first[several] + n_tokens[several]], axis=1).reshape(-1)
        values = np.append(firing.activation, np.float32(0))
        maximum[several] = np.maximum.reduceat(values, ends)[::2]
    within = window[first]
    if len(within) and within.min() < 0:
        whole = np.flatnonzero(within >= 0)
        first, n_tokens, maximum, within = (
            column[whole] for column in (first, n_tokens, maximum, within)
        )
    split = grid.split[within].astype(np.int64)
    return ActiveWindows(latent[first], within, split, maximum, first, n_tokens)


def count_by_split(
    latent: Int64[np.ndarray, " row"], split: Int64[np.ndarray, " row"], n_latents: int
) -> Int64[np.ndarray, "latent split"]:
    """Rows of each latent in each split, split codes as in :data:`core.windows.SPLITS`."""
    n = len(SPLITS)
    return np.bincount(latent * n + split, minlength=n_latents * n).reshape(n_latents, n)
