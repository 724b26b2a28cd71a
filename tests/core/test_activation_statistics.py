import math
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from dataset_builders import make_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

from autointerp_dagster.core import activation_statistics
from autointerp_dagster.core.activation_statistics import (
    HISTOGRAM_EDGES,
    N_BINS,
    StatisticsBuilder,
)
from autointerp_dagster.core.schemas import ACTIVATIONS, LATENT_STATISTICS
from autointerp_dagster.core.types import LayerKey

LAYER = LayerKey("sae", "layers.3")
LATENTS = range(10, 16)


def dataset_of(lengths, bos_id=0, n_ids=7, seed=0):
    draw = np.random.default_rng(seed)
    return make_dataset(
        [(f"d{i}", [draw.integers(1, n_ids, n).tolist()]) for i, n in enumerate(lengths)], bos_id
    )


def rows_of(*rows):
    """(latent, context, position, activation)."""
    names = list(ACTIVATIONS.columns)
    return ACTIVATIONS.conform(pl.DataFrame(list(rows), schema=names, orient="row"))


def random_rows(dataset, latents, rate, seed):
    draw = np.random.default_rng(seed)
    rows = []
    for latent in latents:
        own = rate * draw.uniform() if latent % 5 else 0
        for context, length in enumerate(np.diff(dataset.offsets)):
            for position in range(dataset.first_visible, length):
                if draw.uniform() < own:
                    exponent = draw.integers(-16, 20)
                    rows.append(
                        (
                            latent,
                            context,
                            position,
                            float(2.0**exponent * (1 + draw.integers(0, 128) / 128)),
                        )
                    )
    return rows_of(*rows) if rows else ACTIVATIONS.empty()


def statistics_of(frame, dataset, latents=LATENTS, cuts=(), **tokens):
    builder = StatisticsBuilder(dataset, latents)
    bounds = [0, *sorted(cuts), frame.height]
    for start, stop in pairwise(bounds):
        builder.add(frame[start:stop])
    return builder.table(LAYER, **tokens)


def bucket(position, dataset):
    return (position - dataset.first_visible).bit_length()


def miller_madow_information(fires, buckets):
    """From a sample per token, in nats; the plug-in part by scikit-learn."""
    pairs = list(zip(fires, buckets, strict=True))
    n_cells, n_values = len(set(pairs)), len(set(fires)) + len(set(buckets))
    bias = (n_cells - n_values + 1) / (2 * len(pairs))
    return max(0.0, float(mutual_info_score(fires, buckets)) - bias)


def oracle(frame, dataset, latent):
    """One latent by plain loops."""
    mine = frame.filter(pl.col("latent") == latent).to_dicts()
    if not mine:
        return {
            "n_tokens": 0, "n_contexts": 0, "max_activation": None, "mean_activation": None,
            "activation_histogram": [], "top_tokens": [], "top_token_shares": [],
            "single_token_share": None, "position_information": None,
        }  # fmt: skip
    summed, counted = defaultdict(float), Counter()
    histogram = [0] * N_BINS
    for row in mine:
        token = int(dataset.context_tokens(row["context"])[row["position"]])
        summed[token] += row["activation"]
        counted[token] += 1
        histogram[sum(edge <= row["activation"] for edge in HISTOGRAM_EDGES)] += 1
    total = sum(row["activation"] for row in mine)
    top = sorted(summed, key=lambda token: (-summed[token], token))[:8]
    fired = {(row["context"], row["position"]) for row in mine}
    kept = [
        (context, position)
        for context, length in enumerate(np.diff(dataset.offsets))
        for position in range(dataset.first_visible, length)
    ]
    return {
        "n_tokens": len(mine),
        "n_contexts": len({row["context"] for row in mine}),
        "max_activation": max(row["activation"] for row in mine),
        "mean_activation": total / len(mine),
        "activation_histogram": histogram,
        "top_tokens": top,
        "top_token_shares": [summed[token] / total for token in top],
        "single_token_share": max(counted.values()) / len(mine),
        "position_information": miller_madow_information(
            [place in fired for place in kept],
            [bucket(position, dataset) for _, position in kept],
        ),
    }


def assert_as_oracle(table, frame, dataset, latents):
    assert table["latent"].to_list() == list(latents)
    for row in table.iter_rows(named=True):
        for name, value in oracle(frame, dataset, row["latent"]).items():
            if name in ("activation_histogram", "top_tokens") or value is None:
                assert row[name] == value, (row["latent"], name)
            else:
                assert row[name] == pytest.approx(value, rel=1e-9, abs=1e-12), (row["latent"], name)


contexts = st.lists(st.integers(1, 12), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(contexts, st.sampled_from([0, None]), st.floats(0, 1), st.integers(0, 2**32), st.data())
def test_statistics_are_those_of_plain_loops_however_rows_are_cut(lengths, bos, rate, seed, data):
    dataset = dataset_of(lengths, bos, n_ids=data.draw(st.sampled_from([2, 3, 60])), seed=seed)
    frame = random_rows(dataset, LATENTS, rate, seed)
    whole = statistics_of(frame, dataset)
    assert_as_oracle(whole, frame, dataset, LATENTS)
    cuts = data.draw(st.lists(st.integers(0, frame.height), max_size=6))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(activation_statistics, "_PIECE", data.draw(st.integers(1, 9)))
        assert statistics_of(frame, dataset, cuts=cuts).equals(whole)


def test_sums_are_the_same_to_the_last_bit_wherever_a_frame_ends():
    """In floating point .1 + .2 + .3 is another number than .1 + (.2 + .3)."""
    dataset = make_dataset([("d", [[0] + [1] * 40])])
    draw = np.random.default_rng(1)
    activations = np.float32(10.0 ** draw.uniform(-30, 30, 40)).tolist()
    frame = rows_of(*((10, 0, i + 1, a) for i, a in enumerate(activations)))
    whole = statistics_of(frame, dataset)
    assert whole["mean_activation"][0] == sum(activations[1:], start=activations[0]) / 40
    for cut in range(1, 40):
        assert statistics_of(frame, dataset, cuts=[cut, min(40, cut + 3)]).equals(whole)


def test_statistics_by_hand():
    dataset = make_dataset([("d", [[0, 5, 6, 5], [0, 6, 5, 7]])])
    frame = rows_of((11, 0, 1, 1.0), (11, 0, 2, 4.0), (11, 1, 2, 1.0), (12, 1, 1, 3.0))
    table = statistics_of(frame, dataset, range(11, 14))
    row = table.row(0, named=True)
    assert (row["n_tokens"], row["n_contexts"]) == (3, 2)
    assert (row["max_activation"], row["mean_activation"]) == (4, 2)
    assert row["top_tokens"] == [6, 5]  # 4 against 1 + 1
    assert row["top_token_shares"] == [4 / 6, 2 / 6]
    assert row["single_token_share"] == 2 / 3  # token 5, which is not the first of the list
    assert row["activation_histogram"] == [
        {1.0: 2, 4.0: 1}.get(edge, 0) for edge in (0.0, *HISTOGRAM_EDGES)
    ]
    assert table["n_tokens"].to_list() == [3, 1, 0]
    assert (table["coder"][0], table["hookpoint"][0]) == ("sae", "layers.3")


def test_a_latent_that_fires_at_first_positions_alone_tells_all_about_them():
    """Of 8 contexts of 1 + 4 tokens it fires at position 1: fires is known from the bucket.

    H(fires) = H(1/4); 3 buckets (1; 2; 3, 4) of which each has one kind: 3 cells, 2 + 3 values.
    """
    dataset = make_dataset([("d", [[0, 1, 1, 1, 1]] * 8)])
    frame = rows_of(*((10, context, 1, 1.0) for context in range(8)))
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    found = statistics_of(frame, dataset)["position_information"][0]
    assert found == pytest.approx(entropy + 1 / (2 * 32))


def test_a_latent_that_fires_on_every_token_tells_nothing_of_positions():
    dataset = dataset_of([9, 4, 12], n_ids=30)
    frame = rows_of(
        *(
            (10, context, position, 2.0)
            for context, length in enumerate([9, 4, 12])
            for position in range(1, length)
        )
    )
    row = statistics_of(frame, dataset).row(0, named=True)
    assert row["n_tokens"] == 8 + 3 + 11
    assert row["n_contexts"] == 3
    assert row["position_information"] == 0
    assert_as_oracle(statistics_of(frame, dataset), frame, dataset, LATENTS)


def test_long_contexts_alone_have_late_positions_and_the_baseline_knows():
    """It fires on half of the tokens of each bucket: nothing to tell, whatever the lengths."""
    dataset = make_dataset([("d", [[1, 1, 1, 1]] * 2 + [[1, 1]] * 2)], bos_id=None)
    frame = rows_of((10, 0, 0, 1.0), (10, 0, 1, 1.0), (10, 0, 2, 1.0), (10, 0, 3, 1.0),
                    (10, 2, 0, 1.0), (10, 2, 1, 1.0))  # fmt: skip
    builder = StatisticsBuilder(dataset, LATENTS)
    builder.add(frame)
    assert builder.table(LAYER)["position_information"][0] == 0


def test_what_chance_alone_makes_is_taken_off_on_average():
    """Under independence the plug-in estimate is (buckets - 1) / 2N too high: here 5 / 2N."""
    dataset = dataset_of([33] * 40, n_ids=9)  # kept: 32 positions, buckets 1 1 2 4 8 16
    draw = np.random.default_rng(3)
    latents = range(300)
    fires = draw.uniform(size=(300, 40, 32)) < 0.3
    latent, context, position = np.nonzero(fires)
    frame = pl.DataFrame(
        {
            "latent": latent.astype(np.uint32),
            "context": context.astype(np.uint32),
            "position": (position + 1).astype(np.uint16),
            "activation": np.ones(latent.size, dtype=np.float32),
        }
    )
    information = statistics_of(frame, dataset, latents)["position_information"]
    chance = 5 / (2 * 40 * 32)
    # No estimate is below 0, so the mean is a little above 0: E max(chi2(5) - 5, 0) / 2N = .25.
    assert 0 < information.mean() < 0.4 * chance


def test_only_the_eight_strongest_tokens_are_kept_and_ties_go_to_smaller_ids():
    ids = list(range(1, 101))
    dataset = make_dataset([("d", [[0, *ids[::-1]]])])
    frame = rows_of(*((10, 0, i + 1, 5.0 if i in (3, 50) else 1.0) for i in range(100)))
    row = statistics_of(frame, dataset).row(0, named=True)
    assert row["top_tokens"] == [50, 97, 1, 2, 3, 4, 5, 6]
    assert row["top_token_shares"] == [5 / 108] * 2 + [1 / 108] * 6
    assert row["single_token_share"] == 1 / 100


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 99))
def test_the_strongest_tokens_are_found_among_few_and_many(sizes, n_values, seed):
    draw = np.random.default_rng(seed)
    dataset = make_dataset([("d", [[0, *draw.permutation(90) + 1]])])
    rows = [
        (i, 0, int(p) + 1, float(draw.integers(1, n_values + 1)))
        for i, size in enumerate(sizes)
        for p in sorted(draw.permutation(90)[:size])
    ]
    frame = rows_of(*rows)
    table = statistics_of(frame, dataset, range(len(sizes)))
    assert_as_oracle(table, frame, dataset, range(len(sizes)))


def test_edges_are_two_per_power_of_two_and_belong_to_the_bin_above():
    assert len(HISTOGRAM_EDGES) == 63
    assert list(HISTOGRAM_EDGES) == sorted(set(HISTOGRAM_EDGES))
    dataset = make_dataset([("d", [[0] + [1] * 63] * 2)])
    below = np.nextafter(np.float32(HISTOGRAM_EDGES), np.float32(0)).tolist()
    frame = rows_of(
        *((10, 0, i + 1, edge) for i, edge in enumerate(HISTOGRAM_EDGES)),
        *((11, 0, i + 1, value) for i, value in enumerate(below)),
    )
    table = statistics_of(frame, dataset)
    assert table["activation_histogram"][0].to_list() == [0] + [1] * 63
    assert table["activation_histogram"][1].to_list() == [1] * 63 + [0]


def test_activations_beyond_float16_and_tiny_ones_are_counted():
    dataset = make_dataset([("d", [[0, 1, 2]])])
    frame = rows_of((10, 0, 1, 3e38), (10, 0, 2, 1e-40))
    row = statistics_of(frame, dataset).row(0, named=True)
    assert row["activation_histogram"] == [1] + [0] * (N_BINS - 2) + [1]
    assert row["max_activation"] == pytest.approx(3e38)
    assert row["top_tokens"] == [1, 2]


def test_a_dead_latent_has_a_row_without_numbers():
    dataset = dataset_of([5])
    row = statistics_of(ACTIVATIONS.empty(), dataset, range(3, 4), promoted=[[7, 8]]).row(
        0, named=True
    )
    assert (row["latent"], row["n_tokens"], row["n_contexts"]) == (3, 0, 0)
    assert row["max_activation"] is row["mean_activation"] is None
    assert row["single_token_share"] is row["position_information"] is None
    assert row["activation_histogram"] == row["top_tokens"] == row["top_token_shares"] == []
    assert row["promoted_tokens"] == [7, 8]
    assert row["suppressed_tokens"] is None


def test_a_range_without_latents_has_an_empty_table():
    table = statistics_of(ACTIVATIONS.empty(), dataset_of([5]), range(8, 8), promoted=[])
    assert table.equals(LATENT_STATISTICS.empty())


def test_the_table_can_be_asked_for_in_between():
    dataset = dataset_of([9, 9])
    frame = random_rows(dataset, LATENTS, 0.9, 5)
    builder = StatisticsBuilder(dataset, LATENTS)
    for i in range(frame.height):
        builder.add(frame[i : i + 1])
        assert builder.table(LAYER)["n_tokens"].sum() == i + 1
    assert builder.table(LAYER).equals(statistics_of(frame, dataset))


def test_promoted_tokens_of_another_number_of_latents_are_refused():
    with pytest.raises(ValueError, match="promoted_tokens of 2 latents, wanted 6"):
        statistics_of(ACTIVATIONS.empty(), dataset_of([5]), promoted=[[1], [2]])


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ((9, 0, 1, 1.0), "outside of the range"),
        ((16, 0, 1, 1.0), "outside of the range"),
        ((12, 2, 1, 1.0), "position that is not kept"),
        ((12, 0, 0, 1.0), "position that is not kept"),  # BOS
        ((12, 1, 3, 1.0), "position that is not kept"),  # the context is shorter
        ((12, 0, 1, 0.0), "not finite and above 0"),
        ((12, 0, 1, -1.0), "not finite and above 0"),
        ((12, 0, 1, math.nan), "not finite and above 0"),
        ((12, 0, 1, math.inf), "not finite and above 0"),
    ],
)
def test_rows_that_cannot_be_are_refused_by_name(row, fault):
    frame = pl.concat([rows_of((11, 0, 1, 1.0)), rows_of(row)]).sort("latent")
    with pytest.raises(ValueError, match=fault) as refused:
        statistics_of(frame, dataset_of([4, 3]))
    assert f"latent {row[0]}, context {row[1]}, position {row[2]}" in str(refused.value)


@pytest.mark.parametrize("cut", [(), (1,)])
@pytest.mark.parametrize("second", [(11, 0, 2, 1.0), (11, 0, 1, 1.0), (10, 1, 2, 1.0)])
def test_rows_out_of_order_or_twice_are_refused(second, cut):
    frame = pl.concat([rows_of((11, 0, 2, 1.0)), rows_of(second)])
    with pytest.raises(ValueError, match="not in order, or there twice"):
        statistics_of(frame, dataset_of([4, 3]), cuts=cut)
