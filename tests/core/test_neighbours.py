"""Neighbours against loops over sets of tokens; the same rows whatever the blocks and frames."""

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from autointerp_dagster.core.neighbours import (
    CountedTokens,
    Incidence,
    Ranked,
    WindowDraw,
    cofiring_neighbours,
    cosine,
    cosine_neighbours,
    drawn_windows,
    neighbour_windows_table,
    neighbours_table,
)
from autointerp_dagster.core.rng import address_key, hash_priority
from autointerp_dagster.core.schemas import ACTIVATIONS
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LayerKey

LAYER = LayerKey("sae", "layers.9")
BOS = 0
ALL_TOKENS = 1 << 40

Firing = dict[int, set[tuple[int, int]]]
"""Of each latent the (context, position) where it fires."""
Row = tuple[int, int, int, float]
"""(latent, rank, neighbour, value)."""


def dataset_of(lengths: Sequence[int], bos_id: int | None = BOS) -> TokenDataset:
    """Contexts of these lengths, BOS counted; what the tokens are plays no part."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    no_table = pl.DataFrame()
    return TokenDataset(np.ones(offsets[-1], np.int32), offsets, no_table, no_table, bos_id)


def activations_of(firing: Firing) -> pl.DataFrame:
    rows = [
        {"latent": f, "context": c, "position": p, "activation": 1.0 + f + 0.5 * p}
        for f, places in firing.items()
        for c, p in places
    ]
    return ACTIVATIONS.conform(pl.DataFrame(rows, schema=dict(ACTIVATIONS.columns)))


def cut(frame: pl.DataFrame, n_rows: int) -> Iterator[pl.DataFrame]:
    return frame.iter_slices(n_rows)


def jaccard_loop(firing: Firing, latents: Sequence[int], n: int) -> list[Row]:
    rows = []
    for f in latents:
        found = [
            (-len(firing[f] & other) / len(firing[f] | other), g)
            for g, other in firing.items()
            if g != f and firing[f] & other
        ]
        rows += [(f, rank, g, -minus) for rank, (minus, g) in enumerate(sorted(found)[:n])]
    return rows


def cofiring(
    firing: Firing,
    dataset: TokenDataset,
    width: int,
    n: int,
    latents: range | None = None,
    n_rows: int = 7,
    max_tokens: int = ALL_TOKENS,
    **blocks: int,
) -> list[Row]:
    activations = activations_of(firing)
    counted = CountedTokens.of(dataset, LAYER, max_tokens, seed=0)
    incidence = Incidence.of(lambda: cut(activations, n_rows), width, counted)
    cell = range(width) if latents is None else latents
    mine = activations.filter(pl.col("latent").is_between(cell.start, cell.stop, closed="left"))
    return rows_of(cofiring_neighbours(cut(mine, n_rows), counted, incidence, n, **blocks))


def rows_of(found: Ranked) -> list[Row]:
    return list(zip(*(column.tolist() for column in found), strict=True))


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[int], Firing]:
    """Lengths of contexts, and some latents of 12, of which a few may be dead."""
    lengths = draw(st.lists(st.integers(2, 9), min_size=1, max_size=6))
    places = [(c, p) for c, length in enumerate(lengths) for p in range(1, length)]
    firing = {
        f: set(draw(st.lists(st.sampled_from(places), max_size=len(places)))) for f in range(12)
    }
    return lengths, firing


@settings(max_examples=60, deadline=None)
@given(worlds(), st.integers(1, 12), st.integers(1, 9))
def test_cofiring_neighbours_are_those_of_a_loop_over_sets(
    world: tuple[list[int], Firing], n: int, n_rows: int
) -> None:
    lengths, firing = world
    expected = jaccard_loop(firing, range(12), n)
    assert cofiring(firing, dataset_of(lengths), 12, n, n_rows=n_rows) == expected


@settings(max_examples=60, deadline=None)
@given(worlds(), st.sampled_from([1, 13, 40, 1000]), st.sampled_from([1, 10, 100]))
def test_blocks_do_not_change_the_neighbours(
    world: tuple[list[int], Firing], table_cells: int, block_pairs: int
) -> None:
    lengths, firing = world
    found = cofiring(
        firing, dataset_of(lengths), 12, 3, table_cells=table_cells, block_pairs=block_pairs
    )
    assert found == cofiring(firing, dataset_of(lengths), 12, 3)


@settings(max_examples=60, deadline=None)
@given(worlds(), st.integers(1, 12))
def test_the_size_of_ranges_does_not_change_the_neighbours(
    world: tuple[list[int], Firing], size: int
) -> None:
    lengths, firing = world
    dataset = dataset_of(lengths)
    parts = [
        cofiring(firing, dataset, 12, 4, latents=range(start, min(start + size, 12)))
        for start in range(0, 12, size)
    ]
    assert [row for part in parts for row in part] == cofiring(firing, dataset, 12, 4)


def random_firing(n_latents: int, lengths: Sequence[int], seed: int = 0) -> Firing:
    """Latents that are rarer the larger their number."""
    rng = np.random.default_rng(seed)
    places = [(c, p) for c, length in enumerate(lengths) for p in range(1, length)]
    return {
        f: {places[i] for i in np.flatnonzero(rng.random(len(places)) < 0.5 / (1 + f % 100))}
        for f in range(n_latents)
    }


@pytest.mark.parametrize("n_latents", [70, 900])
def test_counting_in_a_table_and_by_sorting_find_the_same(
    n_latents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [17, 33, 5, 20, 64]
    firing, dataset = random_firing(n_latents, lengths), dataset_of(lengths)
    expected = jaccard_loop(firing, range(n_latents), 10)
    module = "autointerp_dagster.core.neighbours.cofiring"
    for cost in (0, 3, 10**9):  # always a table, what is cheaper, always sorting
        monkeypatch.setattr(f"{module}._SORTING_COST", 1 / cost if cost else 10**9)
        assert cofiring(firing, dataset, n_latents, 10, n_rows=100) == expected
    monkeypatch.setattr(f"{module}._PAIRS_AT_ONCE", 3)
    assert cofiring(firing, dataset, n_latents, 10, n_rows=100) == expected


def test_special_latents_have_the_neighbours_one_expects() -> None:
    places = [(c, p) for c in range(2) for p in range(1, 5)]  # 8 tokens
    firing: Firing = {
        0: set(places),  # everywhere
        1: set(),  # dead
        2: {places[0], places[3]},
        3: {places[0], places[3]},  # the twin of 2
        4: {places[7]},  # with 0 alone
        5: {places[0]},
    }
    found = cofiring(firing, dataset_of([5, 5]), 6, 2)
    assert found == [
        (0, 0, 2, 2 / 8), (0, 1, 3, 2 / 8),
        (2, 0, 3, 1.0), (2, 1, 5, 1 / 2),
        (3, 0, 2, 1.0), (3, 1, 5, 1 / 2),
        (4, 0, 0, 1 / 8),
        (5, 0, 2, 1 / 2), (5, 1, 3, 1 / 2),
    ]  # fmt: skip


def test_a_coder_that_never_fires_has_no_neighbours() -> None:
    assert cofiring({0: set(), 1: set()}, dataset_of([5]), 2, 3) == []
    assert cofiring({0: set()}, dataset_of([]), 1, 3) == []


def test_a_latent_cut_by_many_frames_counts_once() -> None:
    lengths = [200]
    firing: Firing = {0: {(0, p) for p in range(1, 200)}, 1: {(0, p) for p in range(1, 100)}}
    assert cofiring(firing, dataset_of(lengths), 2, 1, n_rows=3) == [
        (0, 0, 1, 99 / 199), (1, 0, 0, 99 / 199),
    ]  # fmt: skip


def test_a_coder_wider_than_sixteen_bits_keeps_its_latents_apart() -> None:
    firing: Firing = {
        0: {(0, 1)}, 65_535: {(0, 1), (0, 2)}, 65_536: {(0, 2)}, 70_000: {(0, 3), (0, 1)},
    }  # fmt: skip
    found = cofiring(firing, dataset_of([4]), 70_001, 2)
    assert found == jaccard_loop(firing, list(firing), 2)


def drawn_contexts(dataset: TokenDataset, max_tokens: int, layer: LayerKey = LAYER) -> set[int]:
    counted = CountedTokens.of(dataset, layer, max_tokens, seed=0)
    return set(np.flatnonzero(counted.base >= -1).tolist())


def test_of_too_many_tokens_whole_contexts_are_drawn_and_jaccard_is_theirs() -> None:
    lengths = [9, 17, 5, 30, 12, 8, 40, 21, 3, 16]
    firing, dataset = random_firing(30, lengths), dataset_of(lengths)
    counted = CountedTokens.of(dataset, LAYER, 60, seed=0)
    chosen = drawn_contexts(dataset, 60)
    assert counted.n_tokens == sum(lengths[c] - 1 for c in chosen) <= 60
    assert 0 < len(chosen) < len(lengths)
    inside = {f: {(c, p) for c, p in places if c in chosen} for f, places in firing.items()}
    expected = jaccard_loop(inside, range(30), 5)
    assert cofiring(firing, dataset, 30, 5, max_tokens=60) == expected


def test_more_tokens_only_add_contexts_and_appended_documents_move_none() -> None:
    dataset = dataset_of([9] * 40)
    few, many = drawn_contexts(dataset, 80), drawn_contexts(dataset, 160)
    assert len(few) == 10
    assert few < many
    longer = drawn_contexts(dataset_of([9] * 60), 80)
    assert {c for c in longer if c < 40} <= few
    assert drawn_contexts(dataset, 80) == few
    assert drawn_contexts(dataset, 80, LayerKey("sae", "layers.8")) != few


def test_every_context_is_drawn_equally_often() -> None:
    dataset = dataset_of([9] * 20)
    layers = [LayerKey("sae", f"layers.{i}") for i in range(500)]
    drawn = [drawn_contexts(dataset, 40, layer) for layer in layers]  # 5 of 20
    shares = np.array([sum(c in chosen for chosen in drawn) for c in range(20)]) / 500
    assert np.abs(shares - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / 500)


def test_a_single_context_longer_than_wanted_is_still_counted() -> None:
    assert CountedTokens.of(dataset_of([100]), LAYER, 10, seed=0).n_tokens == 99
    assert CountedTokens.of(dataset_of([100], bos_id=None), LAYER, 100, seed=0).n_tokens == 100


# Directions


def cosine_loop(rows: torch.Tensor, n: int) -> list[Row]:
    directions = [row / row.norm() if row.norm() > 0 else row for row in rows.double()]
    found = []
    for f, mine in enumerate(directions):
        values = [(-round(float(mine @ other), 6), g) for g, other in enumerate(directions)]
        best = sorted(pair for pair in values if pair[1] != f and pair[0] < 0)[:n]
        found += [(f, rank, g, -minus) for rank, (minus, g) in enumerate(best)]
    return found


def directions(n_latents: int, d_in: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_latents, d_in, generator=torch.Generator().manual_seed(seed))


def cosines(rows: torch.Tensor, latents: range, n: int) -> list[Row]:
    return rows_of(cosine_neighbours(lambda part: rows[list(part)], len(rows), latents, n))


@pytest.mark.parametrize("n", [1, 10, 250])
def test_cosine_neighbours_are_those_of_a_loop(n: int) -> None:
    rows = directions(60)
    found, expected = cosines(rows, range(60), n), cosine_loop(rows, n)
    assert [row[:3] for row in found] == [row[:3] for row in expected]
    assert [row[3] for row in found] == pytest.approx([row[3] for row in expected], abs=1.5e-6)


def test_cosine_neighbours_do_not_depend_on_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cosine, "_TILE", 32)
    monkeypatch.setattr(cosine, "_OTHERS_TILE", 48)
    rows = directions(150)
    whole = cosines(rows, range(150), 5)
    for size in (1, 8, 64, 149):
        parts = [cosines(rows, range(s, min(s + size, 150)), 5) for s in range(0, 150, size)]
        assert [row for part in parts for row in part] == whole
    monkeypatch.undo()
    assert cosines(rows, range(150), 5) == whole


def test_equal_opposite_and_missing_directions() -> None:
    rows = torch.tensor([[2.0, 0], [0, 0], [7.0, 0], [-1.0, 0], [0, 3.0], [1.0, 0]])
    assert cosines(rows, range(6), 1) == [(0, 0, 2, 1.0), (2, 0, 0, 1.0), (5, 0, 0, 1.0)]
    assert cosines(rows, range(3, 3), 1) == []


def test_rows_of_extreme_length_have_a_direction_all_the_same() -> None:
    rows = torch.tensor([[1e30, 1e30], [1e-30, 1e-30], [1.0, 0.0]])
    assert [row[2] for row in cosines(rows, range(3), 1)] == [1, 0, 0]


def test_a_row_that_is_no_number_is_named() -> None:
    rows = directions(10)
    rows[7, 3] = torch.nan
    with pytest.raises(ValueError, match=r"latent 7: its row of the coder is not finite, wanted"):
        cosines(rows, range(10), 2)


def test_the_table_holds_every_measure_in_order_of_its_key() -> None:
    rows = directions(5)
    ranked = cosine_neighbours(lambda part: rows[list(part)], 5, range(5), 2)
    table = neighbours_table({"encoder": ranked, "cofiring": Ranked.concat([])}, LAYER)
    assert table.columns[:4] == ["coder", "hookpoint", "latent", "measure"]
    assert table["measure"].unique().to_list() == ["encoder"]
    assert table.height == len(ranked.latent)


# Windows of neighbours

WINDOW_LEN = 4


def windows_table(
    firing: Firing, dataset: TokenDataset, latents: Sequence[int], n: int, n_rows: int = 7
) -> pl.DataFrame:
    draw = WindowDraw(dataset, LAYER, WINDOW_LEN, n, 0, np.array(latents, dtype=np.int64))
    rows = drawn_windows(cut(activations_of(firing), n_rows), draw)
    return neighbour_windows_table(rows, WINDOW_LEN, LAYER)


def windows_loop(
    firing: Firing, lengths: Sequence[int], latents: Sequence[int], n: int
) -> list[tuple[int, int, list[float]]]:
    rows = []
    for g in latents:
        windows = {
            c << 16 | p // WINDOW_LEN * WINDOW_LEN
            for c, p in firing[g]
            if (p // WINDOW_LEN + 1) * WINDOW_LEN <= lengths[c]
        }
        key = address_key(0, LAYER, g, "neighbour windows")
        ids = np.array(sorted(windows), dtype=np.uint64)
        chosen = ids[np.argsort(hash_priority(key, ids))[:n]]
        for window in sorted(chosen.tolist()):
            c, start = window >> 16, window & 0xFFFF
            values = [
                1.0 + g + 0.5 * p if (c, p) in firing[g] else 0.0
                for p in range(start, start + WINDOW_LEN)
            ]
            rows.append((g, window, values))
    return rows


@settings(max_examples=60, deadline=None)
@given(worlds(), st.integers(1, 5), st.integers(1, 9), st.sets(st.integers(0, 11)))
def test_windows_of_neighbours_are_those_of_a_loop_whatever_the_frames(
    world: tuple[list[int], Firing], n: int, n_rows: int, latents: set[int]
) -> None:
    lengths, firing = world
    found = windows_table(firing, dataset_of(lengths), sorted(latents), n, n_rows)
    expected = windows_loop(firing, lengths, sorted(latents), n)
    assert found.select("latent", "window_id", "activations").rows() == expected


def test_a_neighbours_windows_do_not_depend_on_who_else_is_asked_for() -> None:
    lengths = [33, 64, 7, 50]
    firing, dataset = random_firing(40, lengths), dataset_of(lengths)
    every = windows_table(firing, dataset, range(40), 3)
    for latents in ([5], [3, 5, 39]):
        some = windows_table(firing, dataset, latents, 3, n_rows=1000)
        assert_frame_equal(some, every.filter(pl.col("latent").is_in(latents)))
    assert windows_table(firing, dataset, [], 3).is_empty()


def test_a_latent_that_fires_everywhere_keeps_its_share_of_windows() -> None:
    lengths = [41] * 20  # 10 whole windows each, one token over
    firing: Firing = {0: {(c, p) for c in range(20) for p in range(1, 41)}}
    found = windows_table(firing, dataset_of(lengths), [0], 16, n_rows=13)
    assert found.height == 16
    assert all(len(values) == WINDOW_LEN for values in found["activations"])
    starts = (found["window_id"] & 0xFFFF).to_list()
    assert max(starts) <= 36
