"""The logit lens: which tokens a direction in the residual stream makes more or less likely.

A direction d adds ``(W_U diag(g)) d`` to the logits, with W_U the unembedding and g the weight of
the final norm. What is left out:

* the norm's division by the size of the stream, which scales all tokens of a direction alike;
* a bias of the norm or of the unembedding, which does not depend on the direction;
* the mean logit over the tokens, which shifts all tokens of a direction alike (softmax).

So only the order of the tokens means something. A ``LayerNorm`` (unlike an ``RMSNorm``) also
subtracts the mean over the stream's coordinates: for it, pass directions that are :func:`centred`.

Source:
    nostalgebraist, "interpreting GPT: the logit lens" (2020), with the final norm's weight folded
    in as by Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

VERSION = "1"
"""Changes whenever the same weights could give other tokens."""

_LATENTS_PER_BLOCK = 256
_BLOCK_ELEMENTS = 1 << 24
"""Numbers in a block of the unembedding or of logits: 64 MiB as float32."""


class _Extremes(NamedTuple):
    """The largest values of each row so far, and their tokens."""

    values: Float32[Tensor, "latent k"]
    tokens: Int64[Tensor, "latent k"]


def promoted_and_suppressed(
    directions: Float32[Tensor, "latent d_in"],
    unembedding: Float[Tensor, "token d_in"],
    norm_weight: Float[Tensor, " d_in"] | None,
    n: int,
) -> tuple[Int64[Tensor, "latent n"], Int64[Tensor, "latent n"]]:
    """The ``n`` tokens that each direction promotes most and the ``n`` that it suppresses most.

    Works in float32 in blocks of latents and tokens: beside its inputs it needs a few hundred MiB,
    whatever the number of latents and the size of the vocabulary.

    Args:
        directions: Rows of a decoder at a hookpoint in the residual stream. A row of zeros
            promotes nothing, and which tokens it gets is undefined.
        unembedding: Of the subject model, in any floating type.
        norm_weight: Multiplies the normalised stream before the unembedding (Gemma's norms: the
            stored weight + 1); null: there is none.
        n: Tokens wanted of each kind.

    Returns:
        Token ids, strongest first, on the device of ``unembedding``. Tokens whose logits are equal
        stand in any order.

    Raises:
        ValueError: If ``n`` is not within 1 and the size of the vocabulary.
    """
    n_tokens = unembedding.shape[0]
    if not 1 <= n <= n_tokens:
        raise ValueError(f"logit lens: got n = {n}, wanted 1 to {n_tokens}, the vocabulary's size.")
    rows = directions.to(unembedding.device)
    n_latents = rows.shape[0]
    high = [_nothing(stop - start, rows) for start, stop in _latent_blocks(n_latents)]
    low = list(high)
    for first, matrix in _unembedding_blocks(unembedding, norm_weight):
        for i, (start, stop) in enumerate(_latent_blocks(n_latents)):
            logits = rows[start:stop] @ matrix.T
            high[i] = _merged(high[i], logits, first, n)
            low[i] = _merged(low[i], logits.neg_(), first, n)
    return _joined(high, n, rows), _joined(low, n, rows)


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


def _latent_blocks(n_latents: int) -> Iterator[tuple[int, int]]:
    for start in range(0, n_latents, _LATENTS_PER_BLOCK):
        yield start, min(start + _LATENTS_PER_BLOCK, n_latents)


def _unembedding_blocks(
    unembedding: Float[Tensor, "token d_in"], norm_weight: Float[Tensor, " d_in"] | None
) -> Iterator[tuple[int, Float32[Tensor, "block d_in"]]]:
    """First token and rows of each block, with the norm's weight folded in."""
    n_tokens, d_in = unembedding.shape
    size = max(1, _BLOCK_ELEMENTS // max(d_in, _LATENTS_PER_BLOCK))
    for first in range(0, n_tokens, size):
        block = unembedding[first : first + size].float()
        if norm_weight is not None:
            block = block * norm_weight.to(block.device).float()
        yield first, block


def _nothing(n_latents: int, like: Float32[Tensor, "latent d_in"]) -> _Extremes:
    tokens = torch.zeros((n_latents, 0), dtype=torch.int64, device=like.device)
    return _Extremes(like.new_zeros((n_latents, 0)), tokens)


def _merged(
    extremes: _Extremes, logits: Float32[Tensor, "latent block"], first: int, n: int
) -> _Extremes:
    found = logits.topk(min(n, logits.shape[1]), dim=1)
    values = torch.cat([extremes.values, found.values], dim=1)
    tokens = torch.cat([extremes.tokens, found.indices + first], dim=1)
    best = values.topk(min(n, values.shape[1]), dim=1)
    return _Extremes(best.values, tokens.gather(1, best.indices))


def _joined(
    blocks: list[_Extremes], n: int, like: Float32[Tensor, "latent d_in"]
) -> Int64[Tensor, "latent n"]:
    empty = torch.zeros((0, n), dtype=torch.int64, device=like.device)
    return torch.cat([empty, *(block.tokens for block in blocks)])
