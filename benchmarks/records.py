"""Latent records of a whole range at once: against a loop over latents, and how many a second.

Against the loop: 262,144 Zipf tokens in contexts of 256; 512 latents whose number of firing tokens
is log-normal around 300. Tables are compared whole: statistics, windows, splits, ranks,
near-duplicates.

How many a second: 1M tokens; 4096 latents that fire on 1,000 tokens each in the mean. From the
cache in the store to both tables in the store, as the asset does it. In both the sampling is the
default one, and the window grid, which a layer's ranges share, is made before.
"""

import tempfile
from collections.abc import Callable

from polars.testing import assert_frame_equal

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.latent_records import latent_records_of
from autointerp_dagster.core.windows import window_grid
from benchmarks.data import zipf_dataset
from benchmarks.measure import Result, by_turns, cpu_seconds
from benchmarks.plain_records import plain_records
from benchmarks.record_data import (
    LAYER,
    activations_of,
    firing_counts_of,
    log_normal,
    stored_range,
)

CONTEXT_LEN, VOCAB, SPREAD = 256, 50_000, 1.2
BAR = 20.0
"""Measured: 22 to 24; 20.6 with 1024 latents, where n-grams kept by the plain version are used more
often. That version is a careful one: 7 ms per latent.
"""
ALL_BAR, DISTINCT_BAR = 2000.0, 1000.0
"""Latents per CPU-second, without and with the removal of near-duplicates."""
REPEATS = 3


def run() -> list[Result]:
    """Latents per CPU-second, as a ratio and as they are."""
    return [_against_a_loop(), *_rates()]


def _against_a_loop() -> Result:
    config, n_latents = SamplingConfig(), 512
    dataset = zipf_dataset(1024, CONTEXT_LEN, VOCAB)
    activations = activations_of(dataset, log_normal(n_latents, 600, SPREAD, 65_000))
    counts = firing_counts_of(activations, n_latents)
    grid = window_grid(dataset, config)
    arguments = (activations, counts, dataset, LAYER, range(n_latents), config, grid)
    pair = by_turns(lambda: latent_records_of(*arguments), lambda: plain_records(*arguments))
    assert_frame_equal(pair.ours.latents, pair.plain.latents, rel_tol=1e-6)
    assert_frame_equal(pair.ours.windows, pair.plain.windows)
    assert pair.ours.latents["status"].value_counts().height >= 2
    assert pair.ours.latents["n_near_duplicates"].sum() > 0
    return Result("records against a loop over latents", pair.ratio, BAR, "x latents/CPU-s")


def _rates() -> list[Result]:
    n_latents = 4096
    dataset = zipf_dataset(4096, CONTEXT_LEN, VOCAB)
    bars = {"all windows": (None, ALL_BAR), "near-duplicates removed": (0.8, DISTINCT_BAR)}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        cached = stored_range(folder, dataset, log_normal(n_latents, 1000, SPREAD, 250_000))
        for name, (threshold, bar) in bars.items():
            config = SamplingConfig(near_duplicate_jaccard=threshold)
            grid = window_grid(dataset, config)
            seconds = least_seconds(lambda config=config, grid=grid: cached.put(config, grid))
            bench = f"records at 1M tokens, with Parquet, {name}"
            results.append(Result(bench, n_latents / seconds, bar, "latents/CPU-s"))
    return results


def least_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of the quickest of some repeats: what else the machine does only adds to them."""
    return min(cpu_seconds(work)[1] for _ in range(REPEATS))
