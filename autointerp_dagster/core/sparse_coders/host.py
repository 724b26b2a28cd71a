"""Encoding on a CPU: a screen for all latents, then float32 for the few that may fire."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from autointerp_dagster.core.sparse_coders.inputs import Inputs
from autointerp_dagster.core.sparse_coders.protocol import SparseActivations
from autointerp_dagster.core.sparse_coders.rule import Rule
from autointerp_dagster.core.sparse_coders.screen import Linear, Pairs, Screen, Screened, exact

ScreenChoice = Literal["auto", "bfloat16", "float32"]
"""Arithmetic of the first look at all latents; what is found does not depend on it."""

_BLOCK_ELEMENTS = 1 << 21
"""Most scores that exist at once: 4 MB in bfloat16, which stay in a CPU's last cache."""
_TOKEN_BLOCK = 256
"""Tokens scored at once, at least: fewer make the matrix product slow."""
_MIN_WORTH = 1 << 20
"""Weights of an encoder from which bfloat16 pays."""
_MAX_CANDIDATES = 1 / 32
"""Share of the latents; a row with more goes to the next screen."""
_MAX_PAIRS = 1 << 19
"""Candidates of a block of tokens, about: each takes some 100 bytes while it is looked at."""
_HALF = np.uint64(32)
_NOTHING = np.iinfo(np.uint64).max


class _Found(NamedTuple):
    token: Int64[np.ndarray, " nnz"]
    latent: Int64[np.ndarray, " nnz"]
    value: Float32[np.ndarray, " nnz"]


class _Look(NamedTuple):
    """One way to look for what may fire; tokens that it cannot judge go to the next."""

    dtype: torch.dtype | None
    """Of the scores; null: no scores, all latents are computed."""
    n_tokens: int
    """At once, at most."""
    most: int | None
    """Candidates of a token above which it is not judged; null: any number."""


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware, so that it is faster than float32."""
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and check is not None and bool(check())


class HostEncoder:
    """Finds what fires on each token, with memory that does not grow with tokens times latents.

    Which latents these are, and their values to the last bit, depends on the token and the weights
    alone: on no block, no other token, and not on the screen.
    """

    def __init__(
        self,
        linear: Linear,
        inputs: Inputs,
        rule: Rule,
        screen: ScreenChoice,
        block_elements: int | None,
    ) -> None:
        """Choose the screens; each is made when it is first needed.

        Args:
            linear: The encoder.
            inputs: What is done to a vector first.
            rule: Which latents fire.
            screen: What to score all latents in. Automatic: bfloat16 where the hardware has it and
                the encoder is large enough to pay.
            block_elements: Most scores that exist at once; null: what suits a CPU's cache.
        """
        self._linear, self._inputs, self._rule = linear, inputs, rule
        if screen == "auto":
            pays = linear.weight.numel() >= _MIN_WORTH and has_fast_bfloat16()
            screen = "bfloat16" if pays else "float32"
        self._screen, self._is_rounded = screen, screen == "bfloat16"
        self._block_elements = block_elements or _BLOCK_ELEMENTS
        self._screens: dict[torch.dtype, Screen] = {}

    def describe(self) -> dict[str, object]:
        """How it computes, none of which changes what is found."""
        return {"screen": self._screen, "block_elements": self._block_elements}

    def encode(self, x: Float[Tensor, "token d_in"]) -> SparseActivations:
        """What fires on each token; a token that no screen can judge is computed in full."""
        found = [_Found(*(np.empty(0, kind) for kind in (np.int64, np.int64, np.float32)))]
        left = np.arange(len(x))
        for look in self._looks():
            undecided = [left[:0]]
            for start in range(0, left.size, look.n_tokens):
                tokens = left[start : start + look.n_tokens]
                rows = self._inputs.prepared(x[torch.from_numpy(tokens)])
                screened = self._screened(rows, look)
                found.append(self._fires(rows, tokens, screened.candidates))
                undecided.append(tokens[screened.undecided])
            left = np.concatenate(undecided)
        return _by_token(found)

    def _looks(self) -> list[_Look]:
        """From cheap to sure: the last but one takes few tokens at once, the last a single one."""
        num_latents, at_least = len(self._linear.weight), 8 * (self._rule.most or 1)
        n_tokens = max(_TOKEN_BLOCK, self._block_elements // num_latents)
        most = max(at_least, _MAX_PAIRS // n_tokens)
        looks = [
            _Look(torch.float32, n_tokens, most),
            _Look(torch.float32, max(1, _MAX_PAIRS // num_latents), None),
            _Look(None, 1, None),
        ]
        if self._is_rounded:
            few = max(at_least, int(_MAX_CANDIDATES * num_latents))
            looks.insert(0, _Look(torch.bfloat16, n_tokens, min(most, few)))
        return looks

    def _screened(self, rows: Float32[Tensor, "row d_in"], look: _Look) -> Screened:
        num_latents, dtype = len(self._linear.weight), look.dtype
        if dtype is None:
            row = np.repeat(np.arange(len(rows)), num_latents)
            return Screened(Pairs(row, np.tile(np.arange(num_latents), len(rows))), row[:0])
        if dtype not in self._screens:
            self._screens[dtype] = Screen(self._linear, self._rule, dtype)
        latent_block = max(self._rule.k or 1, self._block_elements // max(len(rows), _TOKEN_BLOCK))
        return self._screens[dtype].candidates(rows, latent_block, look.most)

    def _fires(
        self, rows: Float32[Tensor, "row d_in"], tokens: Int64[np.ndarray, " row"], pairs: Pairs
    ) -> _Found:
        weight, bias = self._linear
        rule, (row, latent) = self._rule, pairs
        product = exact(weight, rows, pairs)
        value = _never_nan(product + bias[torch.from_numpy(latent)])
        if rule.gated is not None:
            is_open = value > 0
            row, latent = row[is_open], latent[is_open]
            index = torch.from_numpy(latent)
            scaled = product[torch.from_numpy(is_open)] * rule.gated.scale[index]
            value = _never_nan(scaled + rule.gated.bias[index])
        fires = value > (0.0 if rule.threshold is None else rule.threshold.numpy()[latent])
        found = _Found(row[fires], latent[fires], value[fires])
        if rule.n_groups > 1:
            found = _largest_of_groups(found, len(weight) // rule.n_groups)
        elif rule.k is not None:
            found = _largest(*found, rule.k)
        return found._replace(token=tokens[found.token])


def _never_nan(value: Float32[Tensor, " pair"]) -> Float32[np.ndarray, " pair"]:
    """Infinite where infinities of both signs were added, so that it is never passed over."""
    return value.masked_fill(value.isnan(), torch.inf).numpy()


def _largest_of_groups(found: _Found, size: int) -> _Found:
    """The largest value of each group of ``size`` latents; among equal ones the lowest latent."""
    token, latent, value = found
    group = latent // size
    order = np.lexsort((latent, -value, group, token))
    token, group = token[order], group[order]
    is_first = (np.diff(token, prepend=-1) != 0) | (np.diff(group, prepend=-1) != 0)
    first = order[is_first]
    return _Found(found.token[first], latent[first], value[first])


def _largest(
    row: Int64[np.ndarray, " pair"],
    latent: Int64[np.ndarray, " pair"],
    value: Float32[np.ndarray, " pair"],
    k: int,
) -> _Found:
    """The k largest positive values of each row; among equal ones the lowest latents."""
    counts = np.bincount(row)
    if row.size == 0 or counts.max() <= k:
        return _Found(row, latent, value)
    slot = np.arange(row.size) - np.repeat(np.cumsum(counts) - counts, counts)
    keys = np.full((counts.size, counts.max()), _NOTHING)
    descending = ~value.view(np.uint32)  # bits of positive floats order as the floats do
    keys[row, slot] = descending.astype(np.uint64) << _HALF | latent.astype(np.uint64)
    largest = np.sort(keys, axis=1)[:, :k]
    by_latent = np.sort(largest << _HALF | largest >> _HALF, axis=1)
    row, slot = np.nonzero(by_latent != _NOTHING)
    kept = by_latent[row, slot]
    bits = ~kept.astype(np.uint32)
    return _Found(row, (kept >> _HALF).astype(np.int64), bits.view(np.float32))


def _by_token(found: list[_Found]) -> SparseActivations:
    token, latent, value = (np.concatenate(of) for of in zip(*found, strict=True))
    if (np.diff(token) < 0).any():
        order = np.argsort(token, kind="stable")
        token, latent, value = token[order], latent[order], value[order]
    return SparseActivations(*(torch.from_numpy(column) for column in (token, latent, value)))
