"""Latents that fire in more windows than are drawn from: draws stay those of all windows."""

import numpy as np
import polars as pl
import pytest
from dataset_builders import BOS, make_dataset
from record_oracle import LAYER, activations_of, counts_of

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.latent_records import RecordTables, latent_records_of
from autointerp_dagster.core.rng import address_key, hash_priority
from autointerp_dagster.core.schemas import ACTIVATIONS, FIRING_COUNTS
from autointerp_dagster.core.windows import SPLITS, window_grid

LIMIT = 1000
N_CONTEXTS, CONTEXT_LEN, WINDOW_LEN = 800, 16, 4


def config_of(**changes) -> SamplingConfig:
    defaults = {
        "window_len": WINDOW_LEN, "n_train": 20, "n_select": 8, "n_test": 40, "n_quantiles": 4,
        "near_duplicate_jaccard": None, "max_windows": LIMIT, "max_window_firing_rate": 1.0,
    }  # fmt: skip
    return SamplingConfig(**{**defaults, **changes})


def corpus(seed: int = 0, n_contexts: int = N_CONTEXTS):
    rng = np.random.default_rng(seed)
    contexts = rng.integers(1, 5000, (n_contexts, CONTEXT_LEN))
    return make_dataset([(f"{i}", [[BOS, *c[1:].tolist()]]) for i, c in enumerate(contexts)])


def frequent(
    n_latents: int, rate: float = 0.5, seed: int = 1, n_contexts: int = N_CONTEXTS
) -> pl.DataFrame:
    """Latents that fire on half of all tokens, so in about 15 of 16 windows of four."""
    fires = np.random.default_rng(seed).random((n_latents, n_contexts, CONTEXT_LEN)) < rate
    fires[:, :, 0] = False
    latent, context, position = np.nonzero(fires)
    values = np.random.default_rng(seed + 1).lognormal(0, 1, len(latent)).astype(np.float32)
    values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)  # bfloat16: ties
    columns = {"latent": latent, "context": context, "position": position, "activation": values}
    return ACTIVATIONS.conform(pl.DataFrame(columns))


def counted(activations: pl.DataFrame) -> pl.DataFrame:
    return FIRING_COUNTS.conform(
        activations.group_by("latent").agg(
            n_tokens=pl.len(),
            n_contexts=pl.col("context").n_unique(),
            max_activation=pl.col("activation").max(),
        )
    )


def tables_of(
    activations: pl.DataFrame, config: SamplingConfig, n_contexts: int = N_CONTEXTS
) -> RecordTables:
    counts, dataset = counted(activations), corpus(n_contexts=n_contexts)
    return latent_records_of(activations, counts, dataset, LAYER, range(counts.height), config)


@pytest.mark.parametrize("mode", ["fixed", "centred"])
@pytest.mark.parametrize("strategy", ["quantiles", "random", "top", "mix"])
def test_the_windows_drawn_are_those_that_would_be_drawn_without_a_limit(strategy, mode):
    activations = frequent(3, 0.5 if mode == "fixed" else 0.3)
    changes = {"strategy": strategy, "window_mode": mode}
    limited = tables_of(activations, config_of(**changes))
    unlimited = tables_of(activations, config_of(**changes, max_windows=10**6))
    assert limited.latents["n_windows"].min() > LIMIT
    assert limited.windows.equals(unlimited.windows)
    assert limited.latents.equals(unlimited.latents)
    assert limited.windows.filter("is_activating").height == 3 * 68


@pytest.mark.parametrize("strategy", ["quantiles", "random", "top", "mix"])
def test_a_sample_that_is_hardly_more_than_is_drawn_is_no_other_either(strategy):
    # 600 of about 5,900 test windows, with a sample of 1,000 of all three splits.
    activations = frequent(1, n_contexts=3200)
    changes = {"strategy": strategy, "n_test": 600, "n_quantiles": 10}
    limited = tables_of(activations, config_of(**changes), 3200)
    unlimited = tables_of(activations, config_of(**changes, max_windows=10**6), 3200)
    assert limited.latents["n_test"].item() > 4 * 600 > LIMIT
    assert limited.windows.equals(unlimited.windows)
    drawn = limited.windows.filter("is_activating", split="test")
    assert drawn.height == 600
    n_of_band = drawn.group_by("quantile").len().sort("quantile")["len"].to_list()
    if strategy == "quantiles":
        assert n_of_band == [60] * 10
    if strategy == "random":
        assert 30 < min(n_of_band) <= max(n_of_band) < 90


def test_counts_and_statistics_are_of_all_windows():
    activations = frequent(1)
    row = tables_of(activations, config_of()).latents.row(0, named=True)
    fired = set(activations.select("context", pl.col("position") // WINDOW_LEN).rows())
    assert row["n_windows"] == len(fired) > 2 * LIMIT
    assert row["n_train"] + row["n_select"] + row["n_test"] == len(fired)
    assert row["n_tokens"] == activations.height
    values = activations["activation"].to_numpy()
    assert row["activation_quantiles"] == np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist()


def test_top_windows_are_the_strongest_of_all_windows():
    activations = frequent(1)
    config = config_of(strategy="top")
    windows = tables_of(activations, config).windows.filter("is_activating")
    grid = window_grid(corpus(), config)
    maxima = activations.group_by("context", start=pl.col("position") // 4 * 4).agg(
        pl.col("activation").max()
    )
    split = [SPLITS[grid.split[grid.first_window[c]]] for c in maxima["context"]]
    by_split = maxima.with_columns(pl.Series("split", split))
    for name, n in (("train", 20), ("select", 8), ("test", 40)):
        strongest = by_split.filter(split=name)["activation"].sort(descending=True)[:n]
        drawn = windows.filter(split=name)["max_activation"].sort(descending=True)
        assert drawn.to_list() == strongest.to_list()


def test_the_sample_holds_the_smallest_hashed_priorities():
    # All windows of one strength, one quantile: the draw is by priority alone, from all windows.
    activations = frequent(1).with_columns(activation=pl.lit(1.0, dtype=pl.Float32))
    config = config_of(n_quantiles=1)
    windows = tables_of(activations, config).windows.filter("is_activating", split="test")
    grid = window_grid(corpus(), config)
    key = hash_priority(address_key(0, LAYER, 0, "windows"), np.array([1]))
    fired = {c << 16 | p // 4 * 4 for c, p in activations.select("context", "position").rows()}
    is_test = {int(i) for i, s in zip(grid.window_id, grid.split, strict=True) if s == 2}
    ids = np.array(sorted(fired & is_test), dtype=np.uint64)
    order = np.argsort(hash_priority(np.repeat(key, len(ids)), ids))
    assert set(windows["window_id"]) == set(ids[order][:40].tolist())


def test_draws_from_a_sample_favour_no_place_and_no_strength():
    # 60 latents that fire alike but for their address: every test window has the same chance.
    one = frequent(1)
    n = 60
    activations = pl.concat(one.with_columns(latent=pl.lit(i, dtype=pl.UInt32)) for i in range(n))
    config = config_of(strategy="random")
    drawn = tables_of(activations, config).windows.filter("is_activating", split="test")
    maxima = one.group_by("context", start=pl.col("position") // 4 * 4).agg(
        pl.col("activation").max()
    )
    grid = window_grid(corpus(), config)
    split = grid.split[grid.first_window[maxima["context"].to_numpy()]]
    test = maxima.filter(pl.Series(split == 2)).sort("activation", "context", "start")
    bands = test.with_row_index("i").with_columns(
        band=pl.col("i") * 10 // test.height, context=pl.col("context").cast(pl.UInt32)
    )
    for group in ("start", "band"):
        expected = bands.group_by(group).agg(share=pl.len() / test.height).sort(group)
        found = (
            drawn.with_columns(pl.col("start").cast(bands.schema["start"]))
            .join(bands.select("context", "start", "band"), on=["context", "start"])
            .group_by(group)
            .agg(n=pl.len())
            .sort(group)
        )
        assert found["n"].sum() == n * 40
        wanted = expected["share"].to_numpy() * n * 40
        freedom = len(wanted) - 1
        # Chi-square; 5 standard deviations above its mean.
        distance = ((found["n"].to_numpy() - wanted) ** 2 / wanted).sum()
        assert distance < freedom + 5 * (2 * freedom) ** 0.5


def test_a_latent_below_the_limit_is_untouched_beside_one_above_it():
    both = pl.concat(
        [frequent(1), frequent(1, 0.02, seed=5).with_columns(latent=pl.lit(1).cast(pl.UInt32))]
    )
    both = ACTIVATIONS.conform(both)
    together = tables_of(both, config_of())
    alone = latent_records_of(
        both.filter(latent=1), counted(both), corpus(), LAYER, range(1, 2), config_of()
    )
    assert together.latents["n_windows"].to_list()[1] < LIMIT
    assert together.windows.filter(latent=1).equals(alone.windows)


def test_near_duplicates_of_a_frequent_latent_are_looked_for_where_windows_are_drawn_from():
    # Every document twice: of 20,000 pairs of equal windows only those of the sample are looked at.
    contexts = [[BOS, *range(c, c + 15)] for c in range(1, 401)]
    dataset = make_dataset([(f"{i}-{c[1]}", [c]) for i in range(2) for c in contexts])
    rows = [(0, c, p, 1.0 + p) for c in range(800) for p in range(1, 16)]
    counts = counts_of(rows, 1)
    for mode in ("fixed", "centred"):
        config = config_of(near_duplicate_jaccard=0.9, window_mode=mode)
        tables = latent_records_of(activations_of(rows), counts, dataset, LAYER, range(1), config)
        shown = tables.windows.filter("is_activating")
        tokens = {
            (row["split"], tuple(dataset.context_tokens(row["context"])[row["start"] :][:4]))
            for row in shown.iter_rows(named=True)
        }
        train = {t for split, t in tokens if split == "train"}
        assert not train & {t for split, t in tokens if split != "train"}
        assert 0 < tables.latents["n_near_duplicates"].item() < LIMIT + 4 * 68
