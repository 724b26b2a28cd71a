"""Encoding on an accelerator: dense blocks of tokens, as many at once as its memory holds."""

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from autointerp_dagster.core.sparse_coders.inputs import Inputs
from autointerp_dagster.core.sparse_coders.protocol import SparseActivations
from autointerp_dagster.core.sparse_coders.rule import Rule

_MEMORY_SHARE = 1 / 4
"""Of the memory that is free at the first use; the rest is the next forward pass's."""
_COPIES = 4
"""Tensors as large as the pre-activations that choosing among them may need at once."""

logger = logging.getLogger(__name__)


class DeviceEncoder:
    """Finds what fires on each token where the weights are, in the type of the weights."""

    def __init__(
        self,
        encode_block: Callable[[Float[Tensor, "token d_in"]], SparseActivations],
        token_block: int,
        precision: str,
    ) -> None:
        """Keep the parts.

        Args:
            encode_block: Encodes some tokens at once.
            token_block: How many, >= 1. Halved, and kept so, whenever there is no memory for it.
            precision: Of the product, to be recorded.
        """
        self._encode_block, self._token_block = encode_block, token_block
        self._precision = precision

    def describe(self) -> dict[str, object]:
        """How it computes, to be recorded."""
        return {"precision": self._precision, "token_block": self._token_block}

    def encode(self, x: Float[Tensor, "token d_in"]) -> SparseActivations:
        """What fires on each token.

        Raises:
            torch.OutOfMemoryError: If there is no memory to encode a single token.
        """
        parts: list[SparseActivations] = []
        start = 0
        while start < len(x):
            part = self._try(x[start : start + self._token_block])
            if part is None:
                continue
            parts.append(part._replace(token=part.token + start))
            start += self._token_block
        if not parts:
            return self._encode_block(x)
        return SparseActivations(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def _try(self, x: Float[Tensor, "token d_in"]) -> SparseActivations | None:
        """Null after a lack of memory; the next try is with half as many tokens."""
        try:
            return self._encode_block(x)
        except torch.OutOfMemoryError:
            if self._token_block == 1:
                raise
        self._token_block = max(1, self._token_block // 2)
        logger.warning("out of memory: encoding %d tokens at a time", self._token_block)
        if x.is_cuda:
            torch.cuda.empty_cache()
        return None


def token_block_of(device: torch.device, num_latents: int, itemsize: int) -> int:
    """Tokens whose pre-activations fit in a part of the memory that is free now.

    Args:
        device: With CUDA's memory; elsewhere 4,194,304 pre-activations are held to fit.
        num_latents: Pre-activations of one token.
        itemsize: Bytes of one.
    """
    if device.type != "cuda":
        return max(1, (1 << 22) // num_latents)
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, int(free * _MEMORY_SHARE) // (_COPIES * itemsize * num_latents))


class _Chosen(NamedTuple):
    """What may fire: some places, with their latents and pre-activations."""

    pre: Float[Tensor, "token place"]
    """Of a gated coder the products."""
    latent: Int64[Tensor, "token place"] | None
    """Null: a place for each latent."""
    fires: Bool[Tensor, "token place"]
    """True for NaN, too: infinities of both signs."""


def block_encoder(
    weight: Float[Tensor, "num_latents d_in"],
    bias: Float32[Tensor, " num_latents"],
    inputs: Inputs,
    rule: Rule,
    compiled: bool,
) -> Callable[[Float[Tensor, "token d_in"]], SparseActivations]:
    """What encodes some tokens at once, on the device of the weights.

    Args:
        weight: Its type is that of the product: bfloat16 uses tensor cores, and rounds every
            pre-activation to bfloat16; float32 is several times slower.
        bias: Added to the product.
        inputs: What is done to a vector first, in its own type.
        rule: Which latents fire.
        compiled: Whether ``torch.compile`` is to fuse what stands around the product.
    """
    typed_bias = bias.to(weight.dtype)

    def choose(x: Float[Tensor, "token d_in"]) -> _Chosen:
        rows = inputs.prepared(x).to(weight.dtype)
        if rule.gated is not None:
            product = rows @ weight.T
            return _Chosen(product, None, ~(product + typed_bias <= 0))
        pre = torch.addmm(typed_bias, rows, weight.T)
        if rule.k is None:
            return _Chosen(pre, None, ~(pre <= (0.0 if rule.threshold is None else rule.threshold)))
        return _largest(pre, rule.k, rule.n_groups)

    run = torch.compile(choose) if compiled else choose

    def encode(x: Float[Tensor, "token d_in"]) -> SparseActivations:
        pre, latents, fires = run(x)
        token, place = torch.nonzero(fires, as_tuple=True)
        latent = place if latents is None else latents[token, place]
        value = pre[token, place].float()
        if rule.gated is not None:
            value = rule.gated.scale[latent] * value + rule.gated.bias[latent]
            fires = ~(value <= 0)
            token, latent, value = token[fires], latent[fires], value[fires]
        # A sum that overflowed counts as infinite, as on a CPU, and is refused where it is kept.
        return SparseActivations(token, latent, value.masked_fill(value.isnan(), torch.inf))

    return encode


def _largest(pre: Float[Tensor, "token num_latents"], k: int, n_groups: int) -> _Chosen:
    """The k largest of each group."""
    if n_groups == 1:
        values, latents = pre.topk(k, dim=-1, sorted=False)
    else:
        groups = pre.unflatten(-1, (n_groups, -1))
        values, within = groups.topk(k, dim=-1, sorted=False)
        first = torch.arange(n_groups, device=pre.device) * groups.shape[-1]
        values, latents = values.flatten(1), (within + first[:, None]).flatten(1)
    return _Chosen(values, latents, ~(values <= 0))
