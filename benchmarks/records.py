"""Latent records of a whole range at once against one latent after another.

262,144 Zipf tokens in contexts of 256; latents whose number of firing tokens is log-normal around
300; the default sampling. The window grid is made once for both, as a layer's ranges share it.
Tables are compared whole: statistics, windows, splits, ranks, near-duplicates.
"""

import numpy as np
import polars as pl
from polars.testing import assert_frame_equal

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.latent_records import latent_records_of
from autointerp_dagster.core.schemas import ACTIVATIONS, FIRING_COUNTS
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.core.windows import window_grid
from benchmarks.data import zipf_dataset
from benchmarks.measure import Result, by_turns
from benchmarks.plain_records import plain_records

LAYER = LayerKey("sae", "layers.9")
N_CONTEXTS, CONTEXT_LEN, VOCAB = 1024, 256, 50_000
N_LATENTS = 512
MEDIAN_TOKENS, SPREAD = 300, 1.2
BAR = 20.0
"""Measured: 22 to 24; 20.6 with 1024 latents, where n-grams kept by the plain version are used more
often. That version is a careful one: 7 ms per latent.
"""


def run() -> list[Result]:
    """Latents per CPU-second, as a ratio."""
    config = SamplingConfig()
    dataset = zipf_dataset(N_CONTEXTS, CONTEXT_LEN, VOCAB)
    activations = _activations(dataset)
    counts = _firing_counts(activations)
    grid = window_grid(dataset, config)
    arguments = (activations, counts, dataset, LAYER, range(N_LATENTS), config, grid)
    pair = by_turns(lambda: latent_records_of(*arguments), lambda: plain_records(*arguments))
    assert_frame_equal(pair.ours.latents, pair.plain.latents, rel_tol=1e-6)
    assert_frame_equal(pair.ours.windows, pair.plain.windows)
    assert pair.ours.latents["status"].value_counts().height >= 2
    assert pair.ours.latents["n_near_duplicates"].sum() > 0
    return [Result("records against a loop over latents", pair.ratio, BAR, "x latents/CPU-s")]


def _activations(dataset: TokenDataset) -> pl.DataFrame:
    """Each latent on tokens of its own choice, at random."""
    rng = np.random.default_rng(1)
    visible = CONTEXT_LEN - dataset.first_visible
    n_places = (len(dataset.offsets) - 1) * visible
    numbers = np.minimum(rng.lognormal(np.log(MEDIAN_TOKENS), SPREAD, N_LATENTS), n_places // 4)
    places = [rng.choice(n_places, int(n), replace=False) for n in numbers]
    place = np.concatenate(places)
    values = rng.lognormal(0, 1, len(place)).astype(np.float32)
    frame = pl.DataFrame(
        {
            "latent": np.repeat(np.arange(N_LATENTS), [len(p) for p in places]),
            "context": place // visible,
            "position": place % visible + dataset.first_visible,
            "activation": (values.view(np.uint32) & 0xFFFF0000).view(np.float32),  # bfloat16
        }
    )
    return ACTIVATIONS.conform(frame)


def _firing_counts(activations: pl.DataFrame) -> pl.DataFrame:
    counted = activations.group_by("latent").agg(
        n_tokens=pl.len(),
        n_contexts=pl.col("context").n_unique(),
        max_activation=pl.col("activation").max(),
    )
    latents = pl.DataFrame({"latent": range(N_LATENTS)}, schema={"latent": pl.UInt32})
    both = latents.join(counted, on="latent", how="left")
    return FIRING_COUNTS.conform(both.with_columns(pl.col("n_tokens", "n_contexts").fill_null(0)))
