"""Exact search among embedded windows, against a plain sort; reading segments back."""

import numpy as np
import pytest

from autointerp_dagster.adapters.manifests import Manifest, Provenance
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.adapters.window_vectors import (
    N_NEAREST,
    EmbeddedWindows,
    NearestWindows,
    numbered,
    put_vectors,
    put_windows,
    unit_vectors,
)
from autointerp_dagster.core.config import SamplingConfig, TokenConfig
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.negatives import SimilarWindows
from autointerp_dagster.core.tokens import Document, build_token_dataset
from autointerp_dagster.core.windows import WindowGrid, window_grid

TEST = 2


def random_vectors(n: int, dim: int = 12, seed: int = 0) -> np.ndarray:
    """Small whole numbers before they are scaled: many equal vectors, and ties by chance."""
    rng = np.random.default_rng(seed)
    return unit_vectors(rng.integers(-1, 2, (n, dim)).astype(np.float32))


def random_splits(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, 1]).choice(3, n, p=[0.4, 0.2, 0.4]).astype(np.int8)


def by_sorting(window, vectors, split, asked: int, of: int) -> list[int]:
    """What a plain sort by (cosine, window) finds; cosines rounded so that ties are ties."""
    at = np.flatnonzero(window == asked)
    if not len(at) or not vectors[at[0]].any():
        return []
    wide = vectors.astype(np.float64)
    cosine = np.round(wide @ wide[at[0]], 6)
    fit = [
        row
        for row in range(len(window))
        if split[window[row]] == of and window[row] != asked and vectors[row].any()
    ]
    return [int(window[row]) for row in sorted(fit, key=lambda r: (-cosine[r], window[r]))][:64]


@pytest.mark.parametrize("seed", range(3))
def test_what_is_found_is_what_a_plain_sort_finds(seed):
    n = 700
    vectors, split = random_vectors(500, 4, seed), random_splits(n, seed)
    window = np.sort(np.random.default_rng(seed).choice(n, 500, replace=False))
    search = NearestWindows(window, vectors, split)
    asked = np.arange(0, n, 7)
    for of in range(3):
        found = search.nearest(asked, of)
        assert found.shape == (len(asked), N_NEAREST)
        for row, w in zip(found.tolist(), asked.tolist(), strict=True):
            expected = by_sorting(window, vectors, split, w, of)
            assert row == [*expected, *[-1] * (N_NEAREST - len(expected))]


def test_more_windows_than_a_block_compares_are_all_searched():
    n = 20_000
    rng = np.random.default_rng(0)
    vectors = unit_vectors(rng.normal(size=(n, 8)).astype(np.float32))
    window, split = np.arange(n), np.full(n, TEST, dtype=np.int8)
    asked = np.array([0, 255, 256, 8191, 8192, 19_999])
    found = NearestWindows(window, vectors, split).nearest(asked, TEST)
    wide = vectors.astype(np.float64)
    for row, w in zip(found, asked, strict=True):
        cosine = wide @ wide[w]
        cosine[w] = -2
        assert set(row) == set(np.argsort(-cosine)[:N_NEAREST])
        assert (np.diff(cosine[row]) <= 1e-6).all()


def test_what_is_found_does_not_depend_on_who_else_is_asked_or_in_which_order():
    n = 3000
    rng = np.random.default_rng(1)
    vectors, split = rng.normal(size=(n, 24)).astype(np.float32), random_splits(n)
    window = np.arange(n)
    search = NearestWindows(window, unit_vectors(vectors), split)
    whole = search.nearest(window, TEST)
    again = NearestWindows(window, unit_vectors(vectors), split)
    for asked in (np.array([2999]), np.array([5, 5, 17, 3]), rng.permutation(n)):
        np.testing.assert_array_equal(again.nearest(asked, TEST), whole[asked])


def test_a_window_that_is_not_embedded_or_has_no_direction_finds_nothing_and_is_not_found():
    vectors = unit_vectors(
        np.array([[1, 0], [0, 0], [1, 1], [np.nan, 1], [np.inf, 0], [3, 1]], dtype=np.float32)
    )
    window = np.array([0, 1, 2, 3, 4, 6])  # 5 is not embedded
    search = NearestWindows(window, vectors, np.zeros(7, dtype=np.int8))
    found = search.nearest(np.arange(7), 0)
    assert found[0, :3].tolist() == [6, 2, -1]
    assert found[2, :3].tolist() == [6, 0, -1]
    for w in (1, 3, 4, 5):
        assert (found[w] == -1).all()
    assert (search.nearest(np.arange(7), TEST) == -1).all()
    assert (NearestWindows(window[:0], vectors[:0], np.zeros(3, np.int8)).nearest(
        np.arange(3), 0) == -1).all()  # fmt: skip


def test_equal_vectors_of_different_texts_are_found_in_the_order_of_the_corpus():
    vectors = np.tile(unit_vectors(np.array([[1.0, 2.0]], dtype=np.float32)), (600, 1))
    search = NearestWindows(np.arange(600), vectors, np.zeros(600, dtype=np.int8))
    found = search.nearest(np.array([3, 599]), 0)
    assert found[0].tolist() == [0, 1, 2, *range(4, 65)]
    assert found[1].tolist() == list(range(64))


def distinct_by_sorting(window, vectors, split, text, asked: int, of: int) -> list[int]:
    """What a plain sort finds, less the text of the window and all but the first of each text."""
    own = text[np.flatnonzero(window == asked)[0]]
    first: dict[int, int] = {}
    for row in np.flatnonzero(split[window] == of).tolist():
        first.setdefault(int(text[row]), row)
    first.pop(int(own), None)
    wide = vectors.astype(np.float64)
    cosine = np.round(wide @ wide[np.flatnonzero(window == asked)[0]], 6)
    rows = sorted(first.values(), key=lambda row: (-cosine[row], window[row]))
    return [int(window[row]) for row in rows][:64]


@pytest.mark.parametrize("seed", range(3))
def test_copies_of_a_text_are_never_its_neighbours_and_take_one_place(seed):
    rng = np.random.default_rng(seed)
    texts = unit_vectors(rng.normal(size=(90, 6)).astype(np.float32))
    text = np.where(rng.random(900) < 0.5, rng.integers(0, 3, 900), rng.integers(0, 90, 900))
    window = np.sort(rng.choice(1200, 900, replace=False))
    split = random_splits(1200, seed)
    search = NearestWindows(window, texts[text], split, text)
    place = {int(w): row for row, w in enumerate(window)}
    for of in range(3):
        for asked, row in zip(window.tolist(), search.nearest(window, of).tolist(), strict=True):
            expected = distinct_by_sorting(window, texts[text], split, text, asked, of)
            assert row == [*expected, *[-1] * (N_NEAREST - len(expected))]
            said = [text[place[w]] for w in row if w >= 0]
            assert len(set(said)) == len(said)
            assert text[place[asked]] not in said


def test_a_copy_of_a_text_finds_what_its_first_window_finds_in_every_piece():
    rng = np.random.default_rng(0)
    texts = unit_vectors(rng.normal(size=(10_000, 4)).astype(np.float32))
    text = np.append(np.arange(10_000), [5000, 9999, 0])
    split = np.zeros(len(text), dtype=np.int8)
    found = NearestWindows(np.arange(len(text)), texts[text], split, text).nearest(
        np.array([5000, 9999, 0, 10_000, 10_001, 10_002]), 0
    )
    np.testing.assert_array_equal(found[:3], found[3:])
    assert found.max() < 10_000


def test_what_was_found_is_not_sought_again_and_depends_on_the_splits():
    rng = np.random.default_rng(0)
    n = 9000  # three pieces
    vectors = unit_vectors(rng.normal(size=(n, 4)).astype(np.float32))
    kept: dict[str, np.ndarray] = {}
    searched: list[str] = []

    def remembered(parameters, search):
        key = repr(sorted(parameters.items()))
        if key not in kept:
            searched.append(key)
            kept[key] = search()
        return kept[key]

    def search(split):
        return NearestWindows(np.arange(n), vectors, split, remembered=remembered)

    split = np.zeros(n, dtype=np.int8)
    whole = NearestWindows(np.arange(n), vectors, split).nearest(np.arange(n), 0)
    some = np.array([8999, 4095, 17])
    np.testing.assert_array_equal(search(split).nearest(some, 0), whole[some])
    assert len(searched) == 2
    np.testing.assert_array_equal(search(split).nearest(np.arange(n), 0), whole)
    assert len(searched) == 3
    search(split).nearest(np.arange(n), 0)
    assert len(searched) == 3
    other = split.copy()
    other[5] = 1
    assert 5 not in search(other).nearest(np.arange(n), 0)
    assert len(searched) > 3


def test_it_is_what_negatives_are_drawn_from():
    assert isinstance(
        NearestWindows(np.zeros(0, np.int64), np.zeros((0, 1), np.float16), np.zeros(0, np.int8)),
        SimilarWindows,
    )


def test_vectors_have_length_1_as_float16():
    rng = np.random.default_rng(2)
    found = unit_vectors((rng.normal(size=(50, 384)) * 1e-3).astype(np.float32))
    assert found.dtype == np.float16
    assert np.linalg.norm(found.astype(np.float64), axis=1) == pytest.approx(1, abs=1e-3)


def stored(store: Store, ids: np.ndarray, segments: list[np.ndarray]) -> Manifest:
    """A manifest as the stage commits it."""
    text = np.stack([ids, ids], axis=1).astype(np.uint64)  # all different
    windows = put_windows(store, EmbeddedWindows(ids, text))
    blobs = [windows, *numbered([put_vectors(store, s) for s in segments])]
    return Manifest(
        stage="window_embeddings", stage_version="1", cell="all", input_fingerprint="f",
        content_hash="c", complete=True, parameters={}, upstream=(), blobs=tuple(blobs),
        provenance=Provenance(study="s", run_id="r", started="", finished="", seconds=0),
    )  # fmt: skip


def make_grid() -> WindowGrid:
    texts = [Document(f"{i}", f"text {i}") for i in range(20)]
    config = TokenConfig(n_tokens=20 * 16, context_len=16, min_visible=8)
    dataset = build_token_dataset(texts, lambda t: [list(range(16)) for _ in t], None, config)
    return window_grid(dataset, SamplingConfig(window_len=8))


def test_segments_are_read_back_in_order(tmp_path):
    grid, store = make_grid(), Store(tmp_path)
    vectors = random_vectors(40, 6)
    kept = np.sort(np.random.default_rng(0).choice(40, 25, replace=False))
    manifest = stored(
        store, grid.window_id[kept], [vectors[kept[:10]], vectors[kept[10:20]], vectors[kept[20:]]]
    )
    found = NearestWindows.read(store, manifest, grid).nearest(np.arange(40), TEST)
    whole = NearestWindows(kept, vectors[kept], grid.split).nearest(np.arange(40), TEST)
    np.testing.assert_array_equal(found, whole)
    assert (found >= 0).any()


def test_windows_of_another_grid_are_an_error_that_says_what_to_do(tmp_path):
    grid, store = make_grid(), Store(tmp_path)
    for wrong in (4, 99 << 16):
        manifest = stored(store, np.array([0, wrong], dtype=np.uint64), [random_vectors(2)])
        with pytest.raises(StoreError, match=r"8 tokens.*window_embeddings again"):
            NearestWindows.read(store, manifest, grid)


def test_a_damaged_segment_is_an_error(tmp_path):
    grid, store = make_grid(), Store(tmp_path)
    manifest = stored(store, grid.window_id[:2], [random_vectors(2)])
    path = tmp_path / manifest.blob("vectors/00000").path
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match="checksum"):
        NearestWindows.read(store, manifest, grid)
