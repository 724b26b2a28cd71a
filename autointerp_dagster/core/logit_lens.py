"""The logit lens: which tokens a direction in the residual stream makes more or less likely.

A direction d adds ``(W_U diag(g)) d`` to the logits, with W_U the unembedding and g the weight of
the final norm. What is left out:

* the norm's division by the size of the stream, which scales all tokens of a direction alike;
* a bias of the norm or of the unembedding, which does not depend on the direction;
* the mean logit over the tokens, which shifts all tokens of a direction alike (softmax).

So only the order of the tokens means something. A ``LayerNorm`` (unlike an ``RMSNorm``) also
subtracts the mean over the stream's coordinates: for it, pass directions that are :func:`centred`.

How: all logits are computed roughly (in bfloat16 where that is fast), and those of a few more
tokens than are wanted again in float64. Where the rough ones cannot exclude that another token
belongs among the wanted, the direction is looked at again in float32.

Source:
    nostalgebraist, "interpreting GPT: the logit lens" (2020), with the final norm's weight folded
    in as by Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

VERSION = "2"
"""Changes whenever the same weights could give other tokens."""

_LATENTS_PER_BLOCK = 256
_BLOCK_ELEMENTS = 1 << 24
"""Numbers in a block of the unembedding or of logits: 64 MiB as float32."""
_MORE = (12, 56)
"""Tokens computed exactly beyond those wanted; more where fewer leave a doubt."""
_GROUP = 64
"""Tokens of which only the largest logit is looked at first."""


class _Extremes(NamedTuple):
    """The largest (or smallest) values of each row so far, the most extreme first."""

    values: Float32[Tensor, "latent k"]
    tokens: Int64[Tensor, "latent k"]


class _Problem(NamedTuple):
    """Directions and the unembedding, with the norm's weight folded into the directions."""

    rows: Float64[Tensor, "latent d_in"]
    unembedding: Float[Tensor, "token d_in"]
    n: int
    """Tokens wanted of each kind."""

    def among(self, which: Bool[Tensor, " latent"]) -> "_Problem":
        """Only some of the directions."""
        return self._replace(rows=self.rows[which])


def promoted_and_suppressed(
    directions: Float32[Tensor, "latent d_in"],
    unembedding: Float[Tensor, "token d_in"],
    norm_weight: Float[Tensor, " d_in"] | None,
    n: int,
    rough: torch.dtype = torch.float32,
) -> tuple[Int64[Tensor, "latent n"], Int64[Tensor, "latent n"]]:
    """The ``n`` tokens that each direction promotes most and the ``n`` that it suppresses most.

    Works in blocks of latents and tokens: beside its inputs it needs a few hundred MiB, whatever
    the number of latents and the size of the vocabulary.

    Args:
        directions: Rows of a decoder at a hookpoint in the residual stream. A row of zeros
            promotes nothing, and which tokens it gets is undefined.
        unembedding: Of the subject model, in any floating type.
        norm_weight: Multiplies the normalised stream before the unembedding (Gemma's norms: the
            stored weight + 1); null: there is none.
        n: Tokens wanted of each kind.
        rough: Type of the first look at all logits, float32 or bfloat16; changes no token.

    Returns:
        Token ids, strongest first, on the device of ``unembedding``. Tokens whose logits are equal
        stand in any order.

    Raises:
        ValueError: If ``n`` is not within 1 and the size of the vocabulary.
    """
    n_tokens = unembedding.shape[0]
    if not 1 <= n <= n_tokens:
        raise ValueError(f"logit lens: got n = {n}, wanted 1 to {n_tokens}, the vocabulary's size.")
    rows = directions.to(unembedding.device).double()
    if norm_weight is not None:
        rows = rows * norm_weight.to(unembedding.device).double()
    problem = _Problem(rows, unembedding, n)
    high, low, is_sure = _found(problem, rough)
    if rough != torch.float32 and not is_sure.all():
        again = _found(problem.among(~is_sure), torch.float32)
        high[~is_sure], low[~is_sure] = again[:2]
    return high, low


def centred(directions: Float32[Tensor, "latent d_in"]) -> Float32[Tensor, "latent d_in"]:
    """The directions without their mean over coordinates, which a ``LayerNorm`` takes off.

    A constant row becomes exactly zero: what rounding leaves of it is no direction.
    """
    rest = directions - directions.mean(dim=1, keepdim=True)
    is_constant = (directions == directions[:, :1]).all(dim=1, keepdim=True)
    return rest.masked_fill(is_constant, 0)


def promoted_tokens(
    tokens: Sequence[Sequence[int]], text_of: Callable[[int], str]
) -> list[tuple[str, ...]]:
    """The texts of each latent's tokens, for ``LatentRecord.promoted_tokens``.

    Args:
        tokens: Ids, as of :func:`promoted_and_suppressed`.
        text_of: The text of one token id; empty for a part of a character, which is left out.
    """
    return [tuple(filter(None, map(text_of, row))) for row in tokens]


def _found(
    problem: _Problem, rough: torch.dtype
) -> tuple[Int64[Tensor, "latent n"], Int64[Tensor, "latent n"], Bool[Tensor, " latent"]]:
    """Promoted and suppressed tokens, and whether certainly no others belong there."""
    n_latents = problem.rows.shape[0]
    n_near = min(problem.n + _MORE[-1], problem.unembedding.shape[0])
    high = [_nothing(stop - start, problem.rows) for start, stop in _latent_blocks(n_latents)]
    low = list(high)
    rows = problem.rows.to(rough)
    norm = rounding = 0.0
    for first, block in _unembedding_blocks(problem.unembedding):
        matrix = block.to(rough)
        norm = max(norm, _largest_norm(matrix))
        if block.dtype != rough:
            rounding = max(rounding, _largest_norm(matrix.float() - block.float()))
        for i, (start, stop) in enumerate(_latent_blocks(n_latents)):
            logits = (rows[start:stop] @ matrix.T).float()
            high[i] = _merged(high[i], logits, first, n_near, largest=True)
            low[i] = _merged(low[i], logits, first, n_near, largest=False)
    error = _error(problem.rows, rows, norm, rounding)
    turned = problem._replace(rows=-problem.rows)
    promoted, is_sure = _ranked(problem, _joined(high, n_near, problem.rows), error, rough)
    suppressed, is_sure_too = _ranked(turned, _joined(low, n_near, turned.rows, -1), error, rough)
    return promoted, suppressed, is_sure & is_sure_too


def _error(
    exact: Float64[Tensor, "latent d_in"],
    rough: Float[Tensor, "latent d_in"],
    norm: float,
    rounding: float,
) -> Float64[Tensor, " latent"]:
    """How far a direction's rough logits may be from the exact ones, at most (Cauchy-Schwarz).

    Args:
        exact: The directions.
        rough: The directions as they were multiplied.
        norm: Largest of the unembedding's rows as they were multiplied.
        rounding: Largest norm of what a row of the unembedding lost.
    """
    lost, length = (rough.double() - exact).norm(dim=1), exact.norm(dim=1)
    sums = 2.0**-23 * exact.shape[1] * (length + lost) * norm  # of float32 terms, in any order
    return lost * norm + length * rounding + sums


def _ranked(
    problem: _Problem, near: _Extremes, error: Float64[Tensor, " latent"], rough: torch.dtype
) -> tuple[Int64[Tensor, "latent n"], Bool[Tensor, " latent"]]:
    """The largest of some logits in float64, and whether no token left out can be above them.

    Args:
        problem: What the logits are of.
        near: Rough logits, the largest first; those left out are not above the last.
        error: As of :func:`_error`.
        rough: Type of the rough logits, to which they were rounded at last.
    """
    n, n_near = problem.n, near.tokens.shape[1]
    found = near.tokens[:, :n].clone()
    is_sure = torch.zeros(found.shape[0], dtype=torch.bool, device=found.device)
    for k in (min(n + more, n_near) for more in _MORE):
        open_ = ~is_sure
        tokens = near.tokens[open_, :k].sort(dim=1).values
        best = _exact(problem.among(open_), tokens).sort(dim=1, descending=True, stable=True)
        found[open_] = tokens.gather(1, best.indices[:, :n])  # of equals the smaller id
        last = near.values[open_, k - 1].double()
        highest_left_out = last + torch.finfo(rough).eps * last.abs() + error[open_]
        is_all = k == problem.unembedding.shape[0]
        is_sure[open_] = (best.values[:, n - 1] >= highest_left_out) | is_all
    return found, is_sure


def _exact(problem: _Problem, tokens: Int64[Tensor, "latent k"]) -> Float64[Tensor, "latent k"]:
    """The logits of some tokens of each direction."""
    logits = torch.empty(tokens.shape, dtype=torch.float64, device=tokens.device)
    size = max(1, (_BLOCK_ELEMENTS >> 2) // (tokens.shape[1] * problem.rows.shape[1]))
    for start in range(0, tokens.shape[0], size):
        here = slice(start, start + size)
        weights = problem.unembedding[tokens[here]].double()
        logits[here] = (weights @ problem.rows[here, :, None])[:, :, 0]
    return logits


def _latent_blocks(n_latents: int) -> Iterator[tuple[int, int]]:
    for start in range(0, n_latents, _LATENTS_PER_BLOCK):
        yield start, min(start + _LATENTS_PER_BLOCK, n_latents)


def _unembedding_blocks(
    unembedding: Float[Tensor, "token d_in"],
) -> Iterator[tuple[int, Float[Tensor, "block d_in"]]]:
    """First token and rows of each block."""
    n_tokens, d_in = unembedding.shape
    size = max(1, _BLOCK_ELEMENTS // max(d_in, _LATENTS_PER_BLOCK))
    for first in range(0, n_tokens, size):
        yield first, unembedding[first : first + size]


def _largest_norm(matrix: Float[Tensor, "row d_in"]) -> float:
    return float(torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float32).max())


def _nothing(n_latents: int, like: Float64[Tensor, "latent d_in"]) -> _Extremes:
    tokens = torch.zeros((n_latents, 0), dtype=torch.int64, device=like.device)
    return _Extremes(like.new_zeros((n_latents, 0), dtype=torch.float32), tokens)


def _merged(
    extremes: _Extremes, logits: Float32[Tensor, "latent block"], first: int, n: int, largest: bool
) -> _Extremes:
    found = _extremes(logits, n, largest)
    values = torch.cat([extremes.values, found.values], dim=1)
    tokens = torch.cat([extremes.tokens, found.tokens + first], dim=1)
    best = values.topk(min(n, values.shape[1]), dim=1, largest=largest)
    return _Extremes(best.values, tokens.gather(1, best.indices))


def _extremes(logits: Float32[Tensor, "latent block"], n: int, largest: bool) -> _Extremes:
    """The ``n`` largest of each row: they lie in the ``n`` groups whose largest are largest."""
    n_latents, n_tokens = logits.shape
    n_groups = n_tokens // _GROUP
    if n_groups <= 2 * n:
        return _Extremes(*logits.topk(min(n, n_tokens), dim=1, largest=largest))
    grouped = logits[:, : n_groups * _GROUP].unflatten(1, (n_groups, _GROUP))
    heads = grouped.amax(dim=2) if largest else grouped.amin(dim=2)
    groups = heads.topk(n, dim=1, largest=largest).indices[:, :, None]
    inside = torch.arange(_GROUP, device=logits.device)
    rest = torch.arange(n_groups * _GROUP, n_tokens, device=logits.device)
    tokens = torch.cat([(groups * _GROUP + inside).flatten(1), rest.expand(n_latents, -1)], dim=1)
    best = logits.gather(1, tokens).topk(n, dim=1, largest=largest)
    return _Extremes(best.values, tokens.gather(1, best.indices))


def _joined(
    blocks: list[_Extremes], n: int, like: Float64[Tensor, "latent d_in"], sign: int = 1
) -> _Extremes:
    empty = torch.zeros((0, n), dtype=torch.int64, device=like.device)
    return _Extremes(
        sign * torch.cat([empty.float(), *(block.values for block in blocks)]),
        torch.cat([empty, *(block.tokens for block in blocks)]),
    )
