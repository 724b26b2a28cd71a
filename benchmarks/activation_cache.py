"""The activation cache against the one that is written first (``plain_cache``).

GPT-NeoX models of the shapes of pythia-70m and 160m with random weights (a smaller vocabulary, no
output head), coders of 32,768 latents, Zipf tokens, batches of 32 contexts of 256. Ours is all of
it: spool, sorted Parquet in a store, counts and the statistics of every latent (but for those that
its decoder promotes); the other one saves its non-zeros. Beside each ratio: how much of the least
possible time, which is the forward pass to the last hookpoint and one product with each encoder at
the rate of large products in the arithmetic used, ours takes. Tokens per CPU-second, one thread.
"""

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from autointerp_dagster.adapters.cache import CachedLayers, cache_layers
from autointerp_dagster.adapters.manifests import Blob
from autointerp_dagster.adapters.shards import write_shard
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.adapters.subject_models import SubjectModel, open_subject_model
from autointerp_dagster.core.activation_statistics import StatisticsBuilder
from autointerp_dagster.core.config import SubjectModelConfig
from autointerp_dagster.core.hooks import captured
from autointerp_dagster.core.schemas import LATENT_STATISTICS
from autointerp_dagster.core.sparse_coders import LinearCoder, Threshold, TopK
from autointerp_dagster.core.sparse_coders.protocol import PlacedCoder
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import Cell, LatentRange, LayerKey, silent
from benchmarks.data import zipf_dataset
from benchmarks.measure import Result, cpu_seconds
from benchmarks.peak import peak_mb
from benchmarks.plain_cache import (
    Encode,
    PlainCache,
    dense_jump_relu,
    dense_topk,
    plain_cache,
    read_splits,
    save_splits,
)

VOCAB, CONTEXT_LEN, N_CONTEXTS, BATCH = 4096, 256, 32, 32
NUM_LATENTS, K = 32_768, 32
JUMP_THRESHOLD = 4.98
"""About 68 latents exceed it on a token of layer 0."""
STARTS = range(0, NUM_LATENTS, 8192)
REPEATS = 2
SHARE_BAR = 0.6
N_MEMORY_CONTEXTS, MEMORY_BAR = 8, 6.0


class Case(NamedTuple):
    """One bar."""

    name: str
    d_in: int
    n_layers: int
    n_heads: int
    hooked: tuple[int, ...]
    bar: float
    bar_without_bfloat16: float
    """On a CPU that does not multiply bfloat16 in hardware."""
    jumps: bool = False
    """A JumpReLU instead of a TopK coder."""


CASES = (
    Case("TopK, layer 0 of 6", 512, 6, 8, (0,), 4.0, 2.5),
    Case("TopK, layers 0 to 2 of 6", 512, 6, 8, (0, 1, 2), 3.0, 2.0),
    Case("TopK, layer 5 of 6", 512, 6, 8, (5,), 1.5, 1.2),
    Case("JumpReLU, layer 0 of 6", 512, 6, 8, (0,), 2.8, 2.8, jumps=True),
    Case("TopK, layer 0 of 12", 768, 12, 12, (0,), 5.5, 3.3),
)


class Setup(NamedTuple):
    """What both versions are given."""

    model: SubjectModel
    dataset: TokenDataset
    coders: dict[LayerKey, LinearCoder]
    folder: Path


def run() -> list[Result]:
    """A ratio and a share of the limit for each case, and the ratio of the memory."""
    torch.set_num_threads(1)
    results: list[Result] = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            setup = _setup(case, Path(folder))
            results.extend(_measured(case, setup))
            if case is CASES[0]:
                results.append(_memory(setup))
    return results


def _measured(case: Case, setup: Setup) -> list[Result]:
    ours_s, plain_s, limit_s = [], [], []
    for _ in range(REPEATS):
        ours, seconds = cpu_seconds(lambda: _ours(setup))
        ours_s.append(seconds)
        limit_s.append(_limit_s(setup))
        plain, seconds = cpu_seconds(lambda: _plain(setup, N_CONTEXTS, BATCH))
        plain_s.append(seconds)
        _assert_same(setup, ours, plain)
    bar = case.bar if torch.cpu._is_avx512_bf16_supported() else case.bar_without_bfloat16
    ratio = statistics.median(p / o for p, o in zip(plain_s, ours_s, strict=True))
    share = statistics.median(m / o for m, o in zip(limit_s, ours_s, strict=True))
    name = f"activation cache, {case.name}"
    return [
        Result(f"{name}: against dense tensors", ratio, bar, "x tokens/CPU-s"),
        Result(f"{name}: share of the limit", share, SHARE_BAR, "of the least time"),
    ]


class Ours(NamedTuple):
    """What our version gives."""

    store: Store
    activations: dict[LayerKey, list[Blob]]
    """By range."""
    firing_counts: dict[LayerKey, pl.DataFrame]


def _ours(setup: Setup) -> Ours:
    model, dataset, coders, folder = setup
    ranges = [LatentRange(start, start + STARTS.step) for start in STARTS]
    of_layer = dict.fromkeys(coders, ranges)
    store = Store(tempfile.mkdtemp(dir=folder))  # a new one, so that nothing is there already
    placed = {x: PlacedCoder(coder, x.hookpoint, x.hookpoint) for x, coder in coders.items()}
    with cache_layers(model, dataset, placed, of_layer, folder / "spool", silent) as cached:
        blobs = {
            layer: [_stored(cached, Cell(layer, of), dataset, store) for of in ranges]
            for layer in coders
        }
        counts = {layer: cached.firing_counts(layer) for layer in coders}
    return Ours(store, blobs, counts)


def _stored(cached: CachedLayers, cell: Cell, dataset: TokenDataset, store: Store) -> Blob:
    """As the stage does it: the statistics see the rows on their way to the store."""
    builder = StatisticsBuilder(dataset, range(cell.range.start, cell.range.stop))

    def observed() -> Iterator[pl.DataFrame]:
        for frame in cached.frames(cell.layer, cell.range):
            builder.add(frame)
            yield frame

    n_rows = cached.firing_counts(cell.layer)["n_tokens"].to_numpy().astype(np.int64)
    blob, _ = write_shard(store, observed(), n_rows[cell.range.start : cell.range.stop])
    store.put_table(LATENT_STATISTICS, builder.table(cell.layer))
    return blob


def _plain(setup: Setup, n_contexts: int, batch_size: int) -> PlainCache:
    tokens = torch.from_numpy(setup.dataset.tokens).view(-1, CONTEXT_LEN)[:n_contexts].long()
    encoders = {layer.hookpoint: _dense(coder) for layer, coder in setup.coders.items()}
    cache = plain_cache(setup.model.base_model, encoders, tokens, batch_size)
    save_splits(cache, STARTS, setup.folder)
    return cache


def _dense(coder: LinearCoder) -> Encode:
    if isinstance(coder.activation, Threshold):
        return dense_jump_relu(coder.encoder, coder.bias, coder.activation.threshold)
    return dense_topk(coder.encoder, coder.bias, coder.b_dec, K)


def _limit_s(setup: Setup) -> float:
    """The forward pass to the last hookpoint and the products, with nothing else."""
    tokens = torch.from_numpy(setup.dataset.tokens).view(-1, CONTEXT_LEN).long()
    names = [layer.hookpoint for layer in setup.coders]

    def forward() -> None:
        for batch in tokens.split(BATCH):
            with torch.inference_mode(), captured(setup.model.base_model, names):
                setup.model.base_model(input_ids=batch, use_cache=False)

    coder = next(iter(setup.coders.values()))
    dtype = getattr(torch, str(coder.describe()["screen"]))
    n_flop = 2 * tokens.numel() * coder.encoder.numel() * len(setup.coders)
    return cpu_seconds(forward)[1] + n_flop / _flop_per_s(coder.d_in, dtype)


def _flop_per_s(d_in: int, dtype: torch.dtype) -> float:
    """The best of a few products with an encoder."""
    n_rows, n_columns = 1024, 8192
    rows, columns = torch.ones(n_rows, d_in, dtype=dtype), torch.ones(n_columns, d_in, dtype=dtype)
    out = torch.empty(n_rows, n_columns, dtype=dtype)
    times = [cpu_seconds(lambda: torch.mm(rows, columns.T, out=out))[1] for _ in range(6)]
    return 2 * n_rows * n_columns * d_in / min(times)


def _memory(setup: Setup) -> Result:
    """Peak of all of it for 8 contexts of 256 at once, beyond the weights."""
    n, dataset, model = N_MEMORY_CONTEXTS, setup.dataset, setup.model
    offsets = dataset.offsets[: n + 1]
    few = replace(
        dataset,
        tokens=dataset.tokens[: offsets[-1]],
        offsets=offsets,
        contexts=dataset.contexts.head(n),
    )
    config, model.config = model.config, model.config.model_copy(update={"batch_size": n})
    few_setup = setup._replace(dataset=few)
    ours = statistics.median(peak_mb(lambda: _ours(few_setup)) for _ in range(3))
    plain = statistics.median(peak_mb(lambda: _plain(few_setup, n, n)) for _ in range(3))
    model.config = config
    name = "activation cache: peak memory of dense tensors, 8 x 256 tokens, against ours"
    return Result(name, plain / ours, MEMORY_BAR, "x MB")


def _assert_same(setup: Setup, ours: Ours, plain: PlainCache) -> None:
    """The same, but where the last bit of float32 decides: a tie at rank k, a step of bfloat16."""
    keys = ["latent", "context", "position"]
    for layer, blobs in ours.activations.items():
        found = pl.concat([ours.store.table(blob) for blob in blobs])
        split = read_splits(STARTS, setup.folder, layer.hookpoint)
        expected = pl.DataFrame(split._asdict()).cast(
            {"latent": pl.UInt32, "context": pl.UInt32, "position": pl.UInt16}
        )
        n = found.height
        both = found.join(expected, on=keys, how="full", suffix="_plain")
        n_one_sided = int(
            both.select(pl.col("activation", "value").is_null()).sum().sum_horizontal().item()
        )
        step = ((pl.col("activation") - pl.col("value")).abs() / pl.col("activation")).max()
        assert n > 0.9 * N_CONTEXTS * CONTEXT_LEN * K
        assert n_one_sided <= 4e-5 * n, n_one_sided
        assert both.select(step).item() <= 2**-7
        assert found.equals(found.sort(keys))
        counts = ours.firing_counts[layer]["n_tokens"].to_numpy().astype(np.int64)
        assert np.abs(counts - plain.n_tokens[layer.hookpoint].numpy()).sum() <= 4e-5 * n


def _setup(case: Case, folder: Path) -> Setup:
    model = _model(case, folder / "model")
    _ = model.base_model  # loaded before the clock runs
    dataset = zipf_dataset(N_CONTEXTS, CONTEXT_LEN, VOCAB)
    dataset = TokenDataset(
        dataset.tokens, dataset.offsets, dataset.contexts, dataset.documents, bos_id=None
    )  # the plain version keeps what fires on BOS
    layers = [LayerKey("sae", f"layers.{index}") for index in case.hooked]
    make = _jump_relu if case.jumps else _topk
    return Setup(model, dataset, {x: make(case.d_in, i) for i, x in enumerate(layers)}, folder)


def _topk(d_in: int, seed: int) -> LinearCoder:
    generator = torch.Generator().manual_seed(seed)
    encoder = torch.randn(NUM_LATENTS, d_in, generator=generator) / d_in**0.5
    b_dec = 0.1 * torch.randn(d_in, generator=generator)
    bias = torch.zeros(NUM_LATENTS)
    return LinearCoder(encoder, bias, encoder, b_dec, TopK(K), centre=b_dec)


def _jump_relu(d_in: int, seed: int) -> LinearCoder:
    threshold = Threshold(torch.full((NUM_LATENTS,), JUMP_THRESHOLD))
    return replace(_topk(d_in, seed), activation=threshold, centre=None)


def _model(case: Case, folder: Path) -> SubjectModel:
    tokenizer = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCAB)}))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="t0").save_pretrained(folder)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCAB,
            hidden_size=case.d_in,
            intermediate_size=4 * case.d_in,
            num_hidden_layers=case.n_layers,
            num_attention_heads=case.n_heads,
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
