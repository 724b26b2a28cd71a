"""Latent records by loops over one latent's windows, as the docstrings of the package say it.

Written as one would without arrays, but not wastefully: n-grams of a window are kept between
latents, only windows that share one with a train window are compared, and hashes of many windows
are asked for at once.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from autointerp_dagster.core.config import SamplingConfig
from autointerp_dagster.core.latent_records import RecordTables
from autointerp_dagster.core.negatives.permuting import (
    permuted,
)  # the same draw, or nothing compares
from autointerp_dagster.core.rng import address_key, hash_priority
from autointerp_dagster.core.schemas import LATENTS, WINDOWS
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LayerKey
from autointerp_dagster.core.windows import GRAM_LEN, SPLITS, WindowGrid

Row = dict[str, Any]
Grams = frozenset[tuple[int, ...]]
TIE, DRAW, SILENT, RANK = range(4)
N_TOP_TOKENS = 8


@dataclass
class Shared:
    """What all latents have in common."""

    dataset: TokenDataset
    grid: WindowGrid
    layer: LayerKey
    config: SamplingConfig
    grams: dict[int, Grams] = field(default_factory=dict)

    def __post_init__(self) -> None:
        grid = self.grid
        self.context, self.start = grid.context.tolist(), grid.start.tolist()
        self.place, self.split = grid.place.tolist(), grid.split.tolist()
        self.id, self.first = grid.window_id.tolist(), grid.first_window.tolist()
        self.tokens = [self.dataset.context_tokens(c).tolist() for c in range(len(self.first) - 1)]
        self.members: dict[tuple[int, int], list[int]] = defaultdict(list)
        for window, stratum in enumerate(zip(self.split, self.place, strict=True)):
            self.members[stratum].append(window)

    def text_of(self, window: int) -> tuple[int, ...]:
        """A window's visible tokens."""
        start, stop = self.start[window], self.start[window] + self.config.window_len
        return tuple(
            self.tokens[self.context[window]][max(self.dataset.first_visible, start) : stop]
        )

    def grams_of(self, window: int) -> Grams:
        """The n-grams of a window's visible tokens."""
        if window not in self.grams:
            shown, length = self.text_of(window), self.config.window_len
            n = min(GRAM_LEN, length - self.dataset.first_visible)
            self.grams[window] = frozenset(shown[i : i + n] for i in range(len(shown) - n + 1))
        return self.grams[window]


class Latent:
    """One latent's record."""

    def __init__(
        self, shared: Shared, latent: int, n_contexts: int, rows: Sequence[tuple[int, int, float]]
    ) -> None:
        self.shared, self.latent, self.n_contexts, self.rows = shared, latent, n_contexts, rows
        self.fired: dict[int, dict[int, float]] = defaultdict(dict)
        for context, position, value in rows:
            window = shared.first[context] + position // shared.config.window_len
            if window < shared.first[context + 1]:
                self.fired[window][position] = value
        self.maximum = {window: max(values.values()) for window, values in self.fired.items()}
        address = address_key(shared.config.seed, shared.layer, latent, "windows")
        self.keys = hash_priority(address, np.arange(4))

    def row(self) -> Row:
        """The latent's row, its windows counted but not drawn."""
        of_split = Counter(SPLITS[self.shared.split[window]] for window in self.fired)
        values = [value for _, _, value in self.rows]
        top = self._top_tokens()
        n_kept = self.shared.grid.n_kept_tokens
        return {
            "latent": self.latent,
            "status": self.status,
            "n_tokens": len(values),
            "n_contexts": self.n_contexts,
            "n_windows": len(self.fired),
            "token_firing_rate": len(values) / n_kept,
            "window_firing_rate": len(self.fired) / self.shared.grid.n_windows,
            "max_activation": max(values, default=None),
            **{f"n_{name}": of_split[name] for name in SPLITS},
            "n_near_duplicates": 0,
            **{f"n_negative_{name}": 0 for name in SPLITS},
            "top_tokens": [token for token, _ in top],
            "top_token_shares": [share for _, share in top],
            "activation_quantiles": (
                np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist() if values else None
            ),
        }

    @cached_property
    def status(self) -> str:
        """Why it is not drawn for, or ``ok``."""
        config = self.shared.config
        n_test = sum(self.shared.split[window] == 2 for window in self.fired)
        if not self.rows:
            return "dead"
        if len(self.rows) < config.min_tokens or n_test < config.min_test_windows:
            return "rare"
        rate = len(self.fired) / self.shared.grid.n_windows
        return "dense" if rate > config.max_window_firing_rate else "ok"

    def windows(self) -> tuple[list[Row], int]:
        """Its drawn windows, and how many near-duplicates were dropped."""
        rows: list[Row] = []
        shown: list[int] = []
        n_dropped = 0
        for code, name in enumerate(SPLITS):
            candidates = [w for w in self.fired if self.shared.split[w] == code]
            if code:
                kept = [w for w in candidates if not self._repeats(w, shown)]
                n_dropped += len(candidates) - len(kept)
                candidates = kept
            config = self.shared.config
            chosen = self._drawn(candidates, getattr(config, f"n_{name}"))
            shown = [*shown, *chosen]
            self._shown_grams = {gram for w in shown for gram in self.shared.grams_of(w)}
            n_silent = getattr(config, f"n_negative_{name}")
            silent, passed_over = self._silent(code, chosen, n_silent, shown)
            n_dropped += passed_over
            shown = [*shown, *silent]
            self._shown_grams |= {gram for w in silent for gram in self.shared.grams_of(w)}
            chosen.sort(key=self.strength.__getitem__) if not code else self._in_rank_order(chosen)
            self._in_rank_order(silent)
            rows += [self._active_row(name, w, rank) for rank, w in enumerate(chosen)]
            rows += [self._silent_row(name, w, rank) for rank, w in enumerate(silent)]
        return rows, n_dropped

    @cached_property
    def strength(self) -> dict[int, int]:
        """Each window's place by its maximum, strongest first."""
        tie = self._hashed(TIE, list(self.fired))
        order = sorted(self.fired, key=lambda w: (-self.maximum[w], tie[w]))
        return {window: i for i, window in enumerate(order)}

    def _quantile(self, window: int) -> int:
        return self.strength[window] * self.shared.config.n_quantiles // len(self.fired)

    def _drawn(self, windows: list[int], n: int) -> list[int]:
        """By turns over the quantiles."""
        priority = self._hashed(DRAW, windows)
        turn: dict[int, int] = {}
        seen: Counter[int] = Counter()
        for window in sorted(windows, key=priority.__getitem__):
            quantile = self._quantile(window)
            turn[window] = seen[quantile]
            seen[quantile] += 1
        return sorted(windows, key=lambda w: (turn[w], priority[w]))[:n]

    def _silent(
        self, code: int, chosen: list[int], n: int, shown: list[int]
    ) -> tuple[list[int], int]:
        """Silent windows at the places of the chosen ones; near-duplicates passed over."""
        places = [self.shared.place[w] for w in chosen]
        wanted = Counter(places[i % len(places)] for i in range(n)) if places else Counter()
        of_split = {self.shared.text_of(w) for w in chosen}
        drawn: list[int] = []
        n_passed_over = 0
        for place, quota in wanted.items():
            left = quota
            for window in self._walk(code, place, quota):
                if window in self.fired:
                    continue
                if self._repeats(window, shown) or self.shared.text_of(window) in of_split:
                    n_passed_over += 1
                    continue
                drawn.append(window)
                left -= 1
                if not left:
                    break
        return drawn, n_passed_over

    def _walk(self, code: int, place: int, quota: int):
        """The windows of a stratum in this latent's order, some at a time."""
        members = self.shared.members[code, place]
        key = hash_priority(int(self.keys[SILENT]), np.array([place * len(SPLITS) + code]))
        first, step = 0, 2 * quota + 8
        while first < len(members):
            index = np.arange(first, min(first + step, len(members)))
            size = np.full(len(index), len(members))
            at = permuted(index, size, np.repeat(key, len(index)))
            yield from (members[i] for i in at.tolist())
            first += step

    def _repeats(self, window: int, shown: list[int]) -> bool:
        mine = self.shared.grams_of(window)
        if mine.isdisjoint(self._shown_grams):
            return False
        threshold = self.shared.config.near_duplicate_jaccard
        if threshold is None:
            return False
        others = (self.shared.grams_of(other) for other in shown)
        return any(len(mine & other) / len(mine | other) >= threshold for other in others)

    def _in_rank_order(self, windows: list[int]) -> None:
        windows.sort(key=self._hashed(RANK, windows).__getitem__)

    def _hashed(self, purpose: int, windows: list[int]) -> dict[int, int]:
        ids = np.array([self.shared.id[w] for w in windows], dtype=np.uint64)
        hashes = hash_priority(int(self.keys[purpose]), ids)
        return dict(zip(windows, hashes.tolist(), strict=True))

    def _top_tokens(self) -> list[tuple[int, float]]:
        sums: dict[int, float] = defaultdict(float)
        for window, values in self.fired.items():
            if self.shared.split[window] == 0:
                tokens = self.shared.tokens[self.shared.context[window]]
                for position, value in values.items():
                    sums[tokens[position]] += value
        total = sum(sums.values())
        ranked = sorted(sums.items(), key=lambda item: (-item[1], item[0]))
        return [(token, value / total) for token, value in ranked[:N_TOP_TOKENS]]

    def _active_row(self, split: str, window: int, rank: int) -> Row:
        values, start = self.fired[window], self.shared.start[window]
        length = self.shared.config.window_len
        return self._silent_row(split, window, rank) | {
            "is_activating": True,
            "negative_kind": None,
            "quantile": self._quantile(window),
            "max_activation": self.maximum[window],
            "activations": [values.get(start + i, 0.0) for i in range(length)],
        }

    def _silent_row(self, split: str, window: int, rank: int) -> Row:
        return {
            "latent": self.latent,
            "split": split,
            "is_activating": False,
            "negative_kind": "random",
            "window_id": self.shared.id[window],
            "context": self.shared.context[window],
            "start": self.shared.start[window],
            "quantile": None,
            "rank": rank,
            "max_activation": None,
            "activations": None,
        }


def plain_records(
    activations: pl.DataFrame,
    firing_counts: pl.DataFrame,
    dataset: TokenDataset,
    layer: LayerKey,
    latents: range,
    config: SamplingConfig,
    grid: WindowGrid,
) -> RecordTables:
    """The tables of ``core.latent_records.latent_records_of``, one latent after another."""
    shared = Shared(dataset, grid, layer, config)
    rows_of: dict[int, list[tuple[int, int, float]]] = defaultdict(list)
    for latent, context, position, value in activations.iter_rows():
        rows_of[latent].append((context, position, value))
    n_contexts = dict(firing_counts.select("latent", "n_contexts").iter_rows())
    latent_rows, window_rows = [], []
    for number in latents:
        latent = Latent(shared, number, n_contexts[number], rows_of[number])
        row = latent.row()
        if latent.status == "ok":
            windows, row["n_near_duplicates"] = latent.windows()
            negative = Counter(w["split"] for w in windows if not w["is_activating"])
            row |= {f"n_negative_{name}": negative[name] for name in SPLITS}
            window_rows += windows
        latent_rows.append(row)
    schema = {n: t for n, t in WINDOWS.columns.items() if n not in ("coder", "hookpoint")}
    windows_frame = pl.DataFrame(window_rows, schema=schema)
    schema = {n: t for n, t in LATENTS.columns.items() if n not in ("coder", "hookpoint")}
    latents_frame = pl.DataFrame(latent_rows, schema=schema)
    return RecordTables(
        LATENTS.conform(latents_frame, layer), WINDOWS.conform(windows_frame, layer)
    )
