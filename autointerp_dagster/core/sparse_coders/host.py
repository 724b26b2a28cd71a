"""Encoding on a CPU: a screen for all latents, then float32 for the few that may fire."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

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
_HALF = np.uint64(32)
_NOTHING = np.iinfo(np.uint64).max


class _Found(NamedTuple):
    token: Int64[np.ndarray, " nnz"]
    latent: Int64[np.ndarray, " nnz"]
    value: Float32[np.ndarray, " nnz"]


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware, so that it is faster than float32."""
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and check is not None and bool(check())


class HostEncoder:
    """Finds what fires on each token, with memory that does not grow with tokens times latents.

    Either the k largest pre-activations above zero, or all that exceed their latent's threshold.
    Which these are, and their values to the last bit, depends on the token and the weights alone:
    on no block, no other token, and not on the screen.
    """

    def __init__(
        self, linear: Linear, rule: Rule, screen: ScreenChoice, block_elements: int | None
    ) -> None:
        """Choose the screens; each is made when it is first needed.

        Args:
            linear: The encoder.
            rule: Which latents fire.
            screen: What to score all latents in. Automatic: bfloat16 where the hardware has it and
                the encoder is large enough to pay.
            block_elements: Most scores that exist at once; null: what suits a CPU's cache.
        """
        self._linear, self._rule = linear, rule
        if screen == "auto":
            pays = linear.weight.numel() >= _MIN_WORTH and has_fast_bfloat16()
            screen = "bfloat16" if pays else "float32"
        self._dtypes = [torch.float32] if screen == "float32" else [torch.bfloat16, torch.float32]
        self._block_elements = block_elements or _BLOCK_ELEMENTS
        self._screens: dict[torch.dtype, Screen] = {}

    def describe(self) -> dict[str, object]:
        """How it computes, none of which changes what is found."""
        screen = str(self._dtypes[0]).removeprefix("torch.")
        return {"screen": screen, "block_elements": self._block_elements}

    def encode(self, x: Float[Tensor, "token d_in"]) -> SparseActivations:
        """What fires on each token; a token that no screen can judge is computed in full."""
        found = [_Found(*(np.empty(0, kind) for kind in (np.int64, np.int64, np.float32)))]
        left = np.arange(len(x))
        for dtype in (*self._dtypes, None):
            undecided = [left[:0]]
            for tokens in self._blocks(left, dtype):
                rows = x[torch.from_numpy(tokens)].float() - self._linear.centre
                screened = self._screened(rows, dtype)
                found.append(self._fires(rows, tokens, screened.candidates))
                undecided.append(tokens[screened.undecided])
            left = np.concatenate(undecided)
        return _by_token(found)

    def _blocks(
        self, tokens: Int64[np.ndarray, " token"], dtype: torch.dtype | None
    ) -> list[Int64[np.ndarray, " _"]]:
        """Blocks of tokens; of one token where all of its latents are computed."""
        size = 1
        if dtype is not None:
            size = max(_TOKEN_BLOCK, self._block_elements // len(self._linear.weight))
        return [tokens[i : i + size] for i in range(0, tokens.size, size)]

    def _screened(self, rows: Float32[Tensor, "row d_in"], dtype: torch.dtype | None) -> Screened:
        num_latents, k = len(self._linear.weight), self._rule.k or 1
        if dtype is None:
            row = np.repeat(np.arange(len(rows)), num_latents)
            return Screened(Pairs(row, np.tile(np.arange(num_latents), len(rows))), row[:0])
        if dtype not in self._screens:
            self._screens[dtype] = Screen(self._linear, self._rule.threshold, dtype)
        latent_block = max(k, self._block_elements // max(len(rows), _TOKEN_BLOCK))
        is_last = dtype == torch.float32
        most = None if is_last else max(8 * k, int(_MAX_CANDIDATES * num_latents))
        return self._screens[dtype].candidates(rows, self._rule.k, latent_block, most)

    def _fires(
        self, rows: Float32[Tensor, "row d_in"], tokens: Int64[np.ndarray, " row"], pairs: Pairs
    ) -> _Found:
        value = exact(self._linear, rows, pairs)
        value[np.isnan(value)] = np.inf  # infinities of both signs: never to be passed over
        threshold = self._rule.threshold
        fires = value > (0.0 if threshold is None else threshold.numpy()[pairs.latent])
        row, latent, value = pairs.row[fires], pairs.latent[fires], value[fires]
        if self._rule.k is not None:
            row, latent, value = _largest(row, latent, value, self._rule.k)
        return _Found(tokens[row], latent, value)


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
