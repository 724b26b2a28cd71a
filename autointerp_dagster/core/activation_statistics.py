"""How often, how strongly, on which tokens and where each latent fires, from sorted non-zeros.

One pass over the rows, in pieces that fit a CPU's cache:

1. Rows of one latent follow each other, so counts and maxima are reductions over segments.
2. Two bucket sorts (a sparse matrix turned to columns and back to rows) bring the rows of a latent
   and token together, and keep their order, in which they are summed.
3. The latent that a piece ends in may go on in the next: its sums per token are put before the next
   piece as if they were rows. So where pieces and frames end changes no bit of the result.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Float32, Float64, Int32, Int64, UInt16, UInt32
from scipy.sparse import csr_array

from autointerp_dagster.core.grouping import number_in_group
from autointerp_dagster.core.schemas import LATENT_STATISTICS
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LayerKey

N_TOP_TOKENS = 8
"""Tokens kept per latent, at most."""

HISTOGRAM_EDGES: tuple[float, ...] = (
    *(2.0**exponent * part for exponent in range(-13, 18) for part in (1.0, 1.5)),
    2.0**18,
)
"""Where bins of ``activation_histogram`` meet: bin i holds ``edges[i - 1] <= activation <
edges[i]``, bin 0 all below 2^-13 (1.2e-4), the last all from 2^18 (262,144) on. Two bins per power
of two, the same for every latent of every coder."""

N_BINS = len(HISTOGRAM_EDGES) + 1

_PIECE = 1 << 17
"""Rows worked on at once: many more than there are latents or tokens in them, and still few MB."""
_PARTS = 32
"""Of a latent's tokens, by which most are left out at once; at least ``N_TOP_TOKENS``."""
_BIN_OF = np.clip(np.arange(1 << 9) - ((127 - 13) * 2 - 1), 0, N_BINS - 1)
"""Bin by the bits of a float32 above 0 that tell powers of two (8) and their halves (1)."""


class _Rows(NamedTuple):
    """A piece of ``schemas.ACTIVATIONS``."""

    latent: Int64[np.ndarray, " row"]
    """From 0 at the start of the range."""
    context: UInt32[np.ndarray, " row"]
    position: UInt16[np.ndarray, " row"]
    activation: Float32[np.ndarray, " row"]
    place: Int64[np.ndarray, " row"]
    """Of the token, in the whole dataset."""


class _TokenSums(NamedTuple):
    """What the latents of a piece did on each token that they fired on, by (latent, token)."""

    bounds: Int64[np.ndarray, " boundary"]
    """Groups ``bounds[i] .. bounds[i + 1]`` are of the i-th latent that fires in the piece."""
    token: Int32[np.ndarray, " group"]
    summed: Float64[np.ndarray, " group"]
    n_tokens: Int64[np.ndarray, " group"]

    def of_last(self) -> "_TokenSums":
        """Those of the last latent."""
        first, last = self.bounds[-2:]
        columns = (column[first:].copy() for column in (self.token, self.summed, self.n_tokens))
        return _TokenSums(np.array([0, last - first]), *columns)


class StatisticsBuilder:
    """Statistics of a range of latents, from its rows in consecutive frames.

    Memory: about 10 MB for a piece of a frame, 1 kB per latent of the range (twice as much while
    the table is made), and the distinct tokens of the one latent that may go on.
    """

    def __init__(self, dataset: TokenDataset, latents: range) -> None:
        """Counts how many tokens of the dataset there are in each bucket of positions.

        Args:
            dataset: What the activations were computed on.
            latents: The range, in steps of 1; may be empty.
        """
        self._dataset = dataset
        self._latents = latents
        self._bucket_of, self._n_in_bucket = _position_buckets(dataset)
        self._lengths = np.diff(dataset.offsets)
        self._n_ids = int(dataset.tokens.max(initial=0)) + 1
        self._last_address = -1  # of the last row: latent, and place in the dataset
        self._last_context = -1
        self._open: _TokenSums | None = None
        n = len(latents)
        self._n_tokens = np.zeros(n, dtype=np.int64)
        self._n_contexts = np.zeros(n, dtype=np.int64)
        self._maximum = np.zeros(n, dtype=np.float32)
        self._histogram = np.zeros((n, N_BINS), dtype=np.int64)
        self._n_by_bucket = np.zeros((n, self._n_in_bucket.size), dtype=np.int64)
        self._summed = np.zeros(n, dtype=np.float64)
        self._n_most_frequent = np.zeros(n, dtype=np.int64)
        self._top_token = np.full((n, N_TOP_TOKENS), -1, dtype=np.int64)
        self._top_sum = np.zeros((n, N_TOP_TOKENS), dtype=np.float64)

    def add(self, frame: pl.DataFrame) -> None:
        """Takes in the next rows.

        Args:
            frame: ``schemas.ACTIVATIONS`` of latents of the range, sorted by (latent, context,
                position) in themselves and after those of the frame before. It may end within a
                latent or a context, and may be empty.

        Raises:
            ValueError: If an activation is not a finite number above 0, lies outside of the range
                or of the kept tokens, or is not in order.
        """
        for piece in frame.iter_slices(_PIECE):
            if piece.height:
                self._add_piece(self._rows(piece))

    def table(
        self,
        layer: LayerKey,
        promoted: Sequence[Sequence[int]] | None = None,
        suppressed: Sequence[Sequence[int]] | None = None,
    ) -> pl.DataFrame:
        """``schemas.LATENT_STATISTICS`` of what was added so far; one row for every latent.

        ``activation_histogram`` has a bin for each interval of :data:`HISTOGRAM_EDGES`.
        ``top_tokens`` are by summed activation, of equals the smaller id first. Both are empty for
        a latent that never fires; numbers are null there, but for the counts, which are 0.

        ``position_information`` is the mutual information, in nats, of "the latent fires on a
        token" and the bucket of the token's position: buckets end at the 1st, 2nd, 4th, 8th ...
        kept position of a context. The joint distribution is that of all kept tokens of the dataset
        (without BOS), so positions that only long contexts have weigh less. Estimator: plug-in less
        the Miller-Madow term (cells that occur - values that fire takes - values that the bucket
        takes + 1) / 2N, and no less than 0. It is at most the entropy of "fires" (small for a rare
        latent; .693 at a rate of 1/2), up to 1/2N. Buckets lose what happens within them.

        Args:
            layer: Whose latents these are.
            promoted: Per latent of the range, token ids, the most promoted first; null: unknown.
            suppressed: Likewise.

        Raises:
            ValueError: If there are not as many promoted or suppressed as there are latents.

        Source:
            Miller, "Note on the bias of information estimates" (1955); Paninski, "Estimation of
            Entropy and Mutual Information", Neural Computation 15 (2003), section 4.1.
        """
        fires = self._n_tokens > 0
        divisor = np.maximum(self._n_tokens, 1)
        information = _position_information(self._n_by_bucket, self._n_in_bucket)
        numbers = pl.DataFrame(
            {
                "max_activation": self._maximum,
                "mean_activation": self._summed / divisor,
                "single_token_share": self._n_most_frequent / divisor,
                "position_information": information,
            }
        ).select(pl.when(pl.Series(fires)).then(pl.all()))
        rows = numbers.with_columns(
            pl.Series("latent", np.arange(self._latents.start, self._latents.stop), pl.UInt32),
            pl.Series("n_tokens", self._n_tokens),
            pl.Series("n_contexts", self._n_contexts),
            _lists("activation_histogram", self._histogram, np.repeat(fires[:, None], N_BINS, 1)),
            *self._top_tokens(),
            self._token_lists("promoted_tokens", promoted),
            self._token_lists("suppressed_tokens", suppressed),
        )
        return LATENT_STATISTICS.conform(rows, layer)

    def _rows(self, piece: pl.DataFrame) -> _Rows:
        """The rows, checked.

        Raises:
            ValueError: As :meth:`add`.
        """
        offsets, n_tokens = self._dataset.offsets, self._dataset.tokens.size
        latent = piece["latent"].to_numpy().astype(np.int64) - self._latents.start
        context, position = piece["context"].to_numpy(), piece["position"].to_numpy()
        activation = piece["activation"].to_numpy()
        fault = "at a position that is not kept or there"
        if context.max() >= self._lengths.size:
            _refuse(piece, context >= self._lengths.size, fault)
        is_kept = position < self._lengths[context]
        if position.min() < self._dataset.first_visible or not is_kept.all():
            _refuse(piece, ~is_kept | (position < self._dataset.first_visible), fault)
        if not (activation.min() > 0 and activation.max() < np.inf):
            _refuse(piece, ~((activation > 0) & (activation < np.inf)), "not finite and above 0")
        if latent.min() < 0 or latent.max() >= len(self._latents):
            is_inside = (latent >= 0) & (latent < len(self._latents))
            _refuse(piece, ~is_inside, f"outside of the range {self._latents}")
        place = offsets[context] + position
        address = latent * n_tokens + place
        is_later = address[1:] > address[:-1]
        if address[0] <= self._last_address or not is_later.all():
            is_first_later = address[:1] > self._last_address
            _refuse(piece, ~np.append(is_first_later, is_later), "not in order, or there twice")
        return _Rows(latent, context, position, activation, place)

    def _add_piece(self, rows: _Rows) -> None:
        n_tokens = self._dataset.tokens.size
        goes_on = bool(rows.latent[0] == self._last_address // n_tokens)
        is_new = np.append(True, rows.latent[1:] != rows.latent[:-1])
        starts = np.flatnonzero(is_new)
        self._count(rows, is_new, starts, goes_on)
        tokens = self._dataset.tokens[rows.place]
        before = self._open if goes_on else None
        sums = _token_sums(rows, tokens, starts, before, self._n_ids)
        self._keep(sums, rows.latent[starts])
        self._open = sums.of_last()
        self._last_address = int(rows.latent[-1] * n_tokens + rows.place[-1])
        self._last_context = int(rows.context[-1])

    def _count(
        self,
        rows: _Rows,
        is_new: Bool[np.ndarray, " row"],
        starts: Int64[np.ndarray, " segment"],
        goes_on: bool,
    ) -> None:
        """Adds what needs no tokens."""
        fired, segment = rows.latent[starts], np.cumsum(is_new) - 1
        is_new_context = np.append(True, rows.context[1:] != rows.context[:-1]) | is_new
        is_new_context[0] = not goes_on or rows.context[0] != self._last_context
        self._n_tokens[fired] += np.diff(starts, append=segment.size)
        self._n_contexts[fired] += np.add.reduceat(is_new_context, starts, dtype=np.int64)
        maxima = np.maximum.reduceat(rows.activation, starts)
        self._maximum[fired] = np.maximum(self._maximum[fired], maxima)
        bins = _BIN_OF[rows.activation.view(np.uint32) >> 22]
        self._histogram[fired] += _counted(segment, bins, N_BINS, fired.size)
        buckets, n_buckets = self._bucket_of[rows.position], self._n_in_bucket.size
        self._n_by_bucket[fired] += _counted(segment, buckets, n_buckets, fired.size)

    def _keep(self, sums: _TokenSums, fired: Int64[np.ndarray, " segment"]) -> None:
        """Writes the statistics of tokens; those of a latent that goes on are written again."""
        segment = np.repeat(np.arange(fired.size), np.diff(sums.bounds))
        self._summed[fired] = np.bincount(segment, weights=sums.summed)
        self._n_most_frequent[fired] = np.maximum.reduceat(sums.n_tokens, sums.bounds[:-1])
        top = _largest(sums)
        segment = segment[top]
        rank = number_in_group(segment)
        self._top_token[fired] = -1
        self._top_token[fired[segment], rank] = sums.token[top]
        self._top_sum[fired[segment], rank] = sums.summed[top]

    def _top_tokens(self) -> list[pl.Series]:
        shares = self._top_sum / np.where(self._n_tokens > 0, self._summed, 1)[:, None]
        is_there = self._top_token >= 0
        return [
            _lists("top_tokens", self._top_token, is_there),
            _lists("top_token_shares", shares, is_there),
        ]

    def _token_lists(self, name: str, tokens: Sequence[Sequence[int]] | None) -> pl.Series:
        kind = pl.List(pl.UInt32)
        if tokens is None:
            return pl.Series(name, [None] * len(self._latents), dtype=kind)
        if len(tokens) != len(self._latents):
            raise ValueError(
                f"statistics of latents {self._latents}: {name} of {len(tokens)} latents, wanted "
                f"{len(self._latents)}. Give one list per latent."
            )
        return pl.Series(name, [list(row) for row in tokens], dtype=kind)


def _refuse(piece: pl.DataFrame, bad: Bool[np.ndarray, " row"], fault: str) -> None:
    if bad.any():
        row = piece.row(int(np.argmax(bad)), named=True)
        raise ValueError(
            f"latent {row['latent']}, context {row['context']}, position {row['position']}: "
            f"activation {row['activation']} is {fault}. Make the activation cache again."
        )


def _counted(
    segment: Int64[np.ndarray, " row"], column: Int64[np.ndarray, " row"], width: int, height: int
) -> Int64[np.ndarray, "segment column"]:
    counts = np.bincount(segment * width + column, minlength=height * width)
    return counts.reshape(height, width)


def _token_sums(
    rows: _Rows,
    tokens: Int32[np.ndarray, " row"],
    starts: Int64[np.ndarray, " segment"],
    before: _TokenSums | None,
    n_ids: int,
) -> _TokenSums:
    """The first latent of ``rows`` goes on from what ``before`` sums up, if there is something."""
    weights, bounds = rows.activation.astype(np.float64), np.append(starts, tokens.size)
    if before is not None:
        bounds[1:] += before.token.size
        tokens = np.concatenate([before.token, tokens])
        weights = np.concatenate([before.summed, weights])
    # By token and by latent again: two bucket sorts, each of which keeps the order of equals.
    matrix = csr_array((weights, tokens, bounds), shape=(starts.size, n_ids)).tocsc().tocsr()
    is_first = np.append(True, matrix.indices[1:] != matrix.indices[:-1])
    is_first[matrix.indptr[:-1]] = True
    n_tokens = np.diff(np.flatnonzero(is_first), append=is_first.size)
    matrix.sum_duplicates()  # in order
    bounds = matrix.indptr.astype(np.int64)
    if before is not None:
        n_tokens[np.searchsorted(matrix.indices[: bounds[1]], before.token)] += before.n_tokens - 1
    return _TokenSums(bounds, matrix.indices, matrix.data, n_tokens)


def _largest(sums: _TokenSums) -> Int64[np.ndarray, " group"]:
    """The groups with the largest sums of each latent, in order; of equals the smaller token.

    Most groups are left out at once: the maxima of as many parts of a latent's groups as tokens are
    wanted, or more, are as many groups, so that what is wanted is not below the last of them.
    """
    starts, sizes = sums.bounds[:-1], np.diff(sums.bounds)
    threshold = np.zeros(sizes.size)
    is_large = sizes >= _PARTS
    if is_large.any():
        parts = starts[is_large, None] + sizes[is_large, None] * np.arange(_PARTS) // _PARTS
        # A latent's last part may reach into the next latents: cut there, and drop what is left.
        cuts = np.column_stack([parts, sums.bounds[1:][is_large]]).ravel()
        maxima = np.maximum.reduceat(np.append(sums.summed, 0), cuts).reshape(-1, _PARTS + 1)
        threshold[is_large] = np.sort(maxima[:, :-1], axis=1)[:, -N_TOP_TOKENS]
    near = np.flatnonzero(sums.summed >= np.repeat(threshold, sizes))
    segment = np.searchsorted(sums.bounds, near, side="right") - 1
    order = np.lexsort((-sums.summed[near], segment))  # stable: tokens ascend within a latent
    return near[order[number_in_group(segment) < N_TOP_TOKENS]]


def _position_buckets(
    dataset: TokenDataset,
) -> tuple[Int64[np.ndarray, " position"], Int64[np.ndarray, " bucket"]]:
    """Bucket of each position, and how many kept tokens of the dataset each bucket has."""
    lengths = np.diff(dataset.offsets)
    n_longer = lengths.size - np.cumsum(np.bincount(lengths))[:-1]  # contexts with the position
    kept = np.arange(n_longer.size) - dataset.first_visible
    bucket = np.frexp(np.maximum(kept, 0))[1].astype(np.int64)  # bits of the number: 0 1 2 2 3 ...
    n_tokens = np.bincount(bucket, weights=np.where(kept >= 0, n_longer, 0))
    return bucket, n_tokens.astype(np.int64)


def _position_information(
    n_firing: Int64[np.ndarray, "latent bucket"], n_tokens: Int64[np.ndarray, " bucket"]
) -> Float64[np.ndarray, " latent"]:
    """As :meth:`StatisticsBuilder.table` says; 0 for a latent that never fires."""
    total = n_tokens.sum()
    joint = np.stack([n_firing, n_tokens - n_firing], axis=-1).astype(np.float64)
    expected = joint.sum(axis=1, keepdims=True) * (n_tokens / max(total, 1))[:, None]
    occurs = joint > 0
    ratio = np.divide(joint, expected, where=occurs, out=np.ones_like(joint))
    plug_in = (joint * np.log(ratio)).sum(axis=(1, 2)) / max(total, 1)
    n_cells = occurs.sum(axis=(1, 2))
    n_values = occurs.any(axis=1).sum(axis=-1) + occurs.any(axis=2).sum(axis=-1)
    bias = (n_cells - n_values + 1) / (2 * max(total, 1))
    return np.maximum(plug_in - bias, 0)


def _lists(
    name: str,
    values: Int64[np.ndarray, "latent item"] | Float64[np.ndarray, "latent item"],
    is_there: Bool[np.ndarray, "latent item"],
) -> pl.Series:
    """One list per row, of the items that are there."""
    n_latents, n_items = values.shape
    row = np.repeat(np.arange(n_latents), n_items)[is_there.ravel()]
    long = pl.DataFrame({"row": row, name: values.ravel()[is_there.ravel()]})
    lists = long.group_by("row", maintain_order=True).agg(name)
    every = pl.DataFrame({"row": np.arange(n_latents)})
    joined = every.join(lists, on="row", how="left", maintain_order="left")
    return joined[name].fill_null([])
