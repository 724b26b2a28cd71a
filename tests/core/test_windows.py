import numpy as np
import pytest
from dataset_builders import BOS, make_dataset, random_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.rng import address_key
from autointerp_dagster.core.windows import (
    SPLITS,
    Spans,
    check_splits,
    near_duplicates,
    repeating_spans,
    window_grid,
)


def split_of(grid) -> list[str]:
    return [SPLITS[code] for code in grid.split]


def test_windows_are_cut_at_multiples_and_only_whole_ones_count():
    # Lengths 10, 3, 8 with windows of 4: starts 0 and 4; none; 0 and 4.
    contexts = [list(range(10)), list(range(3)), list(range(8))]
    grid = window_grid(make_dataset([("a", contexts)]), SamplingConfig(window_len=4))
    assert grid.context.tolist() == [0, 0, 2, 2]
    assert grid.start.tolist() == [0, 4, 0, 4]
    assert grid.place.tolist() == [0, 1, 0, 1]
    assert grid.window_id.tolist() == [0, 4, (2 << 16), (2 << 16) + 4]
    assert grid.n_kept_tokens == 9 + 2 + 7
    at = grid.window_at(np.array([0, 0, 0, 0, 1, 2]), np.array([1, 3, 4, 8, 2, 7]))
    assert at.tolist() == [0, 0, 1, -1, -1, 3]


def test_without_bos_every_token_is_kept():
    grid = window_grid(make_dataset([("a", [[0, 0, 5, 6]])], None), SamplingConfig(window_len=4))
    assert (grid.first_visible, grid.n_kept_tokens) == (0, 4)


def test_a_window_never_spans_documents():
    # Defect 3: two documents of 6 tokens are 12 tokens, but one whole window of 4 each.
    dataset = make_dataset([("a", [[0, 1, 2, 3, 4, 5]]), ("b", [[0, 6, 7, 8, 9, 10]])])
    grid = window_grid(dataset, SamplingConfig(window_len=4))
    assert list(zip(grid.context.tolist(), grid.start.tolist(), strict=True)) == [(0, 0), (1, 0)]


def test_an_empty_dataset_has_no_windows():
    assert window_grid(make_dataset([]), SamplingConfig(window_len=4)).n_windows == 0
    short = make_dataset([("a", [[0, 1]])])
    assert window_grid(short, SamplingConfig(window_len=4)).n_windows == 0


def test_a_split_is_the_hash_of_content_and_block_number():
    config = SamplingConfig(window_len=4, split_block=2, seed=3)
    documents = random_documents(1, 40, max_contexts=5)
    grid = window_grid(make_dataset(documents), config)
    wanted = []
    for content, contexts in documents:
        for number in range(len(contexts)):
            key = address_key(3, None, None, f"split\0{content}\0{number // 2}") / 2**64
            split = "train" if key < 0.4 else "select" if key < 0.5 else "test"
            wanted += [split] * 4  # 16 tokens are four windows
    assert split_of(grid) == wanted
    assert set(wanted) == set(SPLITS)


def test_appended_documents_change_nothing():
    config = SamplingConfig(window_len=4, split_block=2)
    documents = random_documents(2, 30)
    few, many = (window_grid(make_dataset(documents[:n]), config) for n in (10, 30))
    assert np.array_equal(few.split, many.split[: few.n_windows])
    assert np.array_equal(few.window_id, many.window_id[: few.n_windows])


def test_a_document_that_grows_keeps_the_split_of_its_first_contexts():
    contexts = random_documents(3, 1)[0][1][:1] * 40
    config = SamplingConfig(window_len=4)
    short = window_grid(make_dataset([("a", contexts[:16])]), config)
    long = window_grid(make_dataset([("a", contexts)]), config)
    assert np.array_equal(short.split, long.split[: short.n_windows])
    assert len(set(long.block.tolist())) == 3  # 16 + 16 + 8 contexts


def test_splits_have_the_configured_shares_and_depend_on_the_seed():
    documents = [(f"d{i}", [[BOS, 1, 2, 3]]) for i in range(4000)]
    dataset = make_dataset(documents)
    grid = window_grid(dataset, SamplingConfig(window_len=4))
    shares = np.bincount(grid.split, minlength=3) / 4000
    # Standard error of the largest: sqrt(.25 / 4000) = .008.
    assert shares == pytest.approx([0.4, 0.1, 0.5], abs=0.032)
    other = window_grid(dataset, SamplingConfig(window_len=4, seed=1))
    assert not np.array_equal(grid.split, other.split)


def test_documents_of_equal_content_are_in_one_split():
    documents = [("same", [[BOS, 1, 2, 3]]), ("x", [[BOS, 4, 5, 6]]), ("same", [[BOS, 1, 2, 3]])]
    grid = window_grid(make_dataset(documents), SamplingConfig(window_len=4))
    assert grid.split[0] == grid.split[2]
    assert grid.block[0] == grid.block[2]


def test_a_block_in_two_splits_is_an_error():
    dataset = make_dataset([("a", [[0, 1, 2, 3, 4, 5, 6, 7]])])
    grid = window_grid(dataset, SamplingConfig(window_len=4))
    own = int(grid.split[0])
    check_splits(grid, np.array([0, 1]), np.array([own, own]))
    other = (own + 1) % 3
    with pytest.raises(
        RuntimeError, match=f"context 0 window at 0.*{SPLITS[own]}.*{SPLITS[other]}"
    ):
        check_splits(grid, np.array([0, 1]), np.array([own, other]))
    with pytest.raises(RuntimeError, match="context 0 window at 0"):  # nothing else was drawn of it
        check_splits(grid, np.array([0]), np.array([other]))


def test_a_context_that_no_window_id_can_address_is_an_error():
    dataset = make_dataset([("a", [[1] * 65_537])])
    with pytest.raises(ValueError, match="65537"):
        window_grid(dataset, SamplingConfig(window_len=32))


def jaccard(a: list[int], b: list[int], n: int = 8) -> float:
    grams_a, grams_b = ({tuple(x[i : i + n]) for i in range(len(x) - n + 1)} for x in (a, b))
    return len(grams_a & grams_b) / len(grams_a | grams_b)


def oracle(dataset, grid, shown, asked, threshold, n=8) -> list[bool]:
    def visible(window: int) -> list[int]:
        start = int(grid.start[window])
        tokens = dataset.context_tokens(int(grid.context[window]))
        return tokens[max(start, dataset.first_visible) : start + grid.window_len].tolist()

    pairs = list(zip(*shown, strict=True))
    return [
        any(
            other == latent and jaccard(visible(w), visible(window), n) >= threshold
            for other, w in pairs
        )
        for latent, window in zip(*asked, strict=True)
    ]


def test_a_window_one_token_away_is_a_near_duplicate_and_two_far_apart_are_not():
    # 32 visible tokens are 25 8-grams. A change of the last token leaves 24 of 26: .92; the
    # last three: 22 of 28: .79; a copy shifted by two tokens shares 23 of 27: .85.
    base = list(range(100, 132))
    one, three = [*base[:31], 1], [*base[:29], 1, 2, 3]
    shifted = [*base[2:], 4, 5]
    contexts = [[*base], [*one], [*three], [*shifted], list(range(200, 232))]
    dataset = make_dataset([("a", contexts)], bos_id=None)
    grid = window_grid(dataset, SamplingConfig())
    shown = (np.array([7]), np.array([0]))
    asked = (np.full(4, 7), np.arange(1, 5))
    assert near_duplicates(grid.shingles, shown, asked).tolist() == [True, False, True, False]
    elsewhere = (np.full(4, 8), np.arange(1, 5))
    assert not near_duplicates(grid.shingles, shown, elsewhere).any()


def test_a_jaccard_of_exactly_the_threshold_is_dropped():
    # One end changed by k tokens: (25 - k) / (25 + k); k = 5 gives 20 / 30.
    base = list(range(100, 132))
    dataset = make_dataset([("a", [base, [*base[:27], 1, 2, 3, 4, 5]])], bos_id=None)
    one = (np.array([0]), np.array([0]))
    other = (np.array([0]), np.array([1]))
    at = window_grid(dataset, SamplingConfig(near_duplicate_jaccard=20 / 30))
    above = window_grid(dataset, SamplingConfig(near_duplicate_jaccard=20 / 30 + 1e-9))
    assert near_duplicates(at.shingles, one, other).tolist() == [True]
    assert near_duplicates(above.shingles, one, other).tolist() == [False]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    threshold=st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0]),
    n_ids=st.sampled_from([2, 3, 40]),
    window_len=st.sampled_from([4, 8, 16]),
)
def test_near_duplicates_are_those_of_a_plain_loop(seed, threshold, n_ids, window_len):
    rng = np.random.default_rng(seed)
    documents = random_documents(seed, 6, n_ids)
    copies = [(f"copy{i}", documents[i][1]) for i in range(3)]
    for _, contexts in copies[:2]:
        contexts[0] = [*contexts[0][:-1], 77]
    dataset = make_dataset(documents + copies)
    config = SamplingConfig(window_len=window_len, near_duplicate_jaccard=threshold)
    grid = window_grid(dataset, config)
    windows = rng.permutation(grid.n_windows)
    shown = (rng.integers(0, 2, 6), windows[:6])
    asked = (rng.integers(0, 2, len(windows) - 6), windows[6:])
    # A window that shows fewer than eight tokens is compared by n-grams of what it shows.
    n = min(8, window_len - 1)
    wanted = oracle(dataset, grid, shown, asked, threshold, n)
    assert near_duplicates(grid.shingles, shown, asked).tolist() == wanted


def test_near_duplicates_found_in_small_parts_are_the_same(monkeypatch):
    documents = random_documents(5, 8, 2)
    dataset = make_dataset(documents)
    grid = window_grid(dataset, SamplingConfig(window_len=16, near_duplicate_jaccard=0.1))
    shown = (np.zeros(5, dtype=np.int64), np.arange(5))
    asked = (np.zeros(grid.n_windows - 5, dtype=np.int64), np.arange(5, grid.n_windows))
    whole = near_duplicates(grid.shingles, shown, asked)
    monkeypatch.setattr("autointerp_dagster.core.windows.shingles._PAIRS_AT_ONCE", 3)
    assert np.array_equal(near_duplicates(grid.shingles, shown, asked), whole)
    assert whole.any()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    threshold=st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0]),
    n_ids=st.sampled_from([2, 3, 40]),
    window_len=st.sampled_from([4, 8, 12]),
)
def test_near_duplicates_off_the_grid_are_those_of_a_plain_loop(seed, threshold, n_ids, window_len):
    rng = np.random.default_rng(seed)
    dataset = make_dataset(random_documents(seed, 6, n_ids))
    length = np.diff(dataset.offsets)

    def spans(n: int) -> Spans:
        context = rng.integers(0, len(length), n)
        start = rng.integers(0, length[context] - window_len + 1)
        return Spans(rng.integers(0, 2, n), context, start)

    def visible(context: int, start: int) -> list[int]:
        tokens = dataset.context_tokens(context)
        return tokens[max(start, 1) : start + window_len].tolist()

    shown, asked = spans(6), spans(30)
    n = min(8, window_len - 1)
    wanted = [
        any(
            a == b and jaccard(visible(*there), visible(*here), n) >= threshold
            for b, *there in zip(*map(np.ndarray.tolist, shown), strict=True)
        )
        for a, *here in zip(*map(np.ndarray.tolist, asked), strict=True)
    ]
    assert repeating_spans(dataset, window_len, threshold, shown, asked).tolist() == wanted


def test_near_duplicates_off_the_grid_found_in_small_parts_are_the_same(monkeypatch):
    dataset = make_dataset(random_documents(5, 8))
    n = len(dataset.offsets) - 1
    zeros = np.zeros(n, dtype=np.int64)
    all_of = Spans(zeros, np.arange(n), zeros + 3)
    some = Spans(zeros[:3], np.arange(3), zeros[:3] + 3)
    whole = repeating_spans(dataset, 8, 0.2, some, all_of)
    monkeypatch.setattr("autointerp_dagster.core.windows.spans._SPANS_AT_ONCE", 2)
    assert np.array_equal(repeating_spans(dataset, 8, 0.2, some, all_of), whole)
    assert whole.sum() == 3


def test_a_grid_without_near_duplicates_holds_no_grams():
    dataset = make_dataset(random_documents(6, 8))
    for changes in ({"near_duplicate_jaccard": None}, {"window_mode": "centred"}):
        assert window_grid(dataset, SamplingConfig(window_len=4, **changes)).shingles is None


def test_strata_hold_every_window_once_by_split_and_place():
    grid = window_grid(make_dataset(random_documents(7, 30)), SamplingConfig(window_len=4))
    assert sorted(grid.strata.members.tolist()) == list(range(grid.n_windows))
    for split in range(len(SPLITS)):
        for place in range(grid.strata.n_places):
            stratum = split * grid.strata.n_places + place
            first, stop = grid.strata.first[stratum : stratum + 2]
            wanted = np.flatnonzero((grid.split == split) & (grid.place == place))
            assert grid.strata.members[first:stop].tolist() == wanted.tolist()
