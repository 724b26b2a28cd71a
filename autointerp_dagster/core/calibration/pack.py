"""Records of synthetic latents: windows of real text in which a known rule holds or does not.

1. Documents are cut into words and marks of punctuation, each a token, and these into windows on a
   fixed grid.
2. A latent fires on the tokens that its rule matches; windows in which that is in doubt are left
   out (:mod:`.rules`).
3. So are windows that come near the rule whose description is the latent's floor. An ideal judge
   therefore calls all of a latent's windows silent under the floor, which is a balanced accuracy
   of exactly one half: what the floor measures above that is not the judge's understanding.
4. Of each class as many windows are drawn, from as many documents as there are.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Bool, Float32, Float64, Int, Int64, UInt64

from autointerp_dagster.core.calibration.rules import FLOOR_STEP, RULES, VERSION, Rule
from autointerp_dagster.core.errors import CorpusError
from autointerp_dagster.core.latent_records import LatentRecord, Window
from autointerp_dagster.core.rng import address_key, hash_priority
from autointerp_dagster.core.schemas import EXPLANATIONS, SELECTION
from autointerp_dagster.core.scorers import Job, ScoringTask
from autointerp_dagster.core.types import LatentId, LayerKey

CODER = "judge_pack"
"""Stands for a sparse coder; the kind of rule stands for its hookpoint."""

EXPLAINER = "truth"
"""Who wrote the descriptions."""

BLOCK_HASH = f"judge_pack_{VERSION}"
"""Stands for the hash of a coder's weights where answers are kept."""

SILENT_DENSITY = 0.002
"""A document with a larger share of words near a topic has no window that is about another."""

_PIECE = re.compile(r"\s*(?:\w+|[^\w\s])")
_MAX_START = 1 << 16  # a window's address has 16 bits for its start


class WordPieces:
    """A :class:`~autointerp_dagster.core.tokens.Detokenizer` that numbers pieces as they come."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._ids: dict[str, int] = {}

    def ids(self, pieces: Sequence[str]) -> list[int]:
        """The number of each piece; a new one gets the next."""
        for piece in pieces:
            if piece not in self._ids:
                self._ids[piece] = len(self._pieces)
                self._pieces.append(piece)
        return [self._ids[piece] for piece in pieces]

    def pieces(self, tokens: Int[np.ndarray, " position"]) -> list[str]:
        """The piece that each number stands for."""
        return [self._pieces[token] for token in tokens]


@dataclass(frozen=True, slots=True)
class PackLatent:
    """A latent whose meaning is known."""

    rule: Rule
    floor: Rule
    """Whose description stands in for its own."""
    job: Job
    """Its record, with its own description first and the floor's second."""

    @property
    def latent(self) -> LatentId:
        """Its index is the rule's place among all rules."""
        return self.job.record.latent


@dataclass(frozen=True, slots=True)
class Pack:
    """Latents whose meaning is known, with what turns their tokens into text."""

    latents: tuple[PackLatent, ...]
    detokenizer: WordPieces

    @property
    def jobs(self) -> list[Job]:
        """What a scorer is asked."""
        return [planted.job for planted in self.latents]

    @property
    def n_windows(self) -> int:
        """Of all latents together, each once."""
        return sum(len(job.record.windows) for job in self.jobs)

    def selection(self) -> pl.DataFrame:
        """``schemas.SELECTION``: every latent, all with floors."""
        rows = [
            {**_names(p.latent), "is_floor": True, "rank": p.latent.index} for p in self.latents
        ]
        return SELECTION.conform(pl.DataFrame(rows))

    def explanations(self) -> pl.DataFrame:
        """``schemas.EXPLANATIONS``: the true descriptions."""
        rows = [
            {
                **_names(p.latent),
                "explainer": EXPLAINER,
                "candidate": 0,
                "text": p.rule.description,
                "selected": True,
                "status": "ok",
                "reason": None,
                "call_id": None,
            }
            for p in self.latents
        ]
        return EXPLANATIONS.conform(pl.DataFrame(rows))


class _Grid:
    """All windows of some documents."""

    def __init__(self, documents: Iterable[str], window_len: int) -> None:
        self.texts: list[str] = []
        self.pieces: list[list[str]] = []
        window_ids: list[int] = []
        sizes: list[int] = []
        for context, document in enumerate(documents):
            pieces = _PIECE.findall(document)
            sizes.append(len(pieces))
            last = min(len(pieces), _MAX_START) - window_len
            for start in range(0, last + 1, window_len):
                self.pieces.append(pieces[start : start + window_len])
                self.texts.append("".join(self.pieces[-1]))
                window_ids.append(context << 16 | start)
        self.window_ids = np.array(window_ids, dtype=np.uint64)
        self.contexts = (self.window_ids >> np.uint64(16)).astype(np.int64)
        self.sizes = np.maximum(np.array(sizes, dtype=np.int64), 1)
        self._having: dict[re.Pattern[str], Bool[np.ndarray, " window"]] = {}

    def having(self, pattern: re.Pattern[str]) -> Bool[np.ndarray, " window"]:
        """Whether each window has a match."""
        if pattern not in self._having:
            found = [pattern.search(text) is not None for text in self.texts]
            self._having[pattern] = np.array(found, dtype=np.bool_)
        return self._having[pattern]

    def activating(self, rule: Rule) -> Bool[np.ndarray, " window"]:
        """Whether a latent with this rule fires in each window."""
        fires = self.having(rule.pattern).copy()
        for row in np.flatnonzero(fires):
            fires[row] = rule.is_activating(self.texts[row])
        return fires

    def density(self, pattern: re.Pattern[str]) -> Float64[np.ndarray, " window"]:
        """Matches per piece in the document of each window."""
        found = np.zeros(len(self.texts))
        for row in np.flatnonzero(self.having(pattern)):
            found[row] = len(pattern.findall(self.texts[row]))
        totals = np.bincount(self.contexts, weights=found, minlength=len(self.sizes))
        return (totals / self.sizes)[self.contexts]


def build_pack(
    documents: Iterable[str],
    window_len: int,
    n_windows: int,
    seed: int = 0,
    rules: Sequence[Rule] = RULES,
) -> Pack:
    """Latents with as many activating as silent test windows each.

    Args:
        documents: English texts; their order counts.
        window_len: Words and marks of punctuation per window.
        n_windows: Of each class, per latent.
        seed: Of the draw of windows.
        rules: What the latents fire on, in an order in which the rule :data:`.rules.FLOOR_STEP`
            further on (cyclically) means something else.

    Raises:
        CorpusError: If the documents hold too few windows for a rule.
    """
    grid = _Grid(documents, window_len)
    detokenizer = WordPieces()
    latents = []
    for index, rule in enumerate(rules):
        floor_index = (index + FLOOR_STEP) % len(rules)
        floor = rules[floor_index]
        latent = LatentId(CODER, rule.kind, index)
        windows = _drawn(grid, rule, floor, latent, n_windows, seed)
        record = LatentRecord(
            latent=latent,
            status="ok",
            max_activation=1.0,
            top_tokens=(),
            top_token_shares=(),
            windows=tuple(_window(grid, rule, row, is_on, rank, detokenizer)
                          for row, is_on, rank in windows),
        )  # fmt: skip
        own = ScoringTask(latent, EXPLAINER, "own", index, rule.description)
        other = ScoringTask(latent, EXPLAINER, "other", floor_index, floor.description)
        latents.append(PackLatent(rule, floor, Job(record, (own, other))))
    return Pack(tuple(latents), detokenizer)


def _drawn(
    grid: _Grid, rule: Rule, floor: Rule, latent: LatentId, n_windows: int, seed: int
) -> list[tuple[int, bool, int]]:
    """Row in the grid, class and rank of each window drawn, activating ones first."""
    is_clear = ~grid.having(floor.near)
    is_on = grid.activating(rule)
    is_off = ~grid.having(rule.near)
    if rule.kind == "topics":
        is_off = is_off & (grid.density(rule.near) <= SILENT_DENSITY)
    key = address_key(seed, LayerKey(latent.coder, latent.hookpoint), latent.index, "judge-pack")
    priority = hash_priority(key, grid.window_ids)
    drawn = []
    for is_activating, which in ((True, is_on), (False, is_off)):
        rows = _spread(np.flatnonzero(which & is_clear), grid, priority)
        if len(rows) < n_windows:
            state = "" if is_activating else "do not "
            raise CorpusError(
                f"judge calibration: got {len(rows)} windows that {state}fit {rule.description!r}, "
                f"wanted {n_windows}. Ask for fewer windows."
            )
        drawn += [(int(row), is_activating, rank) for rank, row in enumerate(rows[:n_windows])]
    return drawn


def _spread(
    rows: Int64[np.ndarray, " row"], grid: _Grid, priority: UInt64[np.ndarray, " window"]
) -> list[int]:
    """The rows in drawn order: the first of every document, then the second, and so on.

    Of windows with one text the first drawn counts.
    """
    n_of: dict[int, int] = {}
    seen: set[str] = set()
    placed = []
    for row in rows[np.argsort(priority[rows])].tolist():
        text, context = grid.texts[row].strip(), int(grid.contexts[row])
        if text not in seen:
            seen.add(text)
            placed.append((n_of.get(context, 0), int(priority[row]), row))
            n_of[context] = n_of.get(context, 0) + 1
    return [row for _, _, row in sorted(placed)]


def _window(
    grid: _Grid, rule: Rule, row: int, is_activating: bool, rank: int, detokenizer: WordPieces
) -> Window:
    pieces, window_id = grid.pieces[row], int(grid.window_ids[row])
    activations = np.zeros(len(pieces), dtype=np.float32)
    if is_activating:
        activations = _firing(pieces, rule.pattern)
    return Window(
        window_id=window_id,
        context=window_id >> 16,
        start=window_id & 0xFFFF,
        split="test",
        is_activating=is_activating,
        negative_kind=None if is_activating else "random",
        quantile=0 if is_activating else None,
        rank=rank,
        tokens=np.array(detokenizer.ids(pieces), dtype=np.int32),
        activations=activations,
    )


def _firing(pieces: Sequence[str], pattern: re.Pattern[str]) -> Float32[np.ndarray, " position"]:
    """1 on each piece that a match overlaps, 0 elsewhere; a piece's leading space is not it."""
    stops = np.cumsum([len(piece) for piece in pieces])
    starts = stops - [len(piece.lstrip()) for piece in pieces]
    fires = np.zeros(len(pieces), dtype=np.float32)
    for match in pattern.finditer("".join(pieces)):
        fires[(starts < match.end()) & (stops > match.start())] = 1.0
    return fires


def _names(latent: LatentId) -> dict[str, object]:
    return {"coder": latent.coder, "hookpoint": latent.hookpoint, "latent": latent.index}
