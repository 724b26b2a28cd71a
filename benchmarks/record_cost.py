"""What one latent's record costs, and that it does not depend on the size of the corpus.

1. At 10M tokens, latents that fire on 10,000 of them each, near-duplicates removed: CPU
   milliseconds per latent from activations to tables in memory, without Parquet.
2. The same for latents that fire on 1,000 tokens in the mean (log-normal), spread over 1M or over
   10M tokens, by turns.

The window grid, which a layer's ranges share, is made before.
"""

import tempfile
from collections.abc import Callable

import numpy as np

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.windows import window_grid
from benchmarks.data import zipf_dataset
from benchmarks.measure import Result, by_turns
from benchmarks.record_data import Range, log_normal, stored_range
from benchmarks.records import CONTEXT_LEN, SPREAD, VOCAB, least_seconds

COST_BAR, GROWTH_BAR = 1.5, 1.3
N_FREQUENT, N_SPREAD = 256, 2048


def run() -> list[Result]:
    """Milliseconds per latent, and the ratio of two corpora."""
    config = SamplingConfig()
    with tempfile.TemporaryDirectory() as folder:
        small = _world(f"{folder}/small", 4096)
        large = _world(f"{folder}/large", 40_960)
        pair = by_turns(_records(small, config), _records(large, config))
        assert abs(pair.ours / pair.plain - 1) < 0.05
        n_tokens = np.full(N_FREQUENT, 10_000)
        frequent = stored_range(f"{folder}/frequent", large.dataset, n_tokens)
        seconds = least_seconds(_records(frequent, config))
    return [
        Result(
            "record of a latent with 10k activations at 10M tokens",
            seconds / N_FREQUENT * 1000,
            COST_BAR,
            "CPU-ms/latent",
            is_cost=True,
        ),
        Result(
            "records of latents at 10M tokens against 1M",
            pair.ratio,
            GROWTH_BAR,
            "x CPU-s/latent",
            is_cost=True,
        ),
    ]


def _world(folder: str, n_contexts: int) -> Range:
    dataset = zipf_dataset(n_contexts, CONTEXT_LEN, VOCAB)
    return stored_range(folder, dataset, log_normal(N_SPREAD, 1000, SPREAD, 250_000))


def _records(cached: Range, config: SamplingConfig) -> Callable[[], int]:
    """Makes all records from activations in memory; how many windows they have."""
    blocks, grid = list(cached.blocks()), window_grid(cached.dataset, config)
    return lambda: sum(t.windows.height for t in cached.tables(blocks, config, grid))
