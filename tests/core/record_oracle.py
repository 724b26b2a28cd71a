"""Latent records by loops over one latent's windows, as the docstrings of the package say it."""

from collections import Counter, defaultdict
from functools import cached_property

import numpy as np
import polars as pl
from dataset_builders import make_dataset, random_documents

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.latent_records import RecordTables, latent_records_of
from autointerp_dagster.core.negatives.permuting import permuted
from autointerp_dagster.core.rng import address_key, hash_priority
from autointerp_dagster.core.schemas import ACTIVATIONS, FIRING_COUNTS
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.core.windows import SPLITS, window_grid

Span = tuple[int, int]
"""Context and start of a window."""
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
        self.value: dict[int, dict[int, float]] = defaultdict(dict)
        for _, context, position, value in self.rows:
            self.value[context][position] = value
        self.grams_of: dict[Span, set[tuple[int, ...]]] = {}
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

    def on_grid(self, window: int) -> Span:
        return int(self.grid.context[window]), int(self.grid.start[window])

    def shown_as(self, window: int) -> Span:
        """Context and start of what is shown of an activating window."""
        context, start = self.on_grid(window)
        if self.config.window_mode == "fixed":
            return context, start
        length = len(self.dataset.context_tokens(context))
        peak = min(p for p, v in self.fired[window].items() if v == self.max(window))
        start = peak - 3 * self.config.window_len // 4
        return context, max(0, min(start, length - self.config.window_len))

    def values(self, span: Span) -> list[float]:
        """The activation at each position, whichever windows of the grid they are in."""
        context, start = span
        return [self.value[context].get(start + i, 0.0) for i in range(self.config.window_len)]

    @cached_property
    def candidates(self) -> set[int]:
        """All activating windows; of centred ones, those at a peak and without overlaps."""
        if self.config.window_mode == "fixed":
            return set(self.fired)
        kept: list[int] = []
        for window in self.strongest_first:
            context, start = self.shown_as(window)
            others = [s for c, s in map(self.shown_as, kept) if c == context]
            has_window = len(self.dataset.context_tokens(context)) // self.config.window_len
            has_window *= self.config.window_len
            rivals = self.values((context, start))[: has_window - start]  # the tail has no window
            is_peak = max(rivals) == self.max(window)
            if is_peak and all(abs(start - s) >= self.config.window_len for s in others):
                kept.append(window)
        return set(kept)

    def text(self, span: Span) -> tuple[int, ...]:
        context, start = span
        tokens = self.dataset.context_tokens(context)
        return tuple(tokens[max(1, start) : start + self.config.window_len].tolist())

    def grams(self, span: Span) -> set[tuple[int, ...]]:
        if span not in self.grams_of:
            shown = self.text(span)
            n = min(8, self.config.window_len - 1)
            self.grams_of[span] = {shown[i : i + n] for i in range(len(shown) - n + 1)}
        return self.grams_of[span]

    def is_repeat(self, span: Span, shown: list[Span]) -> bool:
        if self.config.near_duplicate_jaccard is None:
            return False
        a = self.grams(span)
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

    def silent(self, split: int, chosen: list[int], n: int, shown: list[Span]):
        """Drawn silent windows, and how many near-duplicates were passed over."""
        mine = [self.shown_as(w) for w in chosen]
        texts = {self.text(span) for span in mine}
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
                at = permuted(np.array([i]), np.array([len(members)]), key)[0]
                window = int(members[at])
                span = self.on_grid(window)
                if self.is_active(window) or any(self.meet(span, other) for other in mine):
                    continue
                is_same = self.config.near_duplicate_jaccard is None and self.text(span) in texts
                if is_same or self.is_repeat(span, [*shown, *mine]):
                    passed_over += 1
                    continue
                drawn.append(window)
                quota -= 1
        return drawn, passed_over

    def meet(self, a: Span, b: Span) -> bool:
        return a[0] == b[0] and abs(a[1] - b[1]) < self.config.window_len

    def is_active(self, window: int) -> bool:
        if self.config.silent_scope == "window":
            return window in self.fired
        return any(r[1] == self.grid.context[window] for r in self.rows)

    def windows(self) -> tuple[list[tuple], int]:
        """Rows (split, is_activating, window_id, quantile, rank, maximum, activations)."""
        config = self.config
        rows, shown, n_dropped = [], [], 0
        for code, split in enumerate(SPLITS):
            candidates = [w for w in self.in_split(split) if w in self.candidates]
            if split != "train":
                kept = [w for w in candidates if not self.is_repeat(self.shown_as(w), shown)]
                n_dropped += len(candidates) - len(kept)
                candidates = kept
            chosen = self.draw(candidates, getattr(config, f"n_{split}"))
            n_silent = getattr(config, f"n_negative_{split}")
            silent, passed_over = self.silent(code, chosen, n_silent, shown)
            n_dropped += passed_over
            shown = [*shown, *map(self.shown_as, chosen), *map(self.on_grid, silent)]
            if split == "train":
                used = [w for w in self.strongest_first if w in chosen]
            else:
                used = sorted(chosen, key=lambda w: self.hashed(3, self.id(w)))
            for rank, w in enumerate(used):
                context, start = self.shown_as(w)
                values = self.values((context, start))
                name = context << 16 | start
                rows.append((split, True, name, self.quantile(w), rank, max(values), values))
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
