"""The activation cache against a plain loop: whole forward pass, dense encoding, ``nonzero``.

A GPT-NeoX of pythia-70m's shape with random weights, its hook at the first of six layers, a TopK
coder of 32,768 latents, k = 32, on Zipf tokens. Both versions give a sorted table of non-zeros and
how often each latent fires. The plain one is what one writes first: it runs all layers, keeps a
dense [token, latent] tensor of each batch, looks for what is not zero and adds up over it.
(The vocabulary is smaller, no output head runs.) Both do one product with the encoder in float32,
480 of our 640 microseconds per token, which bounds the ratio.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from autointerp_dagster.adapters.spool import cache_layers
from autointerp_dagster.adapters.subject_models import SubjectModel, open_subject_model
from autointerp_dagster.core.config import SubjectModelConfig
from autointerp_dagster.core.schemas import ACTIVATIONS, FIRING_COUNTS
from autointerp_dagster.core.sparse_coders import TopKCoder
from autointerp_dagster.core.tokens import TokenDataset, context_batches
from autointerp_dagster.core.types import LatentRange, LayerKey, silent
from benchmarks.data import zipf_dataset
from benchmarks.measure import Result, by_turns

LAYER = LayerKey("sae", "layers.0")
D_IN, N_LAYERS, VOCAB = 512, 6, 4096
NUM_LATENTS, K = 32_768, 32
N_CONTEXTS, CONTEXT_LEN, BATCH = 16, 256, 8
RANGE_SIZE = 8192
BAR = 2.0
"""Measured: 2.3 to 2.4."""


class Cached(NamedTuple):
    """What both versions give."""

    activations: pl.DataFrame
    firing_counts: pl.DataFrame


def run() -> list[Result]:
    """Tokens per CPU-second, as a ratio."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model, coder = _model(Path(folder) / "model"), _coder()
        dataset = zipf_dataset(N_CONTEXTS, CONTEXT_LEN, VOCAB)
        _ = model.base_model  # loaded before the clock runs
        pair = by_turns(
            lambda: _ours(model, dataset, coder, Path(folder)),
            lambda: _plain(model, dataset, coder),
        )
    _assert_same(pair.ours, pair.plain)
    return [Result("activation_cache against a dense loop", pair.ratio, BAR, "x tokens/CPU-s")]


def _ours(model: SubjectModel, dataset: TokenDataset, coder: TopKCoder, folder: Path) -> Cached:
    starts = range(0, NUM_LATENTS, RANGE_SIZE)
    ranges = [LatentRange(start, start + RANGE_SIZE) for start in starts]
    with cache_layers(model, dataset, {LAYER: coder}, {LAYER: ranges}, folder, silent) as cached:
        activations = pl.concat([cached.cell(LAYER, latents) for latents in ranges])
        return Cached(activations, cached.firing_counts(LAYER))


def _plain(model: SubjectModel, dataset: TokenDataset, coder: TopKCoder) -> Cached:
    hidden: list[torch.Tensor] = []
    hooked = model.base_model.get_submodule(LAYER.hookpoint)

    def keep(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        del module, inputs
        hidden.append(output)

    handle = hooked.register_forward_hook(keep)
    first = dataset.first_visible
    rows: list[pl.DataFrame] = []
    n_tokens, n_contexts = np.zeros(NUM_LATENTS, np.int64), np.zeros(NUM_LATENTS, np.int64)
    largest = np.zeros(NUM_LATENTS, np.float32)
    with torch.inference_mode():
        for contexts in context_batches(dataset, BATCH):
            tokens = np.stack([dataset.context_tokens(int(context)) for context in contexts])
            model.base_model(input_ids=torch.from_numpy(tokens).long(), use_cache=False)
            dense = _encode_dense(coder, hidden.pop()[:, first:])
            fires = dense > 0
            n_tokens += fires.sum((0, 1)).numpy()
            n_contexts += fires.any(1).sum(0).numpy()
            largest = np.maximum(largest, dense.amax((0, 1)).numpy())
            context, position, latent = torch.nonzero(fires, as_tuple=True)
            found = {
                "latent": latent.numpy().astype(np.uint32),
                "context": contexts[context.numpy()].astype(np.uint32),
                "position": (position.numpy() + first).astype(np.uint16),
                "activation": dense[context, position, latent].numpy(),
            }
            rows.append(pl.DataFrame(found))
    handle.remove()
    counts = pl.DataFrame(
        {"latent": range(NUM_LATENTS), "n_tokens": n_tokens, "n_contexts": n_contexts}
    ).with_columns(max_activation=pl.Series(np.where(largest > 0, largest, np.nan)).fill_nan(None))
    return Cached(ACTIVATIONS.conform(pl.concat(rows)), FIRING_COUNTS.conform(counts))


def _encode_dense(coder: TopKCoder, vectors: torch.Tensor) -> torch.Tensor:
    found = (vectors - coder.b_dec) @ coder.encoder.T + coder.bias
    kept = found.relu().topk(coder.k)
    return torch.zeros_like(found).scatter_(-1, kept.indices, kept.values).bfloat16().float()


def _assert_same(ours: Cached, plain: Cached) -> None:
    """The same, but where the last bit of float32 decides: a tie at rank k, a step of bfloat16."""
    keys = ["latent", "context", "position"]
    both = ours.activations.join(plain.activations, on=keys, how="full", suffix="_plain")
    n = ours.activations.height
    n_one_sided = both.select(pl.col("activation", "activation_plain").is_null()).sum()
    n_moved = both.filter(pl.col("activation") != pl.col("activation_plain")).height
    step = (pl.col("activation") - pl.col("activation_plain")).abs() / pl.col("activation")
    assert n > 0.9 * N_CONTEXTS * (CONTEXT_LEN - 1) * K
    assert n_one_sided.sum_horizontal().item() <= 2e-5 * n, n_one_sided
    assert n_moved <= 1e-3 * n, n_moved
    assert both.select(step.max()).item() <= 2**-7
    counts = ours.firing_counts.join(plain.firing_counts, on="latent", suffix="_plain")
    for name in ("n_tokens", "n_contexts"):
        off = counts.select((pl.col(name).cast(int) - pl.col(f"{name}_plain").cast(int)).abs())
        assert off.sum().item() <= 2e-5 * n


def _coder() -> TopKCoder:
    generator = torch.Generator().manual_seed(0)
    encoder = torch.randn(NUM_LATENTS, D_IN, generator=generator) / D_IN**0.5
    return TopKCoder(
        encoder=encoder,
        bias=torch.zeros(NUM_LATENTS),
        decoder=encoder,
        b_dec=0.1 * torch.randn(D_IN, generator=generator),
        k=K,
    )


def _model(folder: Path) -> SubjectModel:
    tokenizer = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCAB)}))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="t0").save_pretrained(folder)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCAB,
            hidden_size=D_IN,
            intermediate_size=4 * D_IN,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=8,
            max_position_embeddings=CONTEXT_LEN,
        )
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.05, generator=generator)
    model.save_pretrained(folder)
    config = SubjectModelConfig(
        source=str(folder), dtype="float32", device="cpu", batch_size=BATCH, threads=1
    )
    return open_subject_model(config)
