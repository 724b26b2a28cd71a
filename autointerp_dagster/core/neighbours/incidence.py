"""Which latents fire on each counted token, in memory: 2 bytes per non-zero.

Tokens are grouped by how many latents fire on them, that number rounded up to one of few sizes, so
that a group is a plain matrix and reading a token is copying a row; what a row lacks is padded.
A TopK coder has one group for nearly all of its tokens.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Int32, Int64, UInt

from autointerp_dagster.core.neighbours.counted import CountedTokens, Firings

_PER_OCTAVE = 4
"""Sizes of groups between a power of two and the next; a row is padded by at most a quarter."""


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """Tokens on which about as many latents fire."""

    first_row: int
    """Row of :attr:`Incidence.row` of the group's first token."""
    latents: UInt[np.ndarray, "token slot"]
    """Ascending within a token, then the padding ``n_latents``."""


@dataclass(frozen=True, slots=True)
class Incidence:
    """The latents of a whole layer, by token."""

    n_latents: int
    """Width of the coder."""
    n_firing: Int64[np.ndarray, " latent"]
    """Counted tokens on which each latent fires."""
    row: Int32[np.ndarray, " token"]
    """Where each counted token is, in the order of the groups."""
    groups: tuple[TokenGroup, ...]
    """By ascending number of slots; all tokens, also those on which nothing fires."""

    @classmethod
    def of(
        cls,
        frames: Callable[[], Iterable[pl.DataFrame]],
        n_latents: int,
        counted: CountedTokens,
    ) -> "Incidence":
        """Read the activations of a layer, twice: to count, and to fill in.

        Args:
            frames: Starts a pass over ``schemas.ACTIVATIONS`` of all latents in order; a frame
                may end inside a latent.
            n_latents: Width of the coder.
            counted: The tokens to take.
        """
        per_token = np.zeros(counted.n_tokens, dtype=np.int32)
        n_firing = np.zeros(n_latents, dtype=np.int64)
        for latent, token in counted.firings(frames()):
            np.add.at(per_token, token, np.int32(1))
            n_firing += np.bincount(latent, minlength=n_latents)
        sizes = _sizes(int(per_token.max(initial=0)))
        layout = _layout(sizes[np.searchsorted(sizes, per_token)])
        dtype = np.uint16 if n_latents <= np.iinfo(np.uint16).max else np.uint32
        slots = np.full(layout.n_slots, n_latents, dtype=dtype)
        _fill(slots, layout.start, counted.firings(frames()))
        return cls(n_latents, n_firing, layout.row, tuple(_groups(slots, layout)))

    @property
    def pairs_per_firing(self) -> float:
        """Latents on the same token as a firing, on average over all firings, with the padding."""
        n_pairs = sum(group.latents.size * group.latents.shape[1] for group in self.groups)
        return n_pairs / max(1, int(self.n_firing.sum()))

    def beside(
        self,
        token: Int32[np.ndarray, " firing"],
        label: Int64[np.ndarray, " firing"],
        max_pairs: int,
    ) -> Iterator[Int64[np.ndarray, " pair"]]:
        """``label + g`` for every latent ``g`` (or padding) of every token, in parts.

        Args:
            token: Numbers of counted tokens.
            label: One per token.
            max_pairs: Per part; but one token is never divided.
        """
        row = self.row[token]
        group_of = np.searchsorted([group.first_row for group in self.groups], row, "right") - 1
        sizes = np.array([group.latents.shape[1] for group in self.groups])
        total = np.cumsum(sizes[group_of])
        begin, done = 0, 0
        while begin < len(row):
            end = max(begin + 1, int(np.searchsorted(total, done + max_pairs, side="right")))
            part = slice(begin, end)
            n_pairs = int(total[end - 1]) - done
            yield self._beside(row[part], group_of[part], label[part], n_pairs)
            begin, done = end, done + n_pairs

    def _beside(
        self,
        row: Int32[np.ndarray, " firing"],
        group_of: Int64[np.ndarray, " firing"],
        label: Int64[np.ndarray, " firing"],
        n_pairs: int,
    ) -> Int64[np.ndarray, " pair"]:
        pairs = np.empty(n_pairs, dtype=np.int64)
        begin = 0
        for number in np.flatnonzero(np.bincount(group_of)):
            first_row, latents = self.groups[number].first_row, self.groups[number].latents
            mine = np.flatnonzero(group_of == number)
            found = latents.take(row[mine] - first_row, axis=0)
            end = begin + found.size
            np.add(found, label[mine, None], out=pairs[begin:end].reshape(found.shape))
            begin = end
        return pairs


def _sizes(largest: int) -> Int64[np.ndarray, " size"]:
    """0, 1, 2, ... in steps of about a quarter, up to the first that holds ``largest``."""
    sizes = [0]
    while sizes[-1] < largest:
        octave = max(sizes[-1], 1).bit_length() - 1
        sizes.append(sizes[-1] + max(1, (1 << octave) // _PER_OCTAVE))
    return np.array(sizes, dtype=np.int64)


class _Layout(NamedTuple):
    """Where the slots of each token are: tokens by ascending number of slots."""

    row: Int32[np.ndarray, " token"]
    start: Int64[np.ndarray, " token"]
    """First slot of each token."""
    sizes: Int64[np.ndarray, " group"]
    n_tokens: Int64[np.ndarray, " group"]

    @property
    def n_slots(self) -> int:
        return int(self.sizes @ self.n_tokens)


def _layout(n_slots: Int64[np.ndarray, " token"]) -> _Layout:
    order = np.argsort(n_slots.astype(np.uint32), kind="stable")
    in_order = n_slots[order]
    start = np.empty(len(order), dtype=np.int64)
    start[order] = np.cumsum(in_order) - in_order
    row = np.empty(len(order), dtype=np.int32)
    row[order] = np.arange(len(order), dtype=np.int32)
    return _Layout(row, start, *np.unique(in_order, return_counts=True))


def _fill(
    slots: UInt[np.ndarray, " slot"],
    start: Int64[np.ndarray, " token"],
    firings: Iterable[Firings],
) -> None:
    """Write every latent into the next free slot of its tokens; ``start`` is used up.

    Within one latent no token repeats, so a whole latent is written at once.
    """
    for latent, token in firings:
        bounds = np.concatenate([[0], np.flatnonzero(np.diff(latent)) + 1, [len(latent)]])
        for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            mine = token[begin:end]
            place = start[mine]
            slots[place] = latent[begin]
            start[mine] = place + 1


def _groups(slots: UInt[np.ndarray, " slot"], layout: _Layout) -> Iterator[TokenGroup]:
    first_row = first_slot = 0
    for size, n in zip(layout.sizes.tolist(), layout.n_tokens.tolist(), strict=True):
        part = slots[first_slot : first_slot + n * size]
        yield TokenGroup(first_row, part.reshape(n, size))
        first_row, first_slot = first_row + n, first_slot + n * size
