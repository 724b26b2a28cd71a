"""Windows around a latent's peaks, by hand; the whole tables are compared in test_latent_records.

Defect 2: a flag that centred windows where it should not have, and lost what neighbours held.
"""

import numpy as np
import polars as pl
import pytest
from dataset_builders import BOS, make_dataset, random_documents
from hypothesis import given, settings
from hypothesis import strategies as st
from record_oracle import LAYER, random_cache, records, small_config

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.latent_records import records_in_order
from autointerp_dagster.core.latent_records.centred import without_overlaps


def centred_config(**changes) -> SamplingConfig:
    defaults = {"window_mode": "centred", "min_tokens": 1, "max_window_firing_rate": 1.0}
    return small_config(**{**defaults, **changes})


def shown(contexts, rows, **changes) -> list[tuple[int, int, list[float]]]:
    """(context, start, activations) of all activating windows of latent 0, all of them drawn."""
    dataset = make_dataset([("d0", contexts)])
    config = centred_config(n_train=50, n_select=50, n_test=50, **changes)
    windows = records(dataset, rows, 1, config).windows.filter("is_activating")
    return sorted(windows.select("context", "start", "activations").rows())


def context(n: int) -> list[int]:
    return [BOS, *range(10, 9 + n)]


def test_the_maximum_stands_at_three_quarters_with_every_activation_around_it():
    # Windows of 8: the peak at position 17 is to stand at index 6, so the window is 11 .. 18. Of
    # the grid's windows 8 .. 15 and 16 .. 23 it takes both; position 20 lies outside.
    rows = [(0, 0, 9, 0.5), (0, 0, 12, 2.0), (0, 0, 14, 3.0), (0, 0, 17, 5.0), (0, 0, 18, 1.0)]
    rows += [(0, 0, 20, 4.0)]
    assert shown([context(40)], rows) == [(0, 11, [0, 2, 0, 3, 0, 0, 5, 1])]


def test_fixed_windows_of_the_same_latent_stay_on_the_grid():
    rows = [(0, 0, 12, 2.0), (0, 0, 17, 5.0)]
    found = shown([context(40)], rows, window_mode="fixed")
    assert found == [(0, 8, [0, 0, 0, 0, 2, 0, 0, 0]), (0, 16, [0, 5, 0, 0, 0, 0, 0, 0])]


def test_a_window_is_clamped_to_its_context():
    # 20 tokens: the peak at 2 would begin at -4, the one at 19 lies in no whole window of the grid,
    # the one at 15 begins at 9 and ends at 16, and 19 is not in it.
    rows = [(0, 0, 2, 1.0), (0, 0, 15, 3.0), (0, 0, 19, 2.0)]
    assert shown([context(20)], rows) == [
        (0, 0, [0, 0, 1, 0, 0, 0, 0, 0]),
        (0, 9, [0, 0, 0, 0, 0, 0, 3, 0]),
    ]
    # 17 tokens: the peak at 15 would begin at 9, which is just as far as it goes: 9 + 8 = 17.
    # 16 tokens: it begins at 8 and stands at index 7.
    assert shown([context(17)], [(0, 0, 15, 3.0)])[0][1] == 9
    assert shown([context(16)], [(0, 0, 15, 3.0)]) == [(0, 8, [0, 0, 0, 0, 0, 0, 0, 3])]


def test_what_is_stronger_past_the_last_whole_window_drops_no_window():
    # 20 tokens: position 16 is in no whole window and so has no window of its own.
    rows = [(0, 0, 15, 4.0), (0, 0, 16, 5.0)]
    assert shown([context(20)], rows) == [(0, 9, [0, 0, 0, 0, 0, 0, 4, 5])]
    windows = records(make_dataset([("d0", [context(20)])]), rows, 1, centred_config()).windows
    assert windows["max_activation"].to_list() == [5.0]


@pytest.mark.parametrize("seed", range(3))
def test_no_silent_window_has_a_token_of_a_window_that_is_shown(seed):
    config = centred_config(near_duplicate_jaccard=None, n_negative_test=40)
    dataset, rows = random_cache(seed, [0.02, 0.05, 0.1])
    windows = records(dataset, rows, 3, config).windows
    latents = windows.group_by("latent", "context").agg(
        pl.col("start").filter("is_activating").alias("shown"),
        pl.col("start").filter(~pl.col("is_activating")).alias("silent"),
    )
    pairs = latents.explode("shown").explode("silent").drop_nulls()
    assert pairs.height > 5
    apart = (pairs["shown"].cast(pl.Int64) - pairs["silent"].cast(pl.Int64)).abs()
    assert apart.min() >= 8


def test_a_neighbouring_context_is_never_reached_into():
    # The last token of one context and the first one of the next are neighbours in the dataset.
    rows = [(0, 0, 15, 1.0), (0, 1, 1, 2.0), (0, 1, 6, 7.0)]
    assert shown([context(16), context(16)], rows) == [
        (0, 8, [0, 0, 0, 0, 0, 0, 0, 1]),
        (1, 0, [0, 2, 0, 0, 0, 0, 7, 0]),
    ]


def test_of_two_windows_that_overlap_the_stronger_is_shown():
    # Peaks at 14 (window 8 .. 15), 23 (17 .. 24), 31 (25 .. 32): nothing overlaps. With the last at
    # 30 (24 .. 31) it meets the second, which is weaker.
    apart = [(0, 0, 14, 1.0), (0, 0, 23, 2.0), (0, 0, 31, 3.0)]
    assert [start for _, start, _ in shown([context(48)], apart)] == [8, 17, 25]
    meeting = [*apart[:2], (0, 0, 30, 3.0)]
    assert [start for _, start, _ in shown([context(48)], meeting)] == [8, 24]


def test_a_peak_in_the_shade_of_a_stronger_one_has_no_window_even_if_that_has_none_either():
    # 30 is the strongest; 24 (18 .. 25) overlaps 24 .. 31; 17 (11 .. 18) meets 24's window alone,
    # and neither holds the other's peak, so 17 is shown. At 18 (12 .. 19) with 5.0 at 19, in
    # whose shade it stands, it is not, though 19 (13 .. 20) goes.
    rows = [(0, 0, 17, 1.0), (0, 0, 24, 2.0), (0, 0, 30, 3.0)]
    assert [start for _, start, _ in shown([context(48)], rows)] == [11, 24]
    # 15 (9 .. 16) holds 16, which is stronger and overlapped by 22 (16 .. 23).
    rows = [(0, 0, 15, 1.0), (0, 0, 16, 2.0), (0, 0, 22, 1.5), (0, 0, 24, 9.0)]
    assert [start for _, start, _ in shown([context(48)], rows)] == [10, 18]


def test_counts_and_quantiles_are_those_of_all_windows_of_the_grid():
    rows = [(0, 0, 14, 1.0), (0, 0, 23, 2.0), (0, 0, 30, 3.0)]
    dataset = make_dataset([("d0", [context(48)])])
    tables = records(dataset, rows, 1, centred_config(n_quantiles=3))
    latent = tables.latents.row(0, named=True)
    assert latent["n_windows"] == 3
    assert latent["n_train"] + latent["n_select"] + latent["n_test"] == 3
    drawn = tables.windows.filter("is_activating").sort("start")
    # 23 is the second strongest of three; its window goes, but 14 stays in the last band.
    assert drawn.select("start", "quantile", "max_activation").rows() == [(8, 2, 1.0), (24, 0, 3.0)]


def test_every_centred_window_has_its_own_maximum_in_its_place_and_none_overlaps():
    config = centred_config(n_train=500, n_select=500, n_test=500, near_duplicate_jaccard=None)
    dataset, rows = random_cache(31, [0.05, 0.3, 0.9])
    tables = records(dataset, rows, 3, config)
    values = {r[:3]: r[3] for r in rows}
    ends: dict[tuple[int, int], int] = {}
    windows = tables.windows.filter("is_activating").sort("latent", "window_id")
    assert windows.height > 100
    for row in windows.iter_rows(named=True):
        latent, number, start = row["latent"], row["context"], row["start"]
        length = len(dataset.context_tokens(number))
        expected = [values.get((latent, number, start + i), 0.0) for i in range(8)]
        assert row["activations"] == expected
        assert row["max_activation"] == max(expected)
        own = expected[: length // 8 * 8 - start]  # the tail has no windows
        places = [i for i, value in enumerate(own) if value == max(own)]
        assert 6 in places or (start == 0 and min(places) < 6) or start == length - 8
        assert start >= ends.get((latent, number), 0)
        ends[latent, number] = start + 8
        assert row["window_id"] == number << 16 | start
    for record in records_in_order(tables, dataset, LAYER, [0, 1, 2]):
        for window in record.windows:
            assert BOS not in window.tokens
            assert len(window.tokens) == len(window.activations) == (7 if window.start == 0 else 8)


def greedy(spans: list[tuple[int, int]], window_len: int) -> list[bool]:
    """``spans`` as (start, strength)."""
    kept: list[int] = []
    for i in sorted(range(len(spans)), key=lambda i: spans[i][1]):
        if all(abs(spans[i][0] - spans[j][0]) >= window_len for j in kept):
            kept.append(i)
    return [i in kept for i in range(len(spans))]


@settings(max_examples=60, deadline=None)
@given(gaps=st.lists(st.integers(1, 12), max_size=30), seed=st.integers(0, 1000))
def test_rounds_for_all_at_once_keep_what_a_greedy_loop_keeps(gaps, seed):
    # A window never meets the one after the next, as windows around peaks of the grid's do not.
    starts, length = [0], 8
    for gap in gaps:
        after_next = starts[-2] + length if len(starts) > 1 else 0
        starts.append(max(starts[-1] + gap, after_next))
    strength = np.random.default_rng(seed).permutation(len(starts))
    zeros = np.zeros(len(starts), dtype=np.int64)
    got = without_overlaps(zeros, zeros, np.array(starts), strength, length)
    assert got.tolist() == greedy(list(zip(starts, strength.tolist(), strict=True)), length)


def test_windows_of_other_latents_and_contexts_overlap_nothing():
    latent, at = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    start, strength = np.array([3, 3, 3, 9]), np.array([0, 1, 0, 1])
    got = without_overlaps(latent, at, start, strength, 8)
    assert got.tolist() == [True, True, True, False]


@pytest.mark.parametrize("mode", ["fixed", "centred"])
def test_without_a_threshold_no_near_duplicate_is_looked_for(mode):
    documents = [(f"d{i}", [context(32)]) for i in range(30)]  # every document is the same text
    rows = [(0, i, 14, 1.0 + i) for i in range(30)]
    changes = {"window_mode": mode, "min_tokens": 1}
    dataset = make_dataset(documents)
    strict = records(dataset, rows, 1, small_config(**changes))
    loose = records(dataset, rows, 1, small_config(**changes, near_duplicate_jaccard=None))
    assert strict.latents["n_near_duplicates"].item() > 0
    assert strict.windows.filter("is_activating", split="test").is_empty()
    assert loose.latents["n_near_duplicates"].item() == 0
    assert loose.windows.filter("is_activating", split="test").height == 10


def test_contexts_shorter_than_a_window_and_an_empty_cache_are_no_trouble():
    dataset = make_dataset([("a", [[BOS, 1, 2], *random_documents(3, 1)[0][1]])])
    rows = [(0, 0, 1, 1.0), (0, 1, 5, 1.0)]
    assert records(dataset, rows, 1, centred_config()).latents["n_windows"].item() == 1
    assert records(dataset, [], 2, centred_config()).windows.is_empty()
