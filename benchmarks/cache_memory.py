"""Peak memory of a whole pass, stored and all, at one and at ten million tokens.

The subject model is an embedding and one linear layer and the coder is narrow, so that nothing but
the tokens and their non-zeros grows: 8 per token, all in one range of latents, of which one fires
on every token. Each size runs in a process of its own. Its figure is the most anonymous memory
(resident pages that are no file's) that it ever had, looked at every millisecond from outside, less
what it had when packages were imported and model and coder were there. That is what the stage does:
reading the tokens, forward passes, the spool with checkpoints, the merge, statistics and the
Parquet file. Tokens are read from their file as they are needed; the operating system may forget
them again, so they are not counted.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import polars as pl
import torch
from torch import nn

from autointerp_dagster.adapters.cache import SpoolSettings, cache_layers
from autointerp_dagster.adapters.datasets import read_dataset, write_dataset
from autointerp_dagster.adapters.manifests import Manifest, Provenance
from autointerp_dagster.adapters.shards import write_shard
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.activation_statistics import StatisticsBuilder
from autointerp_dagster.core.schemas import CONTEXTS, DOCUMENTS
from autointerp_dagster.core.sparse_coders import LinearCoder, TopK
from autointerp_dagster.core.sparse_coders.protocol import PlacedCoder
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LatentRange, LayerKey, silent
from benchmarks.measure import Result

LAYER = LayerKey("sae", "layers.0")
D_IN, VOCAB, NUM_LATENTS, K = 16, 4096, 256, 8
CONTEXT_LEN, BATCH = 256, 32
SIZES = (1_000_000, 10_000_000)
"""Tokens."""
REPEATS = 3
"""Runs of each size, of which the median counts: what allocators keep differs by tens of MB."""
GROWTH_BAR = 1.15
_NAME = "peak memory, 10M against 1M tokens"


def run() -> list[Result]:
    """How much more memory ten times the tokens take."""
    found = {size: [_measured(size) for _ in range(REPEATS)] for size in SIZES}
    small, large = ({one["n_rows"] for one in runs} for runs in found.values())
    assert large == {10 * n_rows for n_rows in small}
    before, after = (median(one["peak_mb"] for one in runs) for runs in found.values())
    return [Result(_NAME, after / before, GROWTH_BAR, f"x {before:.0f} MB", is_cost=True)]


def _measured(n_tokens: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.cache_memory", str(n_tokens), folder]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            child.stdout.readline()  # it is ready
            before = peak = _anonymous_bytes(child.pid)
            while child.poll() is None:
                peak = max(peak, _anonymous_bytes(child.pid))
                time.sleep(0.001)
            found = json.loads(child.stdout.read())
        assert child.returncode == 0
    return {"peak_mb": (peak - before) / 2**20, **found}


def _anonymous_bytes(pid: int) -> int:
    """Resident memory that is no file's; 0 of a process that has just ended."""
    _, resident, of_files, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(resident) - int(of_files)) * resource.getpagesize()


class _Model(nn.Module):
    """What a pass asks of a base model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, D_IN)
        self.layers = nn.ModuleList([nn.Linear(D_IN, D_IN)])

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        del use_cache
        return self.layers[0](self.embedding(input_ids))


def _subject() -> SimpleNamespace:
    with torch.no_grad():
        model = _Model().eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return SimpleNamespace(
        base_model=model,
        device=torch.device("cpu"),
        config=SimpleNamespace(batch_size=BATCH),
        width_of=lambda _: D_IN,
    )


def _coder() -> LinearCoder:
    generator = torch.Generator().manual_seed(1)
    encoder = torch.randn(NUM_LATENTS, D_IN, generator=generator)
    bias = torch.zeros(NUM_LATENTS)
    bias[0] = 50.0  # fires on every token
    return LinearCoder(encoder, bias, encoder, torch.zeros(D_IN), TopK(K))


def _write_dataset(n_tokens: int, folder: Path) -> Manifest:
    least = SIZES[0] // CONTEXT_LEN
    n_contexts = least * (n_tokens // SIZES[0])
    some = np.random.default_rng(0).integers(1, VOCAB, size=(least, CONTEXT_LEN), dtype=np.int32)
    tokens = np.resize(some, (n_contexts, CONTEXT_LEN))
    tokens[:, 0] = 0
    contexts = pl.DataFrame(
        {
            "context": np.arange(n_contexts),
            "document": 0,
            "offset": np.arange(n_contexts) * (CONTEXT_LEN - 1),
            "n_tokens": CONTEXT_LEN,
        }
    )
    offsets = np.arange(n_contexts + 1, dtype=np.int64) * CONTEXT_LEN
    dataset = TokenDataset(
        tokens.reshape(-1), offsets, CONTEXTS.conform(contexts), DOCUMENTS.empty(), 0
    )
    store = Store(folder)
    return store.commit(
        Manifest(
            stage="token_dataset",
            stage_version="1",
            cell="all",
            input_fingerprint="f",
            content_hash="c",
            complete=True,
            parameters={},
            upstream=(),
            blobs=tuple(write_dataset(store, dataset)),
            provenance=Provenance(study="s", run_id="r", started="", finished="", seconds=0.0),
        )
    )


def _pass(store: Store, manifest: Manifest, folder: Path) -> int:
    """Rows that were stored."""
    subject, coder = _subject(), PlacedCoder(_coder(), LAYER.hookpoint, LAYER.hookpoint)
    print("ready", flush=True)
    dataset, latents = read_dataset(store, manifest), LatentRange(0, NUM_LATENTS)
    ours = ({LAYER: coder}, {LAYER: [latents]}, folder / "spool", silent)
    settings = SpoolSettings(checkpoint_s=1.0)  # so that both sizes are interrupted by some
    with cache_layers(subject, dataset, *ours, settings=settings) as cached:  # type: ignore[arg-type]
        counts = cached.firing_counts(LAYER)["n_tokens"].to_numpy().astype(np.int64)
        builder = StatisticsBuilder(dataset, range(NUM_LATENTS))

        def observed():
            for frame in cached.frames(LAYER, latents):
                builder.add(frame)
                yield frame

        blob, _ = write_shard(store, observed(), counts)
        builder.table(LAYER)
    return blob.n_rows or 0


def _child(n_tokens: int, folder: Path) -> None:
    """Makes the dataset in a process of its own, so that this one's peak is the pass's."""
    torch.set_num_threads(1)
    store = Store(folder / "store")
    code = "import sys; from pathlib import Path; from benchmarks import cache_memory as m; "
    code += "print(m._write_dataset(int(sys.argv[1]), Path(sys.argv[2])).path)"
    command = [sys.executable, "-c", code, str(n_tokens), str(folder / "store")]
    path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    print(json.dumps({"n_rows": _pass(store, store.manifest(path), folder)}))


if __name__ == "__main__":
    _child(int(sys.argv[1]), Path(sys.argv[2]))
