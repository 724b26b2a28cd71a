"""Which latents may fire, from scores that are cheap and of known error.

Both of a CPU's coders go the same way, token block by token block:

1. Score all latents with one matrix product, in bfloat16 or float32 (:class:`Screen`).
2. Bound how far a score may be from the activation, for each row of the input.
3. Keep as candidates all latents that the bound does not rule out.
4. Compute the activations of the candidates alone, in float32 (:func:`exact`), and choose by these.

What is chosen therefore depends on the row and the coder alone: not on the arithmetic of the
screen, not on the blocks, not on the other rows.
"""

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

_UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
_LARGEST_SCORE = 2.0**126
"""Above it a sum may overflow on its way."""
_TINY = 2.0**-100
"""More than what flushing subnormal products to zero can take off a score."""
_SMALLEST = np.nextafter(np.float32(0), np.float32(1))
_GROUPS = 512
"""Maxima of groups of latents in which the k-th largest score is looked for, at least."""


class Linear(NamedTuple):
    """Pre-activations are ``weight @ (x - centre) + bias``."""

    weight: Float[Tensor, "num_latents d_in"]
    bias: Float32[Tensor, " num_latents"]
    centre: Float32[Tensor, " d_in"]


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


class _Bound(NamedTuple):
    """``|score - activation| <= absolute + relative * |score|``."""

    absolute: Float64[np.ndarray, " row"]
    relative: float
    is_sound: Bool[np.ndarray, " row"]
    """Where no score can overflow; elsewhere the bound says nothing."""


class Screen:
    """Scores of all latents in one type of float, with the bound on their error."""

    def __init__(
        self,
        linear: Linear,
        threshold: Float32[Tensor, " num_latents"] | None,
        dtype: torch.dtype,
    ) -> None:
        """Convert the weights once.

        Args:
            linear: The encoder; a copy in bfloat16 takes half as much memory again.
            threshold: What an activation must exceed; null: 0. Scores are of what is above it.
            dtype: bfloat16 or float32.
        """
        weight, bias, _ = linear
        above = bias if threshold is None else bias - threshold
        self._weight, self._bias = weight.to(dtype), above.to(dtype)
        self._dtype = dtype
        norms = _row_norms(weight)
        self._norm = float(norms.max())
        self._rounding = 0.0
        if self._is_rounded:
            self._rounding = float(_row_norms(weight, self._weight).max())
        self._bias_size = float(bias.abs().max())
        if threshold is not None:
            self._bias_size += float(threshold.max())
        self._bias_rounding = float((above - self._bias.float()).abs().max())
        is_flushed = (above != 0) & (above.abs() < _TINY)
        self._bias_flushing = _TINY if bool(is_flushed.any()) else 0.0
        never_fires = torch.from_numpy(norms == 0) & (above <= 0)
        self._bias = self._bias.masked_fill(never_fires, -torch.inf)
        self._has_bias = bool(self._bias.any())

    @property
    def _is_rounded(self) -> bool:
        return self._dtype != torch.float32

    @property
    def num_latents(self) -> int:
        """Number of latents."""
        return self._weight.shape[0]

    def candidates(
        self, x: Float32[Tensor, "row d_in"], k: int | None, latent_block: int, most: int | None
    ) -> Screened:
        """The latents whose activation may be above zero and, with ``k``, among the k largest.

        No latent is ruled out wrongly: for the k largest, let ``t`` be at most the k-th largest
        score and ``e`` the bound of the error. k activations are then at least ``t - e``, so a
        latent with a score below ``t - 2 e`` is not among the k largest.

        Args:
            x: Rows with the coder's centre already taken off.
            k: Latents that may fire at once; null: any number.
            latent_block: Latents that are scored at once, >= k.
            most: Candidates of a row above which it is left undecided; null: any number.
        """
        rounded = x.to(self._dtype)
        bound = self._bound(x, rounded)
        most = self.num_latents if most is None else most
        is_over = ~bound.is_sound
        best: np.ndarray | None = None
        found: list[tuple[Pairs, np.ndarray]] = []
        n_found = np.zeros(len(x), dtype=np.int64)
        cut = _cut(np.zeros(len(x)), bound)
        for start, bits in self._scores(rounded, latent_block):
            if k is not None:
                best = _largest(bits, best, k)
                cut = _cut(np.maximum(_as_float(best.min(axis=1)), 0.0), bound)
            cut[is_over] = np.inf  # so that memory holds no more of a row that is given up
            flat = _at_least(bits, cut)
            ends = np.searchsorted(flat, np.arange(len(x) + 1) * bits.shape[1])
            n_found += np.diff(ends)
            if (n_found > most).any():
                is_over |= n_found > most
                flat = flat[np.repeat(~is_over, np.diff(ends))]
            row, latent = np.divmod(flat, bits.shape[1])
            found.append((Pairs(row, latent + start), bits[row, latent]))
            if is_over.all():
                break
        pairs = _joined(found, cut)
        keep = ~is_over[pairs.row]
        return Screened(Pairs(pairs.row[keep], pairs.latent[keep]), np.flatnonzero(is_over))

    def _scores(
        self, x: Float[Tensor, "row d_in"], latent_block: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The first latent of each block, and its scores as integers of the same bits."""
        as_int = torch.int16 if self._is_rounded else torch.int32
        width = min(latent_block, self.num_latents)
        room = torch.empty((len(x), width), dtype=self._dtype)
        for start in range(0, self.num_latents, width):
            weight = self._weight[start : start + width]
            out = room if len(weight) == width else None
            if self._has_bias:
                scores = torch.addmm(self._bias[start : start + width], x, weight.T, out=out)
            else:
                scores = torch.mm(x, weight.T, out=out)
            yield start, scores.view(as_int).numpy()

    def _bound(self, x: Float32[Tensor, "row d_in"], rounded: Float[Tensor, "row d_in"]) -> _Bound:
        """How far a score may be from the activation that :func:`exact` gives.

        With ``x~``, ``w~``, ``b~`` the rounded row, weights and bias,
        ``w.x - w~.x~ = w.(x - x~) + (w - w~).x~``, and by Cauchy-Schwarz it is at most
        ``|w| |x - x~| + |w - w~| |x~|``: the norms of the row are its own, those of the weights
        the largest of all latents. Both sums are rounded in float32 as they are added up, in any
        order: at most ``n u / (1 - n u)`` of ``|w| |x| + |b|``. The score is rounded once more
        when it is stored, relative to itself, and once before the bias is added. This holds for
        ``torch.set_float32_matmul_precision("highest")``, the default.

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
            if self._has_bias:
                relative, absolute = 2.02 * unit, absolute + 1.01 * unit * self._bias_size
        of_bias = self._bias_rounding + self._bias_flushing
        absolute = np.where(size > 0, absolute, of_bias)  # a score of a zero row is the bias
        is_sound = total < _LARGEST_SCORE  # false for NaN too
        return _Bound(np.where(is_sound, 1.001 * absolute, 0.0), relative, is_sound)


def exact(
    linear: Linear, x: Float32[Tensor, "row d_in"], pairs: Pairs
) -> Float32[np.ndarray, " pair"]:
    """Pre-activations of some pairs, each a float32 sum in an order of its own.

    The value of a pair depends on its row and its latent alone, not on what else is asked for.

    Args:
        linear: The coder's.
        x: Rows with the centre already taken off.
        pairs: Ordered by row.
    """
    if pairs.row.size == 0:
        return np.empty(0, dtype=np.float32)
    ends = np.cumsum(np.bincount(pairs.row, minlength=len(x)))
    latent = torch.from_numpy(pairs.latent)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        places = torch.sparse_csr_tensor(
            torch.from_numpy(np.concatenate([[0], ends])),
            latent,
            torch.zeros(len(latent)),
            size=(len(x), len(linear.weight)),
            check_invariants=False,
        )
    products = torch.sparse.sampled_addmm(places, x, linear.weight.T, beta=0.0).values()
    return (products + linear.bias[latent]).numpy()


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


def _cut(kth: Float64[np.ndarray, " row"], bound: _Bound) -> Float32[np.ndarray, " row"]:
    """The smallest score of a candidate; infinite where the bound says nothing.

    Args:
        kth: At most the k-th largest score, >= 0; 0 where it is not known.
        bound: Of the scores.
    """
    absolute, relative, is_sound = bound
    kth = np.where(is_sound, kth, 0.0)
    needed = np.maximum(kth * (1 - relative) - absolute, 0.0) - absolute
    cut = np.where(needed > 0, needed / (1 + relative), needed / (1 - relative))
    lowered = np.nextafter(cut.astype(np.float32), np.float32(-np.inf))
    lowered = np.where(absolute > 0, lowered, np.maximum(lowered, _SMALLEST))
    return np.where(is_sound, lowered, np.float32(np.inf))


def _largest(bits: np.ndarray, best: np.ndarray | None, k: int) -> np.ndarray:
    """Scores of k latents of each row, about the largest.

    Maxima of groups of latents: the k-th largest maximum is at most the k-th largest score, and
    rarely less, because k is small against the number of groups. Integers order as the floats of
    the same bits where they are positive; what is not positive counts as nothing.
    """
    n_groups = max(_GROUPS, 8 * k)
    size = bits.shape[1] // n_groups
    if size > 1:
        bits = bits[:, : size * n_groups].reshape(len(bits), size, n_groups).max(axis=1)
    if best is not None:
        bits = np.concatenate([best, bits], axis=1)
    if bits.shape[1] <= k:
        return np.pad(bits, ((0, 0), (0, k - bits.shape[1])))
    return np.partition(bits, bits.shape[1] - k, axis=1)[:, -k:]


def _at_least(bits: np.ndarray, cut: Float32[np.ndarray, " row"]) -> Int64[np.ndarray, " flat"]:
    """Flat indices of the scores that are not below the cut of their row, ascending.

    As unsigned integers the bits of floats count up from 0 to infinity, then, with the sign bit,
    from -0 to minus infinity: so what is at least a positive cut is one stretch, and what is at
    least a negative cut is another.
    """
    unsigned = np.uint16 if bits.dtype == np.int16 else np.uint32
    sign = 1 << (8 * bits.dtype.itemsize - 1)
    shift = 32 - 8 * bits.dtype.itemsize
    pattern = cut.view(np.uint32)
    is_negative = np.signbit(cut)
    rounded = (pattern + np.uint64((1 << shift) - 1)) >> np.uint64(shift)
    if not is_negative.any():
        return np.flatnonzero(bits >= rounded.astype(bits.dtype)[:, None])
    low = np.where(is_negative, 0, rounded).astype(unsigned)
    width = np.where(is_negative, rounded, sign - 1 - rounded).astype(unsigned)
    above = bits.view(unsigned) - low[:, None] if low.any() else bits.view(unsigned)
    return np.flatnonzero(above <= width[:, None])


def _as_float(bits: np.ndarray) -> Float64[np.ndarray, " row"]:
    shift = np.uint32(32 - 8 * bits.dtype.itemsize)
    unsigned = bits.view(np.uint16 if bits.dtype == np.int16 else np.uint32)
    return (unsigned.astype(np.uint32) << shift).view(np.float32).astype(np.float64)


def _joined(found: list[tuple[Pairs, np.ndarray]], cut: Float32[np.ndarray, " row"]) -> Pairs:
    """The candidates of all blocks of latents, less those that a later block has ruled out."""
    if len(found) == 1:
        return found[0][0]
    row, latent, bits = (
        np.concatenate(parts)
        for parts in zip(*((p.row, p.latent, bits) for p, bits in found), strict=True)
    )
    order = np.argsort(row, kind="stable")
    keep = order[(_as_float(bits) >= cut[row])[order]]
    return Pairs(row[keep], latent[keep])
