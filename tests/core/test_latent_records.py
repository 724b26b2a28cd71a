from collections import defaultdict

import numpy as np
import polars as pl
import pytest
from dataset_builders import BOS, make_dataset, random_documents
from record_oracle import (
    LAYER,
    Oracle,
    activations_of,
    counts_of,
    random_cache,
    records,
    small_config,
)

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.latent_records import (
    RecordTables,
    latent_records_of,
    record_counts,
    records_in_order,
)
from autointerp_dagster.core.negatives import NegativeSources, token_windows
from autointerp_dagster.core.schemas import LATENTS, WINDOWS
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.core.windows import SPLITS, window_grid

RATES = [0.03, 0.0, 0.05, 0.001, 0.15, 1.0, 0.02, 0.03]


@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        (0, {}),
        (1, {"silent_scope": "context", "n_quantiles": 10}),
        (2, {"near_duplicate_jaccard": 0.3, "window_len": 12, "seed": 5}),
        (3, {"n_select": 0, "n_train": 1, "min_test_windows": 8}),
        (7, {"window_mode": "centred"}),
        (5, {"window_mode": "centred", "near_duplicate_jaccard": 0.3, "window_len": 12}),
        (8, {"near_duplicate_jaccard": None}),
        (9, {"window_mode": "centred", "near_duplicate_jaccard": None}),
        (6, {"window_mode": "centred", "silent_scope": "context", "near_duplicate_jaccard": 1.0}),
    ],
)
def test_every_table_is_that_of_plain_loops(seed, changes):
    config = small_config(**changes)
    dataset, rows = random_cache(seed, RATES)
    tables = records(dataset, rows, len(RATES), config)
    n_kept = sum(len(dataset.context_tokens(c)) - 1 for c in range(len(dataset.offsets) - 1))
    columns = (
        "split", "is_activating", "window_id", "quantile", "rank", "max_activation", "activations"
    )  # fmt: skip
    seen = set()
    for latent in range(len(RATES)):
        oracle = Oracle(dataset, rows, latent, config)
        row = tables.latents.row(latent, named=True)
        seen.add(row["status"])
        values = [r[3] for r in oracle.rows]
        assert row["latent"] == latent
        assert row["status"] == oracle.status()
        assert row["n_tokens"] == len(values)
        assert row["n_contexts"] == len({r[1] for r in oracle.rows})
        assert row["n_windows"] == len(oracle.fired)
        assert row["token_firing_rate"] == pytest.approx(len(values) / n_kept)
        assert row["window_firing_rate"] == len(oracle.fired) / oracle.grid.n_windows
        assert row["max_activation"] == max(values, default=None)
        for split in SPLITS:
            assert row[f"n_{split}"] == len(oracle.in_split(split))
        top = oracle.top_tokens()
        assert row["top_tokens"] == [token for token, _ in top]
        assert row["top_token_shares"] == pytest.approx([share for _, share in top])
        if values:
            quantiles = np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist()
            assert row["activation_quantiles"] == pytest.approx(quantiles)
        else:
            assert row["activation_quantiles"] is None
        got = tables.windows.filter(pl.col("latent") == latent)
        wanted, n_dropped = oracle.windows() if row["status"] == "ok" else ([], 0)
        assert got.select(columns).rows() == wanted
        assert row["n_near_duplicates"] == n_dropped
        for split in SPLITS:
            n = sum(1 for w in wanted if w[0] == split and not w[1])
            assert row[f"n_negative_{split}"] == n
    assert seen == {"ok", "dead", "rare", "dense"}
    assert tables.latents["n_near_duplicates"].sum() > 0
    assert tables.windows["negative_kind"].drop_nulls().unique().to_list() == ["random"]


def test_shuffled_rows_ranges_and_a_shared_grid_give_identical_tables():
    config = small_config()
    dataset, rows = random_cache(4, RATES)
    whole = records(dataset, rows, len(RATES), config)
    order = np.random.default_rng(0).permutation(len(rows))
    counts = counts_of(rows, len(RATES))
    shuffled = latent_records_of(
        activations_of([rows[i] for i in order]),
        counts.reverse(),
        dataset,
        LAYER,
        range(len(RATES)),
        config,
        window_grid(dataset, config),
    )
    parts = [
        records(dataset, rows, len(RATES), config, range(a, b))
        for a, b in ((0, 1), (1, 4), (4, 5), (5, 8))
    ]
    for name in ("latents", "windows"):
        assert getattr(shuffled, name).equals(getattr(whole, name))
        assert pl.concat(getattr(p, name) for p in parts).equals(getattr(whole, name))


def test_the_draw_depends_on_seed_and_layer():
    dataset, rows = random_cache(5, [0.05, 0.05])
    base = records(dataset, rows, 2, small_config()).windows["window_id"].to_list()
    seeded = records(dataset, rows, 2, small_config(seed=1)).windows["window_id"].to_list()
    layer = LayerKey("sae", "layers.10")
    other = records(dataset, rows, 2, small_config(), layer=layer).windows["window_id"].to_list()
    assert base != seeded
    assert base != other


@pytest.mark.parametrize("mode", ["fixed", "centred"])
@pytest.mark.parametrize("strategy", ["quantiles", "random", "top", "mix"])
def test_train_and_test_never_overlap_nor_nearly(strategy, mode):
    # Defect 1, at the level of windows, of document blocks and of text.
    config = small_config(strategy=strategy, near_duplicate_jaccard=0.5, window_mode=mode)
    dataset, rows = random_cache(6, [0.05, 0.1, 0.02])
    tables = records(dataset, rows, 3, config)
    grid = window_grid(dataset, config)
    block_of = dict(zip(grid.context.tolist(), grid.block.tolist(), strict=True))
    splits_of_block = defaultdict(set)
    for latent in range(3):
        oracle = Oracle(dataset, rows, latent, config)
        mine = tables.windows.filter(pl.col("latent") == latent)
        assert mine["window_id"].is_unique().all()
        for row in mine.iter_rows(named=True):
            splits_of_block[block_of[row["context"]]].add(row["split"])
        train, select, test = (
            mine.filter(pl.col("split") == split).select("context", "start").rows()
            for split in SPLITS
        )
        assert train
        assert select
        assert test
        assert not any(oracle.is_repeat(w, train) for w in select)
        assert not any(oracle.is_repeat(w, [*train, *select]) for w in test)
    assert all(len(splits) == 1 for splits in splits_of_block.values())
    assert tables.latents["n_near_duplicates"].sum() > 0


class AnyWindow:
    """Finds the windows of a split in the grid's order, or of any split."""

    def __init__(self, grid, is_blind=False):
        self.grid, self.is_blind = grid, is_blind

    def nearest(self, window, split):
        found = np.flatnonzero((self.grid.split == split) | self.is_blind)
        return np.tile(found, (len(window), 1))


def boilerplate(n: int = 120):
    """Contexts whose third window is the same text; the latent is active in half of these."""
    rng = np.random.default_rng(0)
    documents = []
    for i in range(n):
        tokens = rng.integers(10, 5000, 32)
        tokens[16:24] = range(1, 9)
        documents.append((f"d{i}", [[BOS, *tokens[1:].tolist()]]))
    rows = [(0, c, 20, 1.0 + c) for c in range(0, n, 2)] + [(0, c, 28, 1.0) for c in range(0, n, 3)]
    return make_dataset(documents), sorted(rows)


@pytest.mark.parametrize("mode", ["fixed", "centred"])
@pytest.mark.parametrize("threshold", [0.5, None])
@pytest.mark.parametrize("kind", ["random", "similar", "same_token"])
def test_no_silent_window_has_the_text_of_an_activating_one_of_its_split(kind, threshold, mode):
    dataset, rows = boilerplate()
    config = small_config(
        negative_kinds=(kind,), near_duplicate_jaccard=threshold, window_mode=mode,
        max_window_firing_rate=1.0, n_negative_test=40,
    )  # fmt: skip
    grid = window_grid(dataset, config)
    sources = NegativeSources(similar=AnyWindow(grid), token_windows=token_windows(dataset, grid))
    counts, all_rows = counts_of(rows, 1), activations_of(rows)
    tables = latent_records_of(all_rows, counts, dataset, LAYER, range(1), config, grid, sources)
    texts = tables.windows.select(
        "split",
        "is_activating",
        text=pl.struct("context", "start").map_elements(
            lambda w: str(dataset.context_tokens(w["context"])[w["start"] :][:8]), pl.String
        ),
    )
    active, silent = texts.filter("is_activating"), texts.filter(~pl.col("is_activating"))
    assert kind == "same_token" or silent.height > 10
    assert silent.join(active, on=["split", "text"], how="semi").is_empty()
    if mode == "fixed" and kind != "same_token":
        assert tables.latents["n_near_duplicates"].item() > 0


def test_negatives_of_another_split_are_an_error():
    dataset, rows = boilerplate()
    config = small_config(negative_kinds=("similar",))
    grid = window_grid(dataset, config)
    sources = NegativeSources(similar=AnyWindow(grid, is_blind=True))
    counts, all_rows = counts_of(rows, 1), activations_of(rows)
    with pytest.raises(RuntimeError, match="Report this bug"):
        latent_records_of(all_rows, counts, dataset, LAYER, range(1), config, grid, sources)


@pytest.mark.parametrize("scope", ["window", "context"])
def test_silent_windows_are_distinct_silent_and_differ_between_latents(scope):
    # Defect 12. Both latents fire on the same tokens, so only the address differs.
    config = small_config(silent_scope=scope, n_negative_test=30)
    dataset, rows = random_cache(7, [0.02])
    rows += [(1, *r[1:]) for r in rows]
    tables = records(dataset, rows, 2, config)
    silent = tables.windows.filter(~pl.col("is_activating"))
    firing = {(r[0], r[1]) for r in rows}
    drawn = []
    for latent in range(2):
        mine = silent.filter(pl.col("latent") == latent)
        assert mine["window_id"].is_unique().all()
        drawn.append(set(mine["window_id"]))
        for row in mine.iter_rows(named=True):
            if scope == "context":
                assert (latent, row["context"]) not in firing
            else:
                inside = range(row["start"], row["start"] + 8)
                assert not any(r[:2] == (latent, row["context"]) and r[2] in inside for r in rows)
    assert drawn[0] != drawn[1]


def test_silent_windows_stand_at_the_places_of_the_chosen_activating_ones():
    # The latent fires in the last window of a context only; so are its silent windows there.
    documents = random_documents(8, 200, max_contexts=1, context_len=32)
    dataset = make_dataset(documents)
    rows = [(0, c, 30, 1.0) for c in range(0, 200, 3)]
    config = small_config(n_negative_test=10)
    tables = records(dataset, rows, 1, config)
    silent = tables.windows.filter(~pl.col("is_activating"))
    assert silent["start"].unique().to_list() == [24]
    assert silent.filter(split="test").height == 10


def test_too_few_silent_windows_are_fewer_and_never_come_from_elsewhere():
    # One context per document; the latent is active in the first window of all but few.
    dataset = make_dataset(random_documents(9, 60, max_contexts=1, context_len=16))
    grid = window_grid(dataset, small_config())
    silent = set(range(0, 60, 10))
    rows = [(0, c, 2, 1.0) for c in range(60) if c not in silent]
    tables = records(dataset, rows, 1, small_config(n_negative_test=30))
    drawn = tables.windows.filter(~pl.col("is_activating"), split="test")
    there_are = [c for c in sorted(silent) if grid.split[grid.first_window[c]] == 2]
    assert sorted(drawn["context"]) == there_are
    assert tables.latents["n_negative_test"].item() == len(there_are)
    assert drawn["start"].unique().to_list() == [0]


@pytest.mark.parametrize("strategy", ["quantiles", "random", "top"])
def test_asking_for_more_windows_keeps_those_chosen_before(strategy):
    dataset, rows = random_cache(10, [0.05, 0.1], n_ids=100_000)
    few = small_config(strategy=strategy, near_duplicate_jaccard=1.0)
    more = small_config(
        strategy=strategy, near_duplicate_jaccard=1.0, n_train=9, n_test=15, n_select=6
    )
    smaller, larger = (records(dataset, rows, 2, c).windows for c in (few, more))
    keys = ["latent", "split", "window_id"]
    of_few = set(smaller.filter("is_activating").select(keys).rows())
    assert of_few < set(larger.filter("is_activating").select(keys).rows())


def test_asking_for_more_silent_windows_keeps_those_chosen_before():
    dataset, rows = random_cache(11, [0.05, 0.1])
    smaller, larger = (
        records(dataset, rows, 2, small_config(n_negative_test=n)).windows.filter(
            ~pl.col("is_activating"), split="test"
        )
        for n in (5, 12)
    )
    keys = ["latent", "window_id"]
    assert set(smaller.select(keys).rows()) < set(larger.select(keys).rows())


def test_a_hand_made_latent():
    # One document, so one split; windows of 4 tokens, the first one hides BOS.
    dataset = make_dataset([("d0", [[BOS, 5, 6, 7, 8, 5, 9, 9, 1, 2]])])
    config = SamplingConfig(window_len=4, min_tokens=1, min_test_windows=1, n_quantiles=2)
    grid = window_grid(dataset, config)
    assert SPLITS[grid.split[0]] == "test"
    rows = [(0, 0, 1, 1.0), (0, 0, 3, 3.0), (0, 0, 9, 8.0)]  # position 9 is in no whole window
    tables = records(dataset, rows, 1, config)
    row = tables.latents.row(0, named=True)
    assert row["n_tokens"] == 3
    assert row["n_windows"] == 1
    assert row["token_firing_rate"] == pytest.approx(3 / 9)
    assert row["window_firing_rate"] == 0.5
    assert row["max_activation"] == 8.0
    assert row["activation_quantiles"] == [1.0, 2.0, 3.0, 5.5, 8.0]
    assert (row["n_train"], row["n_select"], row["n_test"]) == (0, 0, 1)
    assert row["top_tokens"] == []
    assert tables.windows["activations"].to_list() == [[0.0, 1.0, 0.0, 3.0]]
    assert tables.windows["max_activation"].to_list() == [3.0]
    (record,) = records_in_order(tables, dataset, LAYER, [0])
    (window,) = record.windows
    assert window.tokens.tolist() == [5, 6, 7]
    assert window.activations.tolist() == [1.0, 0.0, 3.0]


def test_bos_is_never_shown_and_later_windows_are_whole():
    # Defect 3.
    dataset, rows = random_cache(12, [0.1])
    tables = records(dataset, rows, 1, small_config())
    (record,) = records_in_order(tables, dataset, LAYER, [0])
    assert {w.start for w in record.windows} >= {0, 8}
    for window in record.windows:
        first = max(1, window.start)
        context = dataset.context_tokens(window.context)
        assert window.tokens.tolist() == context[first : window.start + 8].tolist()
        assert len(window.activations) == len(window.tokens)
        assert window.is_activating == bool(window.activations.any())
        assert BOS not in window.tokens


def test_records_come_in_the_order_asked_for_with_windows_by_split_class_and_rank():
    dataset, rows = random_cache(13, RATES)
    tables = records(dataset, rows, len(RATES), small_config())
    shuffled = RecordTables(
        tables.latents.reverse(), tables.windows.sample(fraction=1.0, shuffle=True, seed=0)
    )
    got = list(records_in_order(shuffled, dataset, LAYER, [4, 1, 0]))
    assert [r.latent.index for r in got] == [4, 1, 0]
    assert [r.status for r in got] == tables.latents["status"].gather([4, 1, 0]).to_list()
    dead = got[1]
    assert (dead.max_activation, dead.top_tokens, dead.windows) == (None, (), ())
    for record in got:
        keys = [(SPLITS.index(w.split), not w.is_activating, w.rank) for w in record.windows]
        assert keys == sorted(keys)
        train = record.activating("train")
        assert [w.quantile for w in train] == sorted(w.quantile for w in train)
        assert [w.rank for w in record.non_activating("test")] == list(
            range(len(record.non_activating("test")))
        )
    with pytest.raises(ValueError, match=r"sae@layers\.9 latent 99"):
        list(records_in_order(tables, dataset, LAYER, [99]))


def test_the_rank_of_test_windows_does_not_follow_their_strength():
    dataset, rows = random_cache(14, [0.2])
    tables = records(dataset, rows, 1, small_config(n_test=100))
    test = tables.windows.filter("is_activating", split="test").sort("rank")
    quantiles = test["quantile"].to_list()
    assert test.height > 20
    assert quantiles not in (sorted(quantiles), sorted(quantiles, reverse=True))


def test_every_latent_has_a_row_with_its_status():
    dataset, rows = random_cache(15, RATES)
    tables = records(dataset, rows, len(RATES), small_config())
    status = dict(tables.latents.select("latent", "status").rows())
    assert [status[i] for i in (0, 1, 3, 5)] == ["ok", "dead", "rare", "dense"]
    assert set(tables.windows["latent"]) == {i for i, s in status.items() if s == "ok"}
    counts = record_counts(tables.latents, tables.windows.height)
    assert counts.ok + counts.dead + counts.rare + counts.dense == len(RATES)
    assert (counts.dead, counts.dense) == (1, 1)
    assert counts.n_windows == tables.windows.height


def test_an_empty_range_and_an_empty_cache_give_empty_tables_and_dead_latents():
    dataset, rows = random_cache(16, [0.1])
    empty = records(dataset, rows, 1, small_config(), range(0, 0))
    assert empty.latents.equals(LATENTS.empty())
    assert empty.windows.equals(WINDOWS.empty())
    dead = records(dataset, [], 3, small_config())
    assert dead.latents["status"].to_list() == ["dead"] * 3
    assert dead.latents["max_activation"].to_list() == [None] * 3
    assert dead.windows.height == 0


def test_a_latent_that_fires_on_every_token_is_dense_and_without_the_cut_has_no_negatives():
    dataset, rows = random_cache(17, [1.0])
    assert records(dataset, rows, 1, small_config()).latents["status"].item() == "dense"
    kept = records(dataset, rows, 1, small_config(max_window_firing_rate=1.0))
    row = kept.latents.row(0, named=True)
    assert (row["status"], row["token_firing_rate"], row["window_firing_rate"]) == ("ok", 1.0, 1.0)
    assert kept.windows["is_activating"].all()
    assert row["n_negative_test"] == 0


def test_a_dataset_without_bos_shows_its_first_token():
    dataset = make_dataset(
        [(content, [c[1:] for c in contexts]) for content, contexts in random_documents(18, 40)],
        bos_id=None,
    )
    rows = [(0, c, 0, 1.0) for c in range(0, len(dataset.offsets) - 1, 2)]
    tables = records(dataset, rows, 1, small_config())
    (record,) = records_in_order(tables, dataset, LAYER, [0])
    assert {len(w.tokens) for w in record.windows} == {8}
    assert all(w.activations[0] == 1.0 for w in record.windows if w.is_activating)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((0, 2, 3, float("nan")), r"sae@layers\.9 latent 0, context 2, position 3.*nan"),
        ((1, 2, 3, 0.0), r"latent 1, context 2.*not a finite number above 0"),
        ((1, 2, 3, -1.0), "not a finite number above 0"),
        ((1, 2, 3, float("inf")), "not a finite number above 0"),
        ((0, 2, 0, 1.0), "position 0.*not shown"),  # BOS
        ((0, 2, 999, 1.0), "position 999.*not there"),
        ((0, 999, 1, 1.0), "context 999.*not there"),
        ((7, 2, 3, 1.0), "latent 7.*outside of the range"),
    ],
)
def test_an_activation_that_cannot_be_is_an_error_that_says_where(row, message):
    dataset = make_dataset(random_documents(19, 10))
    with pytest.raises(ValueError, match=message):
        latent_records_of(
            activations_of([(0, 0, 1, 1.0), row]),
            counts_of([], 2),
            dataset,
            LAYER,
            range(2),
            small_config(),
        )


def test_two_activations_of_one_token_are_an_error():
    dataset = make_dataset(random_documents(20, 10))
    with pytest.raises(ValueError, match=r"latent 0, context 1, position 2: two activations"):
        records(dataset, [(0, 1, 2, 1.0), (0, 1, 2, 2.0)], 1, small_config())


def test_counts_that_do_not_match_the_activations_are_an_error():
    dataset = make_dataset(random_documents(21, 10))
    rows = [(1, 1, 2, 1.0)]
    for counts in (counts_of(rows * 2, 2), counts_of(rows, 2)[:1]):
        with pytest.raises(ValueError, match=r"sae@layers\.9 latent 1: 1 activations"):
            latent_records_of(
                activations_of(rows), counts, dataset, LAYER, range(2), small_config()
            )
