"""Encoding on an accelerator: dense blocks of tokens, as many at once as its memory holds."""

import logging
from collections.abc import Callable

import torch
from jaxtyping import Float, Float32
from torch import Tensor

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
    ) -> None:
        """Keep the parts.

        Args:
            encode_block: Encodes some tokens at once.
            token_block: How many, >= 1. Halved, and kept so, whenever there is no memory for it.
        """
        self._encode_block, self._token_block = encode_block, token_block

    def describe(self) -> dict[str, object]:
        """How it computes, to be recorded."""
        return {"token_block": self._token_block}

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


def block_encoder(
    weight: Float[Tensor, "num_latents d_in"],
    bias: Float32[Tensor, " num_latents"],
    centre: Float32[Tensor, " d_in"],
    rule: Rule,
    compiled: bool,
) -> Callable[[Float[Tensor, "token d_in"]], SparseActivations]:
    """What encodes some tokens at once, on the device of the weights.

    Args:
        weight: Its type is that of the product: bfloat16 uses tensor cores, and rounds every
            pre-activation to bfloat16; float32 is several times slower.
        bias: Added to the product.
        centre: Taken off the input first, in float32.
        rule: Which latents fire.
        compiled: Whether ``torch.compile`` is to fuse what stands around the product.
    """
    typed_bias = bias.to(weight.dtype)

    def pre_activations(x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token num_latents"]:
        return torch.addmm(typed_bias, (x.float() - centre).to(weight.dtype), weight.T)

    def largest(x: Float[Tensor, "token d_in"]) -> tuple[Tensor, Tensor]:
        values, latents = pre_activations(x).topk(rule.k or 1, dim=-1, sorted=False)
        return values.float(), latents

    def above(x: Float[Tensor, "token d_in"]) -> tuple[Tensor, Tensor]:
        found = pre_activations(x)
        floor = 0.0 if rule.threshold is None else rule.threshold
        return found, ~(found <= floor)  # NaN, too: infinities of both signs

    run = torch.compile(above if rule.k is None else largest) if compiled else None

    def encode_largest(x: Float[Tensor, "token d_in"]) -> SparseActivations:
        values, latents = (run or largest)(x)
        token, slot = torch.nonzero(~(values <= 0), as_tuple=True)
        return SparseActivations(token, latents[token, slot], _never_nan(values[token, slot]))

    def encode_above(x: Float[Tensor, "token d_in"]) -> SparseActivations:
        values, fires = (run or above)(x)
        token, latent = torch.nonzero(fires, as_tuple=True)
        return SparseActivations(token, latent, _never_nan(values[token, latent].float()))

    return encode_above if rule.k is None else encode_largest


def _never_nan(values: Float32[Tensor, " nnz"]) -> Float32[Tensor, " nnz"]:
    """A sum that overflowed counts as infinite, as on a CPU, and is refused where it is kept."""
    return values.masked_fill(values.isnan(), torch.inf)
