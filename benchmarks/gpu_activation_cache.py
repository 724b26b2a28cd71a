"""The activation cache on a GPU: tokens per second, and the share of the card's product rate.

A Llama of about a billion random weights in bfloat16, its hook in the middle, a TopK coder of
65,536 latents. Of this repository it needs ``core`` and ``adapters`` alone, so it runs on a bare
machine with torch and transformers: ``python -m benchmarks gpu_activation_cache``.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from autointerp_dagster.core.activations import FiringCounts, chunks_of
from autointerp_dagster.core.sparse_coders import Computing, LinearCoder, TopK
from autointerp_dagster.core.sparse_coders.protocol import PlacedCoder
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LayerKey
from benchmarks.data import zipf_dataset
from benchmarks.measure import NotMeasured, Result

BAR = 0.5
NAME = "activation cache on a GPU"


class Shape(NamedTuple):
    """Sizes of the model, the coder and the data."""

    d_in: int = 2048
    n_layers: int = 16
    n_heads: int = 32
    intermediate: int = 8192
    vocab: int = 32_000
    num_latents: int = 65_536
    k: int = 32
    context_len: int = 256
    n_contexts: int = 4096
    batch_size: int = 64
    product: int = 8192
    """Rows and columns of the product that the card's rate is measured with."""

    @property
    def hooked(self) -> int:
        """The layer in the middle."""
        return self.n_layers // 2 - 1


class Measured(NamedTuple):
    """What one run gives."""

    tokens_per_s: float
    flop_per_token: float
    flop_per_s: float
    """Of a large product in bfloat16."""

    @property
    def share(self) -> float:
        """Of the card's rate."""
        return self.tokens_per_s * self.flop_per_token / self.flop_per_s


def run() -> list[Result | NotMeasured]:
    """The share, and the speed it stands for."""
    if not torch.cuda.is_available():
        return [NotMeasured(NAME, "no CUDA device here")]
    measured = measure(Shape(), torch.device("cuda"))
    return [
        Result(f"{NAME}: share of the product rate", measured.share, BAR, "of its FLOP/s"),
        Result(f"{NAME}: speed", measured.tokens_per_s, 0.0, "tokens/s"),
    ]


@torch.inference_mode()
def measure(shape: Shape, device: torch.device) -> Measured:
    """Two chunks to warm up, then the whole dataset."""
    model, coder = _model(shape, device), _coder(shape, device)
    dataset = zipf_dataset(shape.n_contexts, shape.context_len, shape.vocab)
    _cache(model, coder, dataset, shape, device, max_chunks=2)
    seconds = _seconds(lambda: _cache(model, coder, dataset, shape, device), device)
    flop = _flop_per_token(model, shape)
    return Measured(len(dataset.tokens) / seconds, flop, _flop_per_s(shape.product, device))


def _cache(
    model: nn.Module,
    coder: LinearCoder,
    dataset: TokenDataset,
    shape: Shape,
    device: torch.device,
    max_chunks: int | None = None,
) -> None:
    layer = LayerKey("sae", f"layers.{shape.hooked}")
    counts = FiringCounts(shape.num_latents)
    placed = {layer: PlacedCoder(coder, layer.hookpoint, layer.hookpoint)}
    chunks = chunks_of(model, dataset, placed, shape.batch_size, device)
    for number, chunk in enumerate(chunks, start=1):
        counts.add(chunk.nonzeros[layer])
        if number == max_chunks:
            break


def _flop_per_token(model: LlamaModel, shape: Shape) -> float:
    """Weights to the hook, attention to the half of a context that comes before, the encoder."""
    layers = model.layers[: shape.hooked + 1]
    n_weights = sum(parameter.numel() for parameter in layers.parameters())
    attention = 2 * shape.context_len * shape.d_in * len(layers)
    return 2 * n_weights + attention + 2 * shape.d_in * shape.num_latents


def _flop_per_s(size: int, device: torch.device) -> float:
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    _seconds(lambda: a @ a, device)
    repeats = 10
    seconds = _seconds(lambda: [torch.mm(a, a) for _ in range(repeats)], device)
    return 2 * size**3 * repeats / seconds


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _coder(shape: Shape, device: torch.device) -> LinearCoder:
    generator = torch.Generator().manual_seed(0)
    encoder = torch.randn(shape.num_latents, shape.d_in, generator=generator) / shape.d_in**0.5
    coder = LinearCoder(
        encoder=encoder,
        bias=torch.zeros(shape.num_latents),
        decoder=encoder,
        b_dec=torch.zeros(shape.d_in),
        activation=TopK(shape.k),
        computing=Computing(precision="bfloat16"),
    )
    return coder.to(device)


def _model(shape: Shape, device: torch.device) -> LlamaModel:
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.d_in,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=max(1, shape.n_heads // 4),
        max_position_embeddings=shape.context_len,
    )
    with device:
        model = LlamaModel(config).eval()
    generator = torch.Generator(device).manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02, generator=generator)
    return model.bfloat16()
