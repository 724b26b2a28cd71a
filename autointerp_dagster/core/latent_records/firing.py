"""A range's firing tokens, sorted, and grouped into activating windows."""

from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Float32, Int, Int8, Int64, UInt16, UInt32

from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.core.windows import SPLITS, WindowGrid

_COLUMNS = ("latent", "context", "position", "activation")


class FiringTokens(NamedTuple):
    """Firing tokens by (latent, context, position)."""

    first: Int64[np.ndarray, " boundary"]
    """Those of the i-th latent of the range are ``first[i] .. first[i + 1]``."""
    latent: Int64[np.ndarray, " token"]
    """From 0 at the start of the range."""
    context: Int64[np.ndarray, " token"]
    position: UInt16[np.ndarray, " token"]
    activation: Float32[np.ndarray, " token"]
    window: Int64[np.ndarray, " token"]
    """-1 past the last whole window of a context."""

    def places(
        self, dataset: TokenDataset, rows: Int64[np.ndarray, " row"] | slice
    ) -> Int64[np.ndarray, " row"]:
        """Where some of them stand in the dataset's tokens."""
        return dataset.offsets[self.context[rows]] + self.position[rows]


class ActiveWindows(NamedTuple):
    """Activating windows by (latent, window)."""

    latent: Int64[np.ndarray, " window"]
    window: Int64[np.ndarray, " window"]
    split: Int8[np.ndarray, " window"]
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
    columns = [activations[name].to_numpy() for name in _COLUMNS]
    if not _is_sound(dataset, grid, latents, *columns):
        raise _fault(dataset, grid, layer, latents, *columns)
    latent, context = columns[0].astype(np.int64), columns[1].astype(np.int64)
    position, activation = columns[2:]
    latent -= latents.start
    address = latent * len(dataset.offsets)
    address += context
    address <<= 16
    address |= position
    if (address[1:] <= address[:-1]).any():
        order = np.argsort(address, kind="stable")
        latent, context, position = latent[order], context[order], position[order]
        activation, address = activation[order], address[order]
        twice = np.flatnonzero(address[1:] == address[:-1])
        if len(twice):
            raise ValueError(
                f"{layer} latent {latents[latent[twice[0]]]}, context {context[twice[0]]}, "
                f"position {position[twice[0]]}: two activations. Make the activation cache again."
            )
    first = np.searchsorted(latent, np.arange(len(latents) + 1))
    window = grid.window_at(context, position)
    return FiringTokens(first, latent, context, position, activation, window)


def _is_sound(
    dataset: TokenDataset,
    grid: WindowGrid,
    latents: range,
    latent: UInt32[np.ndarray, " token"],
    context: UInt32[np.ndarray, " token"],
    position: UInt16[np.ndarray, " token"],
    activation: Float32[np.ndarray, " token"],
) -> bool:
    """Whether every activation is as it should be."""
    if not len(latent):
        return True
    is_sound = (
        latents.start <= latent.min() <= latent.max() < latents.stop
        and context.max() < len(dataset.offsets) - 1
        and position.min() >= grid.first_visible
        and 0 < activation.min() <= activation.max() < np.inf  # false of a NaN
    )
    if not is_sound:
        return False
    lengths = np.diff(dataset.offsets)
    return bool(position.max() < lengths.min() or (position < lengths[context]).all())


def _fault(
    dataset: TokenDataset,
    grid: WindowGrid,
    layer: LayerKey,
    latents: range,
    latent: UInt32[np.ndarray, " token"],
    context: UInt32[np.ndarray, " token"],
    position: UInt16[np.ndarray, " token"],
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
    is_first = np.zeros(len(window), dtype=bool)
    np.not_equal(window[1:], window[:-1], out=is_first[1:])
    is_first[firing.first[:-1][np.diff(firing.first) > 0]] = True
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
    return ActiveWindows(latent[first], within, grid.split[within], maximum, first, n_tokens)


def count_by_split(
    latent: Int64[np.ndarray, " row"], split: Int[np.ndarray, " row"], n_latents: int
) -> Int64[np.ndarray, "latent split"]:
    """Rows of each latent in each split, split codes as in :data:`core.windows.SPLITS`."""
    n = len(SPLITS)
    return np.bincount(latent * n + split, minlength=n_latents * n).reshape(n_latents, n)
