import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autointerp_dagster.core.config import FloorsConfig, LatentSample, ScoredSample
from autointerp_dagster.core.negatives.permuting import permuted
from autointerp_dagster.core.rng import address_key, hash_priority
from autointerp_dagster.core.sampling import (
    N_DONORS,
    donors_of,
    draw_ranks,
    floor_order,
    may_be_drawn,
    order_within,
    processing_order,
    quantile_bands,
    ranks_within,
    scored_latents,
    select_latents,
    sorted_keys,
    strength_ranks,
)
from autointerp_dagster.core.schemas import FIRING_COUNTS, SELECTION
from autointerp_dagster.core.types import LayerKey

LAYER = LayerKey("sae", "layers.9")
STRATEGIES = ["quantiles", "random", "top", "mix"]


def u64(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def one_group(n: int) -> np.ndarray:
    return np.zeros(n, dtype=np.int64)


def draw(strategy: str, quantile: np.ndarray, priority: np.ndarray, n: int) -> list[int]:
    """Indices drawn from one group whose rows stand from the strongest to the weakest."""
    strength = np.arange(len(quantile))
    wanted = np.full(len(quantile), n)
    ranks = draw_ranks(strategy, one_group(len(quantile)), quantile, strength, priority, wanted)
    drawn = np.flatnonzero(ranks >= 0)
    return drawn[np.argsort(ranks[drawn])].tolist()


def priorities(n: int, seed: int = 0) -> np.ndarray:
    return hash_priority(seed, np.arange(n))


def test_ranks_are_by_before_then_priority_within_each_group():
    group = np.array([1, 0, 1, 0, 1])
    before = np.array([5, 1, 2, 1, 2])
    assert ranks_within(group, u64(1, 9, 8, 3, 2)).tolist() == [0, 1, 2, 0, 1]
    assert ranks_within(group, u64(1, 9, 8, 3, 2), before).tolist() == [2, 1, 1, 0, 0]
    assert ranks_within(one_group(0), u64()).tolist() == []


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 3),
            st.integers(0, 2**33),
            # High bits alike: the sort has room for the first bits of a priority only.
            st.sampled_from([0, 1, 2, 2**63, 2**63 + 1, 2**64 - 1]),
        )
    )
)
def test_ranks_are_exact_even_where_only_the_last_bits_of_a_priority_differ(rows):
    group = np.array([r[0] for r in rows], dtype=np.int64)
    before = np.array([r[1] for r in rows], dtype=np.int64)
    priority = np.array([r[2] for r in rows], dtype=np.uint64)
    order = sorted(range(len(rows)), key=lambda i: (rows[i], i))
    wanted = [0] * len(rows)
    for i in order:
        wanted[i] = sum(rows[j][0] == rows[i][0] for j in order[: order.index(i)])
    assert ranks_within(group, priority, before).tolist() == wanted


def test_strength_ranks_put_the_strongest_first_and_break_ties_by_priority_not_by_place():
    latent = np.array([0, 0, 0, 0, 2, 2])
    maximum = np.array([1.0, 4.0, 4.0, 4.0, 0.5, 3e38], dtype=np.float32)
    priority = u64(0, 30, 10, 20, 1, 0)
    assert strength_ranks(latent, maximum, priority).tolist() == [3, 2, 0, 1, 1, 0]


def no_ties(rows):
    return np.zeros(len(rows), dtype=np.uint64)


def test_quantile_bands_are_those_of_the_ranks_by_strength():
    rng = np.random.default_rng(5)
    latent = np.sort(rng.integers(0, 4, 500))
    maximum = rng.integers(1, 40, 500).astype(np.float32)  # many are equal
    priority = priorities(500)
    rank = strength_ranks(latent, maximum, priority)
    expected = rank * 7 // np.bincount(latent)[latent]
    found = quantile_bands(latent, maximum, lambda rows: priority[rows], 7)
    assert found.tolist() == expected.tolist()


def test_quantile_bands_have_equal_counts_and_spread_the_remainder():
    # 7 windows in 3 bands: index * 3 // 7 = 0 0 0 1 1 2 2; 2 windows in 4 bands: 0 and 2.
    latent = np.array([0] * 7 + [1] * 2)
    maximum = np.array([7, 6, 5, 4, 3, 2, 1, 7, 6], dtype=np.float32)
    assert quantile_bands(latent, maximum, no_ties, 3)[:7].tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert quantile_bands(latent, maximum, no_ties, 4)[7:].tolist() == [0, 2]


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 200), n_quantiles=st.integers(1, 12))
def test_quantile_bands_differ_by_one_at_most(n, n_quantiles):
    maximum = np.arange(n, 0, -1).astype(np.float32)
    bands = quantile_bands(one_group(n), maximum, no_ties, n_quantiles)
    counts = np.bincount(bands, minlength=n_quantiles)
    assert counts.max() - counts.min() <= 1
    assert (np.diff(bands) >= 0).all()


def test_quantiles_are_drawn_evenly():
    quantile = np.arange(100) // 10
    drawn = draw("quantiles", quantile, priorities(100), 40)
    assert np.bincount(quantile[drawn]).tolist() == [4] * 10
    # Of 43, the three that are left over go to three different quantiles.
    counts = np.bincount(quantile[draw("quantiles", quantile, priorities(100), 43)])
    assert sorted(counts.tolist()) == [4] * 7 + [5] * 3


def test_a_short_quantile_is_made_up_for_by_the_others():
    # 1, 9 and 9 windows; of 9, the first gives 1 and the others 4 each.
    quantile = np.array([0] + [1] * 9 + [2] * 9)
    drawn = draw("quantiles", quantile, priorities(19), 9)
    assert np.bincount(quantile[drawn]).tolist() == [1, 4, 4]


def test_top_takes_the_strongest_and_mix_a_fifth_of_them():
    quantile = np.arange(100) // 10
    assert draw("top", quantile, priorities(100), 5) == [0, 1, 2, 3, 4]
    drawn = draw("mix", quantile, priorities(100), 20)
    assert sorted(drawn[:4]) == [0, 1, 2, 3]
    assert len(set(drawn)) == 20
    # The other 16 are spread over the ten quantiles: one or two each.
    assert set(np.bincount(quantile[drawn[4:]], minlength=10).tolist()) == {1, 2}
    assert draw("mix", quantile, priorities(100), 1) == [0]  # rounded up, not to 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fewer_windows_than_wanted_are_all_drawn(strategy):
    assert sorted(draw(strategy, np.array([0, 1, 1]), priorities(3), 10)) == [0, 1, 2]
    assert draw(strategy, one_group(0), priorities(0), 10) == []
    assert draw(strategy, one_group(3), priorities(3), 0) == []


@settings(max_examples=40, deadline=None)
@given(
    strategy=st.sampled_from(["quantiles", "random", "top"]),
    quantile=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    n=st.integers(0, 30),
    more=st.integers(0, 30),
    seed=st.integers(0, 1000),
)
def test_a_larger_draw_begins_with_the_smaller_one(strategy, quantile, n, more, seed):
    quantile = np.sort(quantile)
    priority = priorities(len(quantile), seed)
    smaller = draw(strategy, quantile, priority, n)
    assert draw(strategy, quantile, priority, n + more)[: len(smaller)] == smaller
    assert len(smaller) == min(n, len(quantile))


@settings(max_examples=30, deadline=None)
@given(quantile=st.lists(st.integers(0, 4), min_size=1, max_size=60), n=st.integers(1, 40))
def test_the_quantile_draw_is_that_of_a_plain_loop(quantile, n):
    quantile = np.sort(quantile)
    priority = priorities(len(quantile), 7)
    left = {q: sorted(np.flatnonzero(quantile == q), key=lambda i: priority[i]) for q in range(5)}
    wanted: list[int] = []
    while any(left.values()):
        turn = [rows.pop(0) for rows in left.values() if rows]
        wanted += sorted(turn, key=lambda i: priority[i])
    assert draw("quantiles", quantile, priority, n) == wanted[:n]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_group_is_drawn_alike_alone_and_among_others(strategy):
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(5), 40)
    quantile = np.tile(np.arange(40) // 8, 5)
    strength = np.tile(np.arange(40), 5)
    priority = hash_priority(3, np.arange(200))
    wanted = np.repeat([3, 10, 0, 40, 11], 40)
    together = draw_ranks(strategy, group, quantile, strength, priority, wanted)
    for g in range(5):
        rows = rng.permutation(np.flatnonzero(group == g))
        alone = draw_ranks(
            strategy, group[rows], quantile[rows], strength[rows], priority[rows], wanted[rows]
        )
        assert np.array_equal(alone, together[rows])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 31, 1000])
def test_the_keyed_permutation_is_one(size):
    index = np.arange(size)
    for key in (0, 1, 2**63 + 11):
        where = permuted(index, np.full(size, size), np.full(size, key, dtype=np.uint64))
        assert np.array_equal(np.sort(where), index)


@pytest.mark.parametrize("size", [5, 8, 13])
def test_pairs_that_the_keyed_permutation_draws_are_uniform(size):
    n = 40_000
    keys = hash_priority(9, np.arange(n))
    first, second = (
        permuted(np.full(n, i, dtype=np.int64), np.full(n, size), keys) for i in (0, 1)
    )
    counts = np.bincount(first * size + second, minlength=size * size).reshape(size, size)
    expected = n / (size * (size - 1))
    off_diagonal = counts[~np.eye(size, dtype=bool)]
    assert counts.trace() == 0
    # Chi-square of the ordered pairs; 5 standard deviations above its mean.
    freedom = len(off_diagonal) - 1
    assert ((off_diagonal - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5


def counts_of(n_tokens: list[int]) -> pl.DataFrame:
    return FIRING_COUNTS.conform(
        pl.DataFrame(
            {
                "latent": np.arange(len(n_tokens)),
                "n_tokens": n_tokens,
                "n_contexts": n_tokens,
                "max_activation": [1.0 if n else None for n in n_tokens],
            }
        )
    )


def test_all_latents_or_a_list_are_selected_in_ascending_order():
    counts = counts_of([0, 5, 0])
    assert select_latents(LAYER, counts, "all").tolist() == [0, 1, 2]
    assert select_latents(LAYER, counts, (2, 0, 2)).tolist() == [0, 2]
    assert select_latents(LAYER, counts, ()).tolist() == []


def test_a_listed_latent_beyond_the_width_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"sae@layers\.9: latent 3 .* 3 latents"):
        select_latents(LAYER, counts_of([1, 1, 1]), (1, 3))


def test_counts_of_part_of_a_layer_are_an_error():
    with pytest.raises(ValueError, match="firing counts of 2 latents"):
        select_latents(LAYER, counts_of([1, 1, 1])[1:], "all")


def test_a_random_sample_is_the_smallest_hashes_of_all_latents_dead_or_alive():
    counts = counts_of([0] * 50 + [3] * 50)
    key = address_key(4, LAYER, None, "select-latents")
    wanted = np.sort(np.argsort(hash_priority(key, np.arange(100)))[:20])
    drawn = select_latents(
        LAYER, counts.sample(fraction=1.0, shuffle=True, seed=1), LatentSample(sample=20, seed=4)
    )
    assert drawn.tolist() == wanted.tolist()
    assert (drawn < 50).any()
    larger = select_latents(LAYER, counts, LatentSample(sample=30, seed=4))
    assert set(drawn) <= set(larger)
    assert len(select_latents(LAYER, counts, LatentSample(sample=1000))) == 100


def test_a_firing_rate_sample_takes_as_many_from_each_quarter_of_the_alive():
    n_tokens = [0] * 10 + list(range(1, 41))
    drawn = select_latents(LAYER, counts_of(n_tokens), LatentSample(sample=12, by="firing_rate"))
    assert np.bincount((drawn - 10) // 10).tolist() == [3, 3, 3, 3]
    assert drawn.min() >= 10
    every = select_latents(LAYER, counts_of(n_tokens), LatentSample(sample=99, by="firing_rate"))
    assert len(every) == 40
    none = select_latents(LAYER, counts_of([0, 0]), LatentSample(sample=9, by="firing_rate"))
    assert none.tolist() == []


def test_draws_of_latents_depend_on_layer_and_seed():
    counts = counts_of([1] * 200)
    drawn = [
        tuple(select_latents(layer, counts, LatentSample(sample=20, seed=seed)))
        for layer in (LAYER, LayerKey("sae", "layers.10"))
        for seed in (0, 1)
    ]
    assert len(set(drawn)) == 4


def test_floors_are_taken_in_an_order_that_others_do_not_change():
    selected = np.arange(0, 100, 3)
    order = floor_order(LAYER, selected, FloorsConfig())
    assert np.array_equal(np.sort(order), selected)
    assert not np.array_equal(order, selected)
    fewer = floor_order(LAYER, selected[::-2], FloorsConfig())
    assert fewer.tolist() == [latent for latent in order if latent in selected[::-2]]
    assert floor_order(LAYER, selected, FloorsConfig(seed=1)).tolist() != order.tolist()


def test_a_scorer_may_take_fewer_latents_than_are_explained():
    selection = pl.DataFrame(
        {
            "coder": "sae",
            "hookpoint": "layers.9",
            "latent": [3, 5, 8, 9],
            "is_floor": [False, True, False, False],
            "rank": [1, 0, None, 2],
        },
        schema=dict(SELECTION.columns),
    )
    assert scored_latents(selection, "all").equals(selection)
    assert scored_latents(selection, ScoredSample(sample=2))["latent"].to_list() == [3, 5]
    assert scored_latents(selection, ScoredSample(sample=9))["latent"].to_list() == [3, 5, 9]
    assert scored_latents(selection, (8, 9, 77))["latent"].to_list() == [8, 9]


def test_processing_order_is_hashed_and_consistent_between_subsets():
    order = processing_order(LAYER, np.arange(50)).tolist()
    assert sorted(order) == list(range(50))
    assert order != sorted(order)
    subset = processing_order(LAYER, np.array([30, 4, 17])).tolist()
    assert subset == [latent for latent in order if latent in (4, 17, 30)]


def test_donors_are_of_the_block_never_the_latent_itself_and_dissimilar():
    rng = np.random.default_rng(0)
    candidates = np.arange(40)
    decoder = rng.normal(size=(40, 4)).astype(np.float32)
    config = FloorsConfig(donor_block=20, max_decoder_cosine=0.3)
    floors = np.array([3, 25])
    frame = donors_of(LAYER, floors, candidates, decoder, config)
    unit = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
    for floor in floors:
        rows = frame.filter(pl.col("latent") == floor)
        block = [c for c in candidates if c // 20 == floor // 20 and c != floor]
        fit = [c for c in block if unit[c] @ unit[floor] < 0.3]
        key = address_key(0, LAYER, int(floor), "donors")
        wanted = sorted(fit, key=lambda c: hash_priority(key, np.array([c]))[0])[:N_DONORS]
        assert rows["donor"].to_list() == wanted
        assert rows["rank"].to_list() == list(range(len(wanted)))
        cosines = [float(unit[c] @ unit[floor]) for c in wanted]
        assert rows["decoder_cosine"].to_list() == pytest.approx(cosines, abs=1e-6)


def test_donors_do_not_depend_on_other_blocks_other_floors_or_order():
    rng = np.random.default_rng(1)
    decoder = rng.normal(size=(60, 8)).astype(np.float32)
    config = FloorsConfig(donor_block=20)
    whole = donors_of(LAYER, np.array([5, 21, 22]), np.arange(60), decoder, config)
    order = rng.permutation(np.arange(20, 40))
    part = donors_of(LAYER, np.array([21]), order, decoder[order], config)
    assert part.equals(whole.filter(pl.col("latent") == 21))


def test_at_most_sixteen_donors_are_kept_and_none_is_no_row():
    decoder = np.zeros((41, 3), dtype=np.float32)  # a zero direction has cosine 0 with all
    config = FloorsConfig(donor_block=64)
    assert donors_of(LAYER, np.array([0]), np.arange(41), decoder, config).height == N_DONORS
    alike = np.ones((5, 3), dtype=np.float32)
    assert donors_of(LAYER, np.array([0]), np.arange(5), alike, config).height == 0
    assert donors_of(LAYER, one_group(0), np.arange(5), alike, config).height == 0


def test_latents_of_a_restricted_explainer_are_donors_besides():
    decoder = np.zeros((400, 3), dtype=np.float32)
    config, every = FloorsConfig(donor_block=400), np.arange(400)
    steered = np.arange(300, 330)
    floor = donors_of(LAYER, np.array([0]), every, decoder, config, steered)
    usual = donors_of(LAYER, np.array([0]), every, decoder, config)["donor"].to_list()
    assert set(usual) < set(floor["donor"].to_list())
    assert floor.filter(pl.col("donor").is_in(steered))["donor"].n_unique() == N_DONORS
    assert floor["rank"].to_list() == list(range(floor.height))


def test_a_floor_latent_that_is_not_selected_is_an_error():
    with pytest.raises(ValueError, match="latent 9: a floor latent that is not selected"):
        donors_of(LAYER, np.array([9]), np.array([1]), np.ones((1, 2), np.float32), FloorsConfig())


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    n_wanted=st.integers(0, 12),
    n_quantiles=st.integers(1, 4),
    skew=st.sampled_from([1.0, 6.0]),
    seed=st.integers(0, 1000),
)
def test_windows_that_may_not_be_drawn_are_not_whichever_others_go(
    sizes, n_wanted, n_quantiles, skew, seed
):
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(len(sizes)), sizes)
    quantile = (rng.random(len(group)) ** skew * n_quantiles).astype(np.int64)
    may_go = rng.random(len(group)) < 0.2
    wanted = np.full(len(sizes), n_wanted)
    kept = may_be_drawn(group, quantile, priorities(len(group), seed), wanted, n_quantiles, may_go)
    gone = may_go & (rng.random(len(group)) < 0.7)

    def drawn(rows):
        ranks = draw_ranks(
            "quantiles", group[rows], quantile[rows], np.zeros_like(rows),
            priorities(len(group), seed)[rows], wanted[group[rows]],
        )  # fmt: skip
        return dict(zip(rows[ranks >= 0].tolist(), ranks[ranks >= 0].tolist(), strict=True))

    assert drawn(np.flatnonzero(kept & ~gone)) == drawn(np.flatnonzero(~gone))
    assert kept[may_go].all()


def test_most_windows_of_a_frequent_latent_need_not_be_ranked():
    n = 8000
    group, quantile = one_group(n), np.arange(n) % 10
    nothing = np.zeros(n, dtype=bool)
    kept = may_be_drawn(group, quantile, priorities(n), np.array([100]), 10, nothing)
    # 20 early ones a quantile, and 6 standard deviations more: 53 of 800.
    assert 200 < kept.sum() < 800


def test_rows_alike_in_group_and_priority_keep_their_order():
    group = np.array([2, 0, 2, 2, 0])
    assert order_within(group, u64(5, 1, 5, 4, 1)).tolist() == [1, 4, 3, 0, 2]
    # No room for the row's number beside such a group: the same order all the same.
    assert order_within(group * 2**61, u64(5, 1, 5, 4, 1)).tolist() == [1, 4, 3, 0, 2]
    assert order_within(one_group(0), u64()).tolist() == []


@pytest.mark.parametrize("sizes", [[20_000, 3, 9000, 1, 1, 30_000], [1] * 20_000, [40_000]])
@pytest.mark.parametrize("in_order", [True, False])
def test_many_keys_are_sorted_whether_or_not_their_groups_follow_each_other(sizes, in_order):
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(len(sizes)), sizes)
    group = group if in_order else rng.permutation(group)
    low = rng.integers(0, 2**32, len(group), dtype=np.uint64)
    keys = group.astype(np.uint64) << np.uint64(32) | low
    expected = np.sort(keys)
    assert np.array_equal(sorted_keys(keys, group), expected)
