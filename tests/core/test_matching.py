import math

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from autointerp_dagster.core.config import MetricsConfig
from autointerp_dagster.core.metrics import (
    Explained,
    explanation_similarity,
    matched_latents,
    with_cofiring,
)
from autointerp_dagster.core.schemas import ACTIVATIONS, STUDY_METRICS

CONFIG = MetricsConfig(n_bootstrap=500)
NAMES = ("sae@layers.1", "sae@layers.2", "default")


def directions(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def fires(*rows: tuple[int, int, int]) -> pl.DataFrame:
    columns = zip(*rows, strict=True) if rows else ((), (), ())
    named = dict(zip(("latent", "context", "position"), columns, strict=True))
    frame = pl.DataFrame(named).with_columns(activation=pl.lit(1.0))
    return ACTIVATIONS.conform(frame)


def test_matches_are_mutual_nearest_above_the_cut() -> None:
    a = directions((1, 0), (0.9, 0.1), (0, -2))
    b = directions((0, 3), (2, 0))
    # a0 and a1 are both nearest to b1, and b1 is nearest to a0; a2 and b0 point apart.
    found = matched_latents(a, b)
    assert found.select("latent_a", "latent_b", "cosine").rows() == [(0, 1, 1.0)]


def test_a_match_below_the_cut_is_none() -> None:
    a, b = directions((1, 0)), directions((1, 1))
    assert matched_latents(a, b, min_cosine=0.7)["cosine"].to_list() == pytest.approx(
        [math.sqrt(0.5)]
    )
    assert matched_latents(a, b, min_cosine=0.71).is_empty()


def test_cofiring_is_counted_over_the_tokens_of_both() -> None:
    # a0 fires on 3 tokens, b0 on 2, together on 1: 1 / 4. a1 and b1 never fire.
    one = fires((0, 0, 1), (0, 0, 2), (0, 5, 1), (7, 0, 1))
    other = fires((0, 0, 2), (0, 5, 2), (6, 0, 1))
    eye = directions((1, 0), (0, 1))
    found = with_cofiring(matched_latents(eye, eye), one, other)
    assert found.select("n_both", "n_either", "jaccard").rows() == [(1, 4, 0.25), (0, 0, None)]
    for cut, kept in ((0.25, [0]), (0.26, [])):
        found = with_cofiring(matched_latents(eye, eye), one, other, cut)
        assert found["latent_a"].to_list() == kept


def test_matches_among_some_latents_are_those_among_all_that_both_are_in() -> None:
    rng = np.random.default_rng(2)
    a = rng.normal(size=(60, 5)).astype(np.float32)
    b = (a[rng.permutation(60)] + 0.3 * rng.normal(size=(60, 5))).astype(np.float32)
    some_a, some_b = rng.permutation(60)[:35], rng.permutation(60)[:35]
    is_among = pl.col("latent_a").is_in(some_a.tolist()) & pl.col("latent_b").is_in(some_b.tolist())
    expected = matched_latents(a, b).filter(is_among)
    assert expected.height > 5
    assert_frame_equal(matched_latents(a, b, (some_a, some_b), block=7), expected)
    assert matched_latents(a, b, (some_a[:0], some_b)).is_empty()


def test_blocks_change_nothing() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(50, 6)).astype(np.float32)
    b = np.concatenate([a[::-1] + 0.05 * rng.normal(size=(50, 6)), rng.normal(size=(7, 6))])
    b = b.astype(np.float32)
    expected = matched_latents(a, b)
    assert expected.height > 30
    for block in (1, 7, 64):
        found = matched_latents(a, b, block=block)
        assert found["cosine"].to_list() == pytest.approx(expected["cosine"].to_list(), abs=1e-6)
        assert_frame_equal(found.drop("cosine"), expected.drop("cosine"))


def test_matches_equal_those_of_the_whole_matrix() -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.normal(size=(n, 4)).astype(np.float32) for n in (40, 30))
    unit_a, unit_b = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in (a, b))
    cosine = unit_a @ unit_b.T
    best, back = cosine.argmax(axis=1), cosine.argmax(axis=0)
    expected = [
        (i, int(best[i])) for i in range(40) if back[best[i]] == i and cosine[i, best[i]] >= 0.6
    ]
    found = matched_latents(a, b, min_cosine=0.6, block=9)
    assert found.select("latent_a", "latent_b").rows() == expected


def test_a_direction_of_zeros_matches_nothing() -> None:
    zero = directions((0, 0), (1, 0))
    assert matched_latents(zero, zero)["latent_a"].to_list() == [1]


def test_no_latents_have_no_matches() -> None:
    empty = np.zeros((0, 3), dtype=np.float32)
    assert matched_latents(empty, directions((1, 0, 0))).is_empty()
    assert matched_latents(directions((1, 0, 0)), empty).is_empty()


def test_bad_directions_and_arguments_are_refused_by_name() -> None:
    one = directions((1, 0))
    with pytest.raises(ValueError, match="latent 1 of b is not finite"):
        matched_latents(one, directions((1, 0), (math.nan, 1)))
    with pytest.raises(ValueError, match="2 and 3 dimensions"):
        matched_latents(one, directions((1, 0, 0)))
    with pytest.raises(ValueError, match="min_cosine 0"):
        matched_latents(one, one, min_cosine=0.0)


def matches(n: int) -> pl.DataFrame:
    eye = np.eye(n, dtype=np.float32)
    return with_cofiring(matched_latents(eye, eye), fires(), fires())


def explained(vectors: np.ndarray, latents: list[int] | None = None) -> Explained:
    numbers = np.arange(len(vectors)) if latents is None else np.array(latents)
    return Explained(numbers.astype(np.int64), vectors.astype(np.float32))


def statistic(frame: pl.DataFrame, name: str) -> dict[str, float]:
    return frame.row(by_predicate=pl.col("statistic") == name, named=True)


def test_similarity_is_of_the_pairs_and_the_floor_of_all_others() -> None:
    # Pairs (x, x), (y, x + y): cosines 1 and r = sqrt(.5); others x.(x + y) = r and y.x = 0.
    a = explained(directions((2, 0), (0, 1)))
    b = explained(directions((1, 0), (1, 1)))
    frame = explanation_similarity(matches(2), a, b, NAMES, CONFIG)
    r = math.sqrt(0.5)
    assert statistic(frame, "mean_similarity")["value"] == pytest.approx((1 + r) / 2)
    assert statistic(frame, "mean_similarity_unmatched")["value"] == pytest.approx(r / 2)
    assert statistic(frame, "mean_difference")["value"] == pytest.approx(0.5)
    assert set(frame["comparison"]) == {"matched"}
    assert frame.select("a", "b", "explainer", "scorer").unique().rows() == [(*NAMES, None)]


def test_alike_explanations_of_matched_latents_are_told_from_unlike_ones() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 16))
    near = vectors + 0.5 * rng.normal(size=(60, 16))
    alike = explanation_similarity(matches(60), explained(vectors), explained(near), NAMES, CONFIG)
    found = statistic(alike, "mean_difference")
    assert found["lo"] > 0.7
    assert found["p"] < 1e-6
    unlike = explanation_similarity(
        matches(60), explained(vectors), explained(rng.normal(size=(60, 16))), NAMES, CONFIG
    )
    found = statistic(unlike, "mean_difference")
    assert found["lo"] < 0 < found["hi"]


def test_matched_latents_without_an_explanation_are_left_out_and_counted() -> None:
    a = explained(np.eye(3), [0, 1, 2])
    b = explained(np.eye(3)[[2, 0]], [2, 0])
    frame = explanation_similarity(matches(3), a, b, NAMES, CONFIG)
    assert (statistic(frame, "n_matched")["value"], statistic(frame, "n_matched")["n"]) == (3, 3)
    similarity = statistic(frame, "mean_similarity")
    assert (similarity["value"], similarity["n"]) == (1, 2)


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_pairs_have_no_interval_and_no_floor(n: int) -> None:
    one = explained(np.eye(2)[:n])
    frame = explanation_similarity(matches(n), one, one, NAMES, CONFIG)
    assert frame.columns == list(STUDY_METRICS.columns)
    assert statistic(frame, "mean_similarity")["value"] == (1 if n else None)
    for name in ("mean_similarity_unmatched", "mean_difference"):
        found = statistic(frame, name)
        assert (found["value"], found["lo"], found["p"]) == (None, None, None)


def test_similarity_does_not_depend_on_the_order_of_explanations() -> None:
    vectors = np.random.default_rng(0).normal(size=(9, 4))
    there = explanation_similarity(
        matches(9), explained(vectors), explained(vectors), NAMES, CONFIG
    )
    turned = list(range(8, -1, -1))
    back = explanation_similarity(
        matches(9).reverse(),
        explained(vectors[::-1], turned),
        explained(vectors),
        NAMES,
        CONFIG,
    )
    assert_frame_equal(there, back, check_exact=True)


def test_a_vector_of_length_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="latent 1 is of length zero"):
        explanation_similarity(
            matches(2), explained(directions((1, 0), (0, 0))), explained(np.eye(2)), NAMES, CONFIG
        )
