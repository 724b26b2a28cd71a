"""What a study will cost before anything is paid: requests, tokens and money, stage by stage."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from statistics import median

import polars as pl

from autointerp_dagster.adapters.llm.counting import PromptCounter, completion_tokens, open_tokens
from autointerp_dagster.adapters.llm.ledger import SpendFile
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.config import (
    BestOfNExplainerConfig,
    LatentSample,
    LLMConfig,
    RefineExplainerConfig,
    RemoteLLMConfig,
)
from autointerp_dagster.core.llm import Request
from autointerp_dagster.core.types import Cell, Progress, silent
from autointerp_dagster.resources.pending import Asked, Piece, Replayed, Survey
from autointerp_dagster.study import Study
from autointerp_dagster.study.stages import STAGES

N_COUNTED = 4096
"""Latents whose prompts are tokenized, about; more are scaled up from a hashed sample of them."""
N_MEAN = 256
"""Earlier answers that tell how long the next will be."""
TYPICAL_TOKENS = 20
"""Of an explanation, where none is there to tell."""
_CHARACTERS_PER_TOKEN = 4
_STAND_IN = "words that name places, people or events, above all in accounts of older times; "


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What one stage still asks."""

    stage: str
    """A stage that asks several models has a plan for each."""
    model: str
    is_paid: bool
    """Whether the model is behind a server, so that budgets count it."""
    n_cells: int
    """Looked at: with records, within the coder."""
    n_pending_cells: int
    n_known: int
    """Requests of pending cells that the journal answers."""
    n_requests: int
    """Requests to be sent. Answers in a wrong format are asked again and come on top."""
    prompt_tokens: int
    shared_tokens: int
    """Of these, those that a prefix cache would serve."""
    completion_tokens: int
    """Expected."""
    usd: float
    """Without a prefix cache; 0 for a model without a price, and for one in this process."""
    usd_cached: float | None
    """With every shared token at the price of cached ones; null if the study names none."""
    n_counted: int
    """Requests whose tokens were counted; the others are taken to be like them."""
    counted_by: str
    completions_by: str


@dataclass(frozen=True, slots=True)
class BudgetPlan:
    """One limit of the study, and what is wanted of it."""

    name: str
    """As in the study file, e.g. ``budget.usd``."""
    limit: float
    spent: float
    """By earlier runs, where it counts."""
    needed: float
    """By the plan, without a prefix cache."""

    @property
    def suffices(self) -> bool:
        """Whether all can be asked; calls reserve a little more than they are expected to cost."""
        return self.spent + self.needed <= self.limit


@dataclass(frozen=True, slots=True)
class StudyPlan:
    """What a study still asks in all."""

    stages: tuple[StagePlan, ...]
    budgets: tuple[BudgetPlan, ...]
    without_records: tuple[Cell, ...]
    """Cells that nothing is known of, not counted above."""
    notes: tuple[str, ...]
    """What the figures rest on besides records and journal."""


def plan_study(
    study: Study, store: Store, cells: Sequence[Cell], progress: Progress = silent
) -> StudyPlan:
    """Goes through all prompts of some cells; asks nothing and writes nothing.

    Memory does not grow with the number of requests, beyond those of a cell.

    Raises:
        ModelError: If a tokenizer that the study names cannot be had.
        StoreError: If the store cannot be read.
    """
    stand_ins = _StandIns()
    counters = _Counters(_share(study, cells))
    with Survey(study, store, cells, stand_ins=stand_ins.fill, progress=progress) as survey:
        tallies = _Tallies(counters)
        stand_ins.survey = survey
        for piece in survey.pieces():
            if piece.stage in survey.stages:
                tallies.add(piece)
        stages = tuple(tally.plan(counters, stand_ins) for tally in tallies.in_order())
        without = tuple(survey.without_records)
    notes = [*stand_ins.notes(), *counters.notes(), *_later_notes(study)]
    return StudyPlan(stages, tuple(_budgets(study, store, stages)), without, tuple(notes))


class _StandIns:
    """Texts in place of explanations that do not exist yet, as long as those that do."""

    def __init__(self) -> None:
        self.survey: Survey | None = None
        self._lengths: dict[str, list[int]] = {}
        self._costs: dict[str, list[int]] = {}
        self._n_used: dict[str, int] = {}

    def fill(self, explainer: str, frame: pl.DataFrame) -> pl.DataFrame:
        """See ``pending.StandIns``."""
        self._learn(explainer, frame.filter(pl.col("status") == "ok"))
        is_open = pl.col("reason") == "not_recorded"
        n_open = frame.filter(is_open).height
        if n_open == 0:
            return frame
        self._n_used[explainer] = self._n_used.get(explainer, 0) + n_open
        length = self._length(explainer)
        texts = [stand_in(f"{explainer} {n}", length) for n in frame["latent"].to_list()]
        return frame.with_columns(
            text=pl.when(is_open).then(pl.Series(texts, dtype=pl.String)).otherwise("text"),
            status=pl.when(is_open).then(pl.lit("ok")).otherwise("status"),
            reason=pl.when(is_open).then(pl.lit(None, dtype=pl.String)).otherwise("reason"),
        )

    def mean_cost(self, explainer: str) -> float | None:
        """Completion tokens of earlier answers; null if there are none."""
        costs = self._costs.get(explainer)
        return sum(costs) / len(costs) if costs else None

    def notes(self) -> list[str]:
        """What scores were counted with."""
        return [
            f"{n} explanations by {name!r} do not exist yet: scores are counted with stand-ins of "
            f"{self._length(name)} characters ({self._source(name)})."
            for name, n in self._n_used.items()
        ]

    def _learn(self, explainer: str, written: pl.DataFrame) -> None:
        lengths = self._lengths.setdefault(explainer, [])
        room = N_MEAN - len(lengths)
        if room > 0 and written.height:
            lengths += written["text"].str.len_chars().head(room).to_list()
            assert self.survey is not None
            usages = self.survey.costs_of(written, room)
            known = [usage.completion_tokens for usage in usages if usage.completion_tokens]
            self._costs.setdefault(explainer, []).extend(known)

    def _length(self, explainer: str) -> int:
        lengths = self._lengths.get(explainer)
        return int(median(lengths)) if lengths else TYPICAL_TOKENS * _CHARACTERS_PER_TOKEN

    def _source(self, explainer: str) -> str:
        n = len(self._lengths.get(explainer) or ())
        return f"the median of {n} others" if n else f"{TYPICAL_TOKENS} tokens, a guess"


def stand_in(name: str, n_characters: int) -> str:
    """A text of some length that no other explainer and latent has."""
    start = f"{name}: "
    return start + "".join(islice(cycle(_STAND_IN), max(0, n_characters - len(start)))).rstrip()


class _Counters:
    """One counter per model, as each has one prefix cache."""

    def __init__(self, share: float) -> None:
        self.share = share
        """Of units whose tokens are counted."""
        self._by_identity: dict[str, PromptCounter] = {}

    def of(self, model: Replayed) -> PromptCounter:
        """The counter of a model."""
        if model.identity not in self._by_identity:
            self._by_identity[model.identity] = PromptCounter(open_tokens(model.config))
        return self._by_identity[model.identity]

    def is_counted(self, request: Request) -> bool:
        """Whether a request's unit is in the sample."""
        if self.share >= 1:
            return True
        digest = hashlib.blake2b(request.unit.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.share * 2**64

    def notes(self) -> list[str]:
        """How sure the token counts are."""
        if self.share >= 1:
            return []
        return [f"Tokens are counted for {self.share:.2%} of the latents, drawn by hash."]


class _Tallies:
    """Sums by stage and model."""

    def __init__(self, counters: _Counters) -> None:
        self._counters = counters
        self._found: dict[tuple[str, str], _Tally] = {}

    def add(self, piece: Piece) -> None:
        """Go through the questions of a piece."""
        tally = self._of(piece.stage, piece.model)
        tally.cells.add(piece.cell)
        if not piece.is_done:
            tally.pending_cells.add(piece.cell)
        for asked in piece.asked:
            tally = self._of(piece.stage, asked.model)
            tally.cells.add(piece.cell)
            tally.pending_cells.add(piece.cell)
            tally.add(piece, asked, self._counters)

    def in_order(self) -> list["_Tally"]:
        """Those of a stage together, in the order of the data."""
        stages = list(STAGES)
        return sorted(self._found.values(), key=lambda tally: stages.index(tally.stage))

    def _of(self, stage: str, model: Replayed) -> "_Tally":
        return self._found.setdefault((stage, model.identity), _Tally(stage, model))


@dataclass(slots=True)
class _Tally:
    """Sums over what one stage asks one model."""

    stage: str
    model: Replayed
    cells: set[Cell] = field(default_factory=set)
    pending_cells: set[Cell] = field(default_factory=set)
    n_known: int = 0
    n_requests: int = 0
    n_counted: int = 0
    prompt: int = 0
    shared: int = 0
    completion: int = 0
    """Of counted requests whose format decides it."""
    n_prose: dict[str, int] = field(default_factory=dict)
    """Requests for prose, by explainer."""
    max_tokens: dict[str, int] = field(default_factory=dict)

    def add(self, piece: Piece, asked: Asked, counters: _Counters) -> None:
        """Count one question."""
        if not asked.is_pending:
            self.n_known += 1
            return
        request, counter = asked.request, counters.of(self.model)
        self.n_requests += 1
        is_first = self.n_counted == 0  # so that there is always one to scale up from
        if is_first or counters.is_counted(request):
            tokens = counter.count(request)
            self.n_counted += 1
            self.prompt += tokens.total
            self.shared += tokens.shared
            self.completion += completion_tokens(request, counter.tokens) or 0
        if completion_tokens(request, counter.tokens) is None:
            name = piece.explainer
            self.n_prose[name] = self.n_prose.get(name, 0) + 1
            self.max_tokens[name] = request.max_tokens

    def plan(self, counters: _Counters, stand_ins: _StandIns) -> StagePlan:
        """The sums, scaled up to all requests, with their price."""
        scale = self.n_requests / self.n_counted if self.n_counted else 0.0
        config = self.model.config
        prompt, shared = round(self.prompt * scale), round(self.shared * scale)
        prose, how = self._prose(stand_ins)
        written = round(self.completion * scale + prose)
        return StagePlan(
            stage=self.stage,
            model=model_name(config),
            is_paid=isinstance(config, RemoteLLMConfig),
            n_cells=len(self.cells),
            n_pending_cells=len(self.pending_cells),
            n_known=self.n_known,
            n_requests=self.n_requests,
            prompt_tokens=prompt,
            shared_tokens=shared,
            completion_tokens=written,
            usd=_usd(config, prompt, 0, written),
            usd_cached=_usd_cached(config, prompt, shared, written),
            n_counted=self.n_counted,
            counted_by=counters.of(self.model).tokens.description,
            completions_by=how,
        )

    def _prose(self, stand_ins: _StandIns) -> tuple[float, str]:
        """Expected tokens of answers in prose, and how they are expected."""
        total, hows = 0.0, []
        for name, n in self.n_prose.items():
            mean = stand_ins.mean_cost(name)
            if mean is None:
                mean = self.max_tokens[name] / 2
                hows.append(f"{name}: half of max_tokens")
            else:
                hows.append(f"{name}: mean of earlier answers, {mean:.0f}")
            total += n * mean
        return total, "; ".join(hows) or "the length of the list of labels"


def _later_notes(study: Study) -> list[str]:
    """Questions that depend on answers, and so are not counted before those are there."""
    selecting = (BestOfNExplainerConfig, RefineExplainerConfig)
    names = [name for name, c in study.explainers.items() if isinstance(c, selecting)]
    notes = [
        f"Explainer {name!r} judges what was written, so only its open first questions are counted."
        for name in names
    ]
    if study.scoring is not None:
        notes.append(
            "scoring is adaptive: detection and fuzzing are counted up to the first prompts whose "
            "answers decide whether more are asked."
        )
    return notes


def model_name(config: LLMConfig) -> str:
    """What people call a model of a study."""
    return config.model if isinstance(config, RemoteLLMConfig) else config.source


def _usd(config: LLMConfig, prompt: int, cached: int, completion: int) -> float:
    if not isinstance(config, RemoteLLMConfig):
        return 0.0
    return config.usd_of(prompt, cached, completion)


def _usd_cached(config: LLMConfig, prompt: int, shared: int, completion: int) -> float | None:
    has_price = isinstance(config, RemoteLLMConfig) and config.usd_per_1m_cached is not None
    return _usd(config, prompt, shared, completion) if has_price else None


def _share(study: Study, cells: Sequence[Cell]) -> float:
    """The share of latents whose tokens are counted, from an upper bound of how many there are."""
    n_in_cells = sum(cell.range.stop - cell.range.start for cell in cells)
    n_layers = len({cell.layer for cell in cells})
    n = n_in_cells
    if isinstance(study.latents, tuple):
        n = min(n, n_layers * len(study.latents))
    elif isinstance(study.latents, LatentSample):
        n = min(n, n_layers * study.latents.sample)
    return min(1.0, N_COUNTED / max(1, n))


def _budgets(study: Study, store: Store, stages: Iterable[StagePlan]) -> Iterable[BudgetPlan]:
    """The limits that there are. Models in this process cost nothing."""
    paid = [stage for stage in stages if stage.is_paid]
    tokens = sum(s.prompt_tokens + s.completion_tokens for s in paid)
    usd = sum(s.usd for s in paid)
    budget = study.budget
    spent = SpendFile(store.root, study.name, "plan").read_others().study
    for name, limit, before, needed in (
        ("usd", budget.usd, 0.0, usd),
        ("tokens", budget.tokens, 0, tokens),
        ("study_usd", budget.study_usd, spent.usd, usd),
        ("study_tokens", budget.study_tokens, spent.tokens, tokens),
    ):
        if limit is not None:
            yield BudgetPlan(f"budget.{name}", limit, before, needed)
