from collections import Counter, defaultdict
from functools import cached_property

import numpy as np
import polars as pl
import pytest
from dataset_builders import BOS, make_dataset, random_documents

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.latent_records import (
    RecordTables,
    latent_records_of,
    record_counts,
    records_in_order,
)
from autointerp_dagster.core.rng import address_key, hash_priority
from autointerp_dagster.core.negatives.silent import _permuted
from autointerp_dagster.core.schemas import ACTIVATIONS, FIRING_COUNTS, LATENTS, WINDOWS
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.core.windows import SPLITS, window_grid

LAYER = LayerKey("sae", "layers.9")
Row = tuple[int, int, int, float]


def activations_of(rows: list[Row]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=dict(ACTIVATIONS.columns), orient="row")


def counts_of(rows: list[Row], n_latents: int) -> pl.DataFrame:
    tokens, contexts = Counter(r[0] for r in rows), defaultdict(set)
    for latent, context, _, _ in rows:
        contexts[latent].add(context)
    return FIRING_COUNTS.conform(
        pl.DataFrame(
            {
                "latent": range(n_latents),
                "n_tokens": [tokens[i] for i in range(n_latents)],
                "n_contexts": [len(contexts[i]) for i in range(n_latents)],
                "max_activation": [
                    max((r[3] for r in rows if r[0] == i), default=None) for i in range(n_latents)
                ],
            },
            schema_overrides={"max_activation": pl.Float32},
        )
    )


def records(dataset, rows, n_latents, config, latents=None, layer=LAYER) -> RecordTables:
    latents = range(n_latents) if latents is None else latents
    mine = [r for r in rows if r[0] in latents]
    counts = counts_of(rows, n_latents)
    return latent_records_of(activations_of(mine), counts, dataset, layer, latents, config)


def small_config(**changes) -> SamplingConfig:
    defaults = {
        "window_len": 8, "n_train": 6, "n_select": 4, "n_test": 10, "n_negative_train": 12,
        "n_negative_select": 4, "n_negative_test": 12, "n_quantiles": 3, "min_tokens": 6,
        "min_test_windows": 1, "split_block": 2,
    }  # fmt: skip
    return SamplingConfig(**{**defaults, **changes})


def random_cache(seed: int, rates: list[float], n_documents: int = 36, n_ids: int = 500):
    """Contexts of unequal lengths; latent i fires on a token with probability ``rates[i]``."""
    rng = np.random.default_rng(seed)
    documents = [
        (content, [c[: rng.integers(2, len(c) + 1)] for c in contexts])
        for content, contexts in random_documents(seed, n_documents, n_ids, 5, 30)
    ]
    # Copies with another last token: near-duplicates that land in splits of their own.
    documents += [
        (f"copy-{content}", [[*c[:-1], n_ids + 1] for c in contexts])
        for content, contexts in documents[: n_documents // 2]
    ]
    dataset = make_dataset(documents)
    values = np.array([0.5, 1.0, 1.5, 2.0, 4.0, 7.0], dtype=np.float32)  # few: ties
    rows = [
        (latent, context, position, float(rng.choice(values)))
        for latent, rate in enumerate(rates)
        for context in range(len(dataset.offsets) - 1)
        for position in range(1, len(dataset.context_tokens(context)))
        if rng.random() < rate
    ]
    return dataset, rows


RATES = [0.03, 0.0, 0.05, 0.001, 0.15, 1.0, 0.02, 0.03]


# ---- a plain implementation of what the docstrings say ------------------------------------------


class Oracle:
    """One latent's record, by loops over windows."""

    def __init__(self, dataset, rows, latent, config):
        self.dataset, self.config, self.latent = dataset, config, latent
        self.grid = window_grid(dataset, config)  # tested by hand in test_windows
        self.rows = sorted(r for r in rows if r[0] == latent)
        self.fired: dict[int, dict[int, float]] = defaultdict(dict)
        for _, context, position, value in self.rows:
            window = int(self.grid.window_at(np.array([context]), np.array([position]))[0])
            if window >= 0:
                self.fired[window][position] = value
        self.grams_of: dict[int, set[tuple[int, ...]]] = {}
        self.address = address_key(config.seed, LAYER, latent, "windows")

    def hashed(self, purpose: int, item: int) -> int:
        key = hash_priority(self.address, np.array([purpose]))
        return int(hash_priority(key, np.array([item], dtype=np.uint64))[0])

    def id(self, window: int) -> int:
        return int(self.grid.window_id[window])

    def max(self, window: int) -> float:
        return max(self.fired[window].values())

    def split(self, window: int) -> str:
        return SPLITS[self.grid.split[window]]

    def in_split(self, name: str) -> list[int]:
        return [w for w in sorted(self.fired) if self.split(w) == name]

    def status(self) -> str:
        if not self.rows:
            return "dead"
        n_test = len(self.in_split("test"))
        if len(self.rows) < self.config.min_tokens or n_test < self.config.min_test_windows:
            return "rare"
        rate = len(self.fired) / self.grid.n_windows
        return "dense" if rate > self.config.max_window_firing_rate else "ok"

    def grams(self, window: int) -> set[tuple[int, ...]]:
        if window not in self.grams_of:
            start = int(self.grid.start[window])
            tokens = self.dataset.context_tokens(int(self.grid.context[window]))
            shown = tokens[max(1, start) : start + self.config.window_len].tolist()
            n = min(8, self.config.window_len - 1)
            self.grams_of[window] = {tuple(shown[i : i + n]) for i in range(len(shown) - n + 1)}
        return self.grams_of[window]

    def is_repeat(self, window: int, shown: list[int]) -> bool:
        a = self.grams(window)
        for other in shown:
            b = self.grams(other)
            if len(a & b) / len(a | b) >= self.config.near_duplicate_jaccard:
                return True
        return False

    @cached_property
    def strongest_first(self) -> list[int]:
        return sorted(self.fired, key=lambda w: (-self.max(w), self.hashed(0, self.id(w))))

    def quantile(self, window: int) -> int:
        order = self.strongest_first
        return order.index(window) * self.config.n_quantiles // len(order)

    def draw(self, windows: list[int], n: int) -> list[int]:
        """By turns over the quantiles."""
        queues: dict[int, list[int]] = defaultdict(list)
        for window in sorted(windows, key=lambda w: self.hashed(1, self.id(w))):
            queues[self.quantile(window)].append(window)
        turn = {w: i for queue in queues.values() for i, w in enumerate(queue)}
        return sorted(windows, key=lambda w: (turn[w], self.hashed(1, self.id(w))))[:n]

    def silent(self, split: int, chosen: list[int], n: int, shown: list[int]):
        """Drawn silent windows, and how many near-duplicates were passed over."""
        places = [int(self.grid.place[w]) for w in chosen]
        wanted = Counter(places[i % len(places)] for i in range(n)) if places else Counter()
        drawn: list[int] = []
        passed_over = 0
        for place, quota in wanted.items():
            members = np.flatnonzero((self.grid.split == split) & (self.grid.place == place))
            key = np.array([self.hashed(2, place * 3 + split)], dtype=np.uint64)
            for i in range(len(members)):
                if quota == 0:
                    break
                at = _permuted(np.array([i]), np.array([len(members)]), key)[0]
                window = int(members[at])
                if self.is_active(window):
                    continue
                if split != 0 and self.is_repeat(window, shown):
                    passed_over += 1
                    continue
                drawn.append(window)
                quota -= 1
        return drawn, passed_over

    def is_active(self, window: int) -> bool:
        if self.config.silent_scope == "window":
            return window in self.fired
        return any(r[1] == self.grid.context[window] for r in self.rows)

    def windows(self) -> tuple[list[tuple], int]:
        """Rows (split, is_activating, window_id, quantile, rank, maximum, activations)."""
        config = self.config
        rows, shown, n_dropped = [], [], 0
        for code, split in enumerate(SPLITS):
            candidates = self.in_split(split)
            if split != "train":
                kept = [w for w in candidates if not self.is_repeat(w, shown)]
                n_dropped += len(candidates) - len(kept)
                candidates = kept
            chosen = self.draw(candidates, getattr(config, f"n_{split}"))
            n_silent = getattr(config, f"n_negative_{split}")
            silent, passed_over = self.silent(code, chosen, n_silent, shown)
            n_dropped += passed_over
            shown = [*shown, *chosen, *silent]
            if split == "train":
                used = [w for w in self.strongest_first if w in chosen]
            else:
                used = sorted(chosen, key=lambda w: self.hashed(3, self.id(w)))
            for rank, w in enumerate(used):
                start = int(self.grid.start[w])
                values = [self.fired[w].get(start + i, 0.0) for i in range(config.window_len)]
                row = (split, True, self.id(w), self.quantile(w), rank, self.max(w), values)
                rows.append(row)
            for rank, w in enumerate(sorted(silent, key=lambda w: self.hashed(3, self.id(w)))):
                rows.append((split, False, self.id(w), None, rank, None, None))
        return sorted(rows, key=lambda r: r[:3]), n_dropped

    def top_tokens(self) -> list[tuple[int, float]]:
        sums: dict[int, float] = defaultdict(float)
        for window in self.in_split("train"):
            tokens = self.dataset.context_tokens(int(self.grid.context[window]))
            for position, value in self.fired[window].items():
                sums[int(tokens[position])] += value
        total = sum(sums.values())
        ranked = sorted(sums.items(), key=lambda item: (-item[1], item[0]))
        return [(token, value / total) for token, value in ranked[:8]]


@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        (0, {}),
        (1, {"silent_scope": "context", "n_quantiles": 10}),
        (2, {"near_duplicate_jaccard": 0.3, "window_len": 12, "seed": 5}),
        (3, {"n_select": 0, "n_train": 1, "min_test_windows": 8}),
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


@pytest.mark.parametrize("strategy", ["quantiles", "random", "top", "mix"])
def test_train_and_test_never_overlap_nor_nearly(strategy):
    # Defect 1, at the level of windows, of document blocks and of text.
    config = small_config(strategy=strategy, near_duplicate_jaccard=0.5)
    dataset, rows = random_cache(6, [0.05, 0.1, 0.02])
    tables = records(dataset, rows, 3, config)
    grid = window_grid(dataset, config)
    block_of = dict(zip(grid.window_id.tolist(), grid.block.tolist(), strict=True))
    window_of = {int(name): i for i, name in enumerate(grid.window_id)}
    splits_of_block = defaultdict(set)
    for latent in range(3):
        oracle = Oracle(dataset, rows, latent, config)
        mine = tables.windows.filter(pl.col("latent") == latent)
        assert mine["window_id"].is_unique().all()
        for row in mine.iter_rows(named=True):
            splits_of_block[block_of[row["window_id"]]].add(row["split"])
        train, select, test = (
            [window_of[i] for i in mine.filter(pl.col("split") == split)["window_id"]]
            for split in SPLITS
        )
        assert train
        assert select
        assert test
        assert not any(oracle.is_repeat(w, train) for w in select)
        assert not any(oracle.is_repeat(w, [*train, *select]) for w in test)
    assert all(len(splits) == 1 for splits in splits_of_block.values())
    assert tables.latents["n_near_duplicates"].sum() > 0


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
    counts = record_counts(tables)
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
