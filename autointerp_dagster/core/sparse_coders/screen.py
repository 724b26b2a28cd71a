"""Which latents may fire, from scores that are cheap and of known error.

All kinds of coders go the same way on a CPU, token block by token block:

1. Score all latents with one matrix product, in bfloat16 or float32 (:class:`Screen`).
2. Bound how far a score may be from the activation, for each row of the input.
3. Keep as candidates all latents that the bound does not rule out.
4. Compute the products of the candidates alone, in float32 (:func:`exact`), and choose by these.

What is chosen therefore depends on the row and the coder alone: not on the arithmetic of the
screen, not on the blocks, not on the other rows.

The bound is as wide as the largest weights of all latents make it. A few that are much larger than
the rest are therefore left out of it, and of the scores: they are candidates always.
"""

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from autointerp_dagster.core.sparse_coders.rule import Rule
from autointerp_dagster.core.sparse_coders.scores import (
    Bound,
    as_float,
    at_least,
    cut_of,
    largest_of,
)

_UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
_LARGEST_SCORE = 2.0**126
"""Above it a sum may overflow on its way."""
_TINY = 2.0**-100
"""More than what flushing subnormal products to zero can take off a score."""
_MAX_LOUD = 32
"""Latents that may be candidates always."""
_LOUD = 4.0
"""Times the weights of the largest of the others."""


class Linear(NamedTuple):
    """Pre-activations are ``weight @ x + bias``."""

    weight: Float32[Tensor, "num_latents d_in"]
    bias: Float32[Tensor, " num_latents"]


class Pairs(NamedTuple):
    """Some pairs of a row and a latent, ordered by row."""

    row: Int64[np.ndarray, " pair"]
    latent: Int64[np.ndarray, " pair"]


class Screened(NamedTuple):
    """What a screen leaves of a block of rows."""

    candidates: Pairs
    """Of the rows that it could judge."""
    undecided: Int64[np.ndarray, " row"]
    """Rows that need a sharper screen, ascending."""


class _Stretch(NamedTuple):
    """Consecutive latents: some whole groups that are scored at once, or one that may take more."""

    latents: range
    n_groups: int
    width: int
    """Latents that are scored at once."""


class _Tally:
    """How many candidates each row has; rows with too many are given up."""

    def __init__(self, n_found: int, is_over: Bool[np.ndarray, " row"], most: int) -> None:
        self._n_found = np.full(len(is_over), n_found)
        self.is_over, self._most = is_over, most

    def add(self, n_found: Int64[np.ndarray, " row"]) -> bool:
        """Whether a row is given up with these."""
        self._n_found += n_found
        is_over = self._n_found > self._most
        self.is_over |= is_over
        return bool(is_over.any())


class Screen:
    """Scores of all latents in one type of float, with the bound on their error."""

    def __init__(self, linear: Linear, rule: Rule, dtype: torch.dtype) -> None:
        """Convert the weights once.

        Args:
            linear: The encoder; a copy in bfloat16 takes half as much memory again.
            rule: Which latents fire; scores are of what is above the threshold.
            dtype: bfloat16 or float32.
        """
        weight, bias = linear
        threshold, self._k, self._n_groups = rule.threshold, rule.k, rule.n_groups
        above = bias if threshold is None else bias - threshold
        self._weight, self._bias = weight.to(dtype), above.to(dtype)
        self._dtype = dtype
        norms, sizes = _row_norms(weight), bias.abs().double()
        if threshold is not None:
            sizes += threshold
        self._loud = _loud(norms, sizes.numpy())
        self._loud_norm = float(norms[self._loud].max(initial=0.0))
        is_quiet = np.ones(len(norms), dtype=bool)
        is_quiet[self._loud] = False
        self._norm = float(norms[is_quiet].max())
        self._rounding = 0.0
        if self._is_rounded:
            self._rounding = float(_row_norms(weight, self._weight)[is_quiet].max())
        quiet = torch.from_numpy(is_quiet)
        self._bias_size = float(sizes[quiet].max())
        self._bias_rounding = float((above - self._bias.float()).abs()[quiet].max())
        is_flushed = (above != 0) & (above.abs() < _TINY) & quiet
        self._bias_flushing = _TINY if bool(is_flushed.any()) else 0.0
        self._adds_bias = bool(self._bias[quiet].any())
        is_unscored = ~quiet | (torch.from_numpy(norms == 0) & (above <= 0))
        self._bias = self._bias.masked_fill(is_unscored, -torch.inf)
        self._has_bias = bool(self._bias.any())

    @property
    def _is_rounded(self) -> bool:
        return self._dtype != torch.float32

    @property
    def num_latents(self) -> int:
        """Number of latents."""
        return self._weight.shape[0]

    def candidates(
        self, x: Float32[Tensor, "row d_in"], latent_block: int, most: int | None
    ) -> Screened:
        """The latents whose activation may be above zero and, with ``k``, among the k largest.

        No latent is ruled out wrongly: for the k largest of a group, let ``t`` be at most the k-th
        largest score and ``e`` the bound of the error. k activations are then at least ``t - e``,
        so a latent with a score below ``t - 2 e`` is not among the k largest.

        Args:
            x: Rows as the encoder takes them.
            latent_block: Latents that are scored at once, >= k.
            most: Candidates of a row above which it is left undecided; null: any number.
        """
        rounded = x.to(self._dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # such rows are not judged
            bound = self._bound(x, rounded)
        most = self.num_latents if most is None else most
        tally = _Tally(self._loud.size, ~bound.is_sound, most)
        found = [self._always(len(x))] if self._loud.size else []
        stretches = self._stretches(latent_block)
        room = torch.empty((len(x), stretches[0].width), dtype=self._dtype)
        for stretch in stretches:
            if tally.is_over.all():
                break
            found.append(self._within(stretch, rounded, bound, tally, room))
        pairs = _in_order(found)
        keep = ~tally.is_over[pairs.row]
        return Screened(Pairs(pairs.row[keep], pairs.latent[keep]), np.flatnonzero(tally.is_over))

    def _always(self, n_rows: int) -> Pairs:
        row = np.repeat(np.arange(n_rows), self._loud.size)
        return Pairs(row, np.tile(self._loud, n_rows))

    def _stretches(self, latent_block: int) -> list[_Stretch]:
        """All latents, in parts that choose for themselves."""
        num_latents, n_groups = self.num_latents, self._n_groups
        size = num_latents // n_groups
        at_once = latent_block // size if n_groups > 1 else 0
        if at_once < 2:
            width = min(latent_block, size)
            starts = range(0, num_latents, size)
            return [_Stretch(range(start, start + size), 1, width) for start in starts]
        stretches = []
        for start in range(0, num_latents, at_once * size):
            latents = range(start, min(start + at_once * size, num_latents))
            stretches.append(_Stretch(latents, len(latents) // size, len(latents)))
        return stretches

    def _within(
        self,
        stretch: _Stretch,
        x: Float[Tensor, "row d_in"],
        bound: Bound,
        tally: _Tally,
        room: Float[Tensor, "row latent"],
    ) -> Pairs:
        """The candidates of a stretch; rows that have too many are given up.

        A line is one group of one row.
        """
        n_rows, n_groups = len(x), stretch.n_groups
        bound = bound._replace(absolute=np.repeat(bound.absolute, n_groups))
        bound = bound._replace(is_sound=np.repeat(bound.is_sound, n_groups))
        best: np.ndarray | None = None
        found: list[tuple[Pairs, np.ndarray]] = []
        cut = cut_of(np.zeros(n_rows * n_groups), bound)
        for start, bits in self._scores(x, stretch, room):
            bits = bits.reshape(n_rows * n_groups, -1)
            if self._k is not None:
                best = largest_of(bits, best, self._k)
                cut = cut_of(np.maximum(as_float(best.min(axis=1)), 0.0), bound)
            # So that memory holds no more of a row that is given up.
            cut[np.repeat(tally.is_over, n_groups)] = np.inf
            flat = at_least(bits, cut)
            ends = np.searchsorted(flat, np.arange(n_rows + 1) * bits.shape[1] * n_groups)
            if tally.add(np.diff(ends)):
                flat = flat[np.repeat(~tally.is_over, np.diff(ends))]
            line, latent = np.divmod(flat, bits.shape[1])
            row, value = line, bits[line, latent]
            if n_groups > 1:
                row, group = np.divmod(line, n_groups)
                latent += group * bits.shape[1]
            found.append((Pairs(row, latent + start), value))
            if tally.is_over.all():
                break
        return _joined(found, cut)

    def _scores(
        self, x: Float[Tensor, "row d_in"], stretch: _Stretch, room: Float[Tensor, "row latent"]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The first latent of each block, and its scores as integers of the same bits."""
        as_int = torch.int16 if self._is_rounded else torch.int32
        for start in stretch.latents[:: stretch.width]:
            block = slice(start, min(start + stretch.width, stretch.latents.stop))
            weight = self._weight[block]
            out = room if len(weight) == room.shape[1] else None
            if self._has_bias:
                scores = torch.addmm(self._bias[block], x, weight.T, out=out)
            else:
                scores = torch.mm(x, weight.T, out=out)
            yield start, scores.view(as_int).numpy()

    def _bound(self, x: Float32[Tensor, "row d_in"], rounded: Float[Tensor, "row d_in"]) -> Bound:
        """How far a score may be from the activation that :func:`exact` gives.

        With ``x~``, ``w~``, ``b~`` the rounded row, weights and bias,
        ``w.x - w~.x~ = w.(x - x~) + (w - w~).x~``, and by Cauchy-Schwarz it is at most
        ``|w| |x - x~| + |w - w~| |x~|``: the norms of the row are its own, those of the weights
        the largest of all latents that are scored. Both sums are rounded in float32 as they are
        added up, in any order: at most ``n u / (1 - n u)`` of ``|w| |x| + |b|``. The score is
        rounded once more when it is stored, relative to itself, and once before the bias is added.
        This holds for ``torch.set_float32_matmul_precision("highest")``, the default.

        Source: Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 3.1.
        """
        terms = 2 * (x.shape[1] + 4)
        summing = terms * 2.0**-24 / (1 - terms * 2.0**-24)
        size, rounding = _norms(x), np.zeros(len(x))
        norm = self._norm + self._rounding
        if self._is_rounded:
            rounding = _norms(x - rounded.float())
        total = norm * (size + rounding) + self._bias_size + self._bias_rounding
        absolute = self._norm * rounding + self._rounding * (size + rounding)
        absolute += self._bias_rounding + 2 * summing * total + _TINY * (1 + norm + size)
        relative = 0.0
        if self._is_rounded:
            unit = _UNIT_ROUNDOFF[self._dtype]
            relative = 1.01 * unit
            if self._adds_bias:
                relative, absolute = 2.02 * unit, absolute + 1.01 * unit * self._bias_size
        of_bias = self._bias_rounding + self._bias_flushing
        absolute = np.where(size > 0, absolute, of_bias)  # a score of a zero row is the bias
        largest = np.maximum(total, self._loud_norm * size)
        is_sound = largest < _LARGEST_SCORE  # false for NaN too
        return Bound(np.where(is_sound, 1.001 * absolute, 0.0), relative, is_sound)


def exact(
    weight: Float32[Tensor, "num_latents d_in"], x: Float32[Tensor, "row d_in"], pairs: Pairs
) -> Float32[Tensor, " pair"]:
    """Products of some pairs, each a float32 sum in an order of its own.

    The value of a pair depends on its row and its latent alone, not on what else is asked for.

    Args:
        weight: The encoder's.
        x: Rows as the encoder takes them.
        pairs: Ordered by row.
    """
    if pairs.row.size == 0:
        return torch.empty(0)
    ends = np.cumsum(np.bincount(pairs.row, minlength=len(x)))
    latent = torch.from_numpy(pairs.latent)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        places = torch.sparse_csr_tensor(
            torch.from_numpy(np.concatenate([[0], ends])),
            latent,
            torch.zeros(len(latent)),
            size=(len(x), len(weight)),
            check_invariants=False,
        )
    return torch.sparse.sampled_addmm(places, x, weight.T, beta=0.0).values()


def _loud(
    norms: Float64[np.ndarray, " num_latents"], sizes: Float64[np.ndarray, " num_latents"]
) -> Int64[np.ndarray, " loud"]:
    """The few latents, if any, with weights or biases far larger than those of all others.

    Args:
        norms: Of the weights.
        sizes: Of bias and threshold; small ones do not matter beside weights.
    """
    n = min(_MAX_LOUD, len(norms) - 1)
    norm, size = (np.partition(of, len(of) - 1 - n)[len(of) - 1 - n] for of in (norms, sizes))
    is_loud = (norms > _LOUD * norm) | (sizes > _LOUD * max(norm, size))
    return np.flatnonzero(is_loud & ~is_loud.all())  # of a few latents all may be: then none is


def _row_norms(
    rows: Float32[Tensor, "row d_in"], rounded: Float[Tensor, "row d_in"] | None = None
) -> Float64[np.ndarray, " row"]:
    """Norms of rows, or of what rounding them took off; in parts, to save memory."""
    parts = rows.split(4096)
    if rounded is not None:
        parts = (part - near.float() for part, near in zip(parts, rounded.split(4096), strict=True))
    return np.concatenate([_norms(part) for part in parts])


def _norms(rows: Float32[Tensor, "row d_in"]) -> Float64[np.ndarray, " row"]:
    """Rounded up; in float64, because squares of float32 overflow and vanish."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).numpy() * (1 + 1e-9)


def _joined(found: list[tuple[Pairs, np.ndarray]], cut: Float32[np.ndarray, " row"]) -> Pairs:
    """The candidates of all blocks of latents, less those that a later block has ruled out."""
    if len(found) == 1:
        return found[0][0]
    row, latent, bits = (
        np.concatenate(parts)
        for parts in zip(*((p.row, p.latent, bits) for p, bits in found), strict=True)
    )
    order = np.argsort(row, kind="stable")
    keep = order[(as_float(bits) >= cut[row])[order]]
    return Pairs(row[keep], latent[keep])


def _in_order(found: list[Pairs]) -> Pairs:
    """Pairs of several stretches, ordered by row."""
    if not found:
        return Pairs(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    if len(found) == 1:
        return found[0]
    row, latent = (np.concatenate(of) for of in zip(*found, strict=True))
    order = np.argsort(row, kind="stable")
    return Pairs(row[order], latent[order])
