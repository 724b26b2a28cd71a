"""What a study still has to ask its language models.

The very code of the stages runs over the journal in replay, in which nothing is sent and nothing is
committed: what the journal does not answer is what a run would send. So a plan, a batch file and a
run cannot disagree.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import polars as pl

from autointerp_dagster.adapters.llm import open_journal
from autointerp_dagster.adapters.manifests import Manifest
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.explainers import Explanation, explanations_frame
from autointerp_dagster.core.llm import LLM, Completion, JournalBlock, Request, Usage
from autointerp_dagster.core.schemas import DONORS, EXPLANATIONS, SELECTION
from autointerp_dagster.core.tokens import Detokenizer
from autointerp_dagster.core.types import (
    Cell,
    LatentId,
    LayerKey,
    Place,
    Progress,
    WholeStudy,
    silent,
)
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.explaining import ExplainingWork
from autointerp_dagster.resources.identities import Identities
from autointerp_dagster.resources.judging import answering
from autointerp_dagster.resources.models import SubjectModels
from autointerp_dagster.resources.replaying import Heard, Replayed
from autointerp_dagster.resources.scoring import NO_EXPLAINER, Explained, ScoringWork
from autointerp_dagster.resources.stage_inputs import StageInputs
from autointerp_dagster.study import Study
from autointerp_dagster.study.parameters import (
    LLMPart,
    all_parts_asked,
    llm_config,
    parts_asked,
    parts_of_explainer,
)
from autointerp_dagster.study.stages import stages_of

EXPLAIN = "explanations"
_UPSTREAM = (
    "token_dataset",
    "activation_cache",
    "neighbours",
    "window_embeddings",
    "latent_records",
    "interventions",
)
"""What the questions may rest on, in the order of the data; no language model is asked for it."""
_OVER = object()

StandIns = Callable[[str, pl.DataFrame], pl.DataFrame]
"""From an explainer's name and its ``schemas.EXPLANATIONS`` of a cell to the same with a text in
every row whose reason is ``not_recorded``. Is given complete ones, too."""


class Asked(NamedTuple):
    """One question of a stage, and what the journal knows of it."""

    model: Replayed
    """Whom it asks."""
    request: Request
    """As it would be sent: the question itself, or a repeat that quotes a fault."""
    call_id: str
    completion: Completion
    """Of the question."""
    is_pending: bool
    """Whether it is to be sent; the same call is pending once in a cell."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The questions of one stage about one cell, of one explainer."""

    stage: str
    cell: Cell
    explainer: str
    """``NO_EXPLAINER`` for a scorer that needs no explanation."""
    model: Replayed
    """Whom it asks first."""
    is_done: bool
    """Whether the store holds the result; then nothing is asked."""
    waits: bool
    """Whether explanations must be answered first; then nothing is asked yet."""
    asked: Iterator[Asked]
    """Lazy. What is left of it when the next piece is drawn is gone through unseen."""


def stages_that_ask(study: Study) -> list[str]:
    """Names of the stages of a study that ask a language model, in the order of the data."""
    return [stage.name for stage in stages_of(study) if parts_asked(study, stage.name)]


def before_asking(study: Study) -> str:
    """The last stage that must be there before anything is known of what will be asked."""
    return "interventions" if study.intervenes else "latent_records"


@dataclass(frozen=True, slots=True)
class _Cell:
    """A cell on the way through its stages."""

    cell: Cell
    made: Manifest | None
    """Its explanations, if the store holds them all."""
    selection: pl.DataFrame
    donors: pl.DataFrame
    explanations: dict[str, pl.DataFrame]
    """By explainer; one that must be answered first is absent."""
    pending: set[int]
    """Hashes of the calls that were pending already, with their blocks."""


class Survey:
    """Goes through the cells of a study and finds what is to be asked. A context manager."""

    def __init__(
        self,
        study: Study,
        store: Store,
        cells: Sequence[Cell],
        *,
        stages: Collection[str] | None = None,
        stand_ins: StandIns | None = None,
        progress: Progress = silent,
    ) -> None:
        """Nothing is read yet.

        Args:
            study: The study.
            store: Its store; only read.
            cells: Which of its cells.
            stages: Names of the stages whose questions are wanted; null: all.
            stand_ins: Gives scorers texts to be counted with, in place of explanations that do not
                exist yet. Null: scorers of such a cell wait.
            progress: For whoever watches.
        """
        self._progress = progress
        self.study = study
        self.store = store
        self.without_records: list[Cell] = []
        """Cells without records from the present inputs: nothing is known of them."""
        asking = stages_that_ask(study)
        self.stages = [name for name in asking if stages is None or name in stages]
        """Those whose questions are wanted, in the order of the data."""
        self._cells = cells
        self._stand_ins: StandIns = stand_ins or (lambda _, frame: frame)
        self._coders = Coders()
        self._identities = Identities.of(study)
        self._open = ExitStack()
        self._heard: Heard = deque()
        """What was asked since somebody last took it from here."""

    def __enter__(self) -> Self:
        """The survey, with its journal open."""
        with ExitStack() as opening:
            self._journal = opening.enter_context(open_journal(self.store.root))
            self._llms = self._open_models(opening)
            self._upstream = self._upstream_stages()
            self._explaining = self._explaining_work()
            detokenizer = SubjectModels().of(self.study).detokenizer
            scoring = [name for name in self.stages if name != EXPLAIN]
            self._scoring = {name: self._scoring_work(name, detokenizer) for name in scoring}
            self._open = opening.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes models and journal."""
        self._open.close()

    def pieces(self) -> Iterator[Piece]:
        """Every piece of every cell: of each cell explanations first, then scores."""
        for cell in self._cells if self.stages else ():
            if not self._has_records(cell):
                self.without_records.append(cell)
            elif not self._explaining.stage.is_outside_coder(cell):
                state = self._state_of(cell)
                yield from self._explain(state)
                for name, work in self._scoring.items():
                    yield from self._score(state, name, work)

    def costs_of(self, explanations: pl.DataFrame, n: int) -> list[Usage]:
        """What some explanations cost when they were paid for, as the journal knows.

        Args:
            explanations: Rows of ``schemas.EXPLANATIONS``.
            n: How many to look at, at most.
        """
        rows = explanations.filter(pl.col("call_id").is_not_null() & (pl.col("status") == "ok"))
        replies = [
            self._journal.lookup(self._block_of(row), row["call_id"])
            for row in rows.head(n).iter_rows(named=True)
        ]
        return [reply.usage for reply in replies if reply is not None]

    def _block_of(self, row: Mapping[str, Any]) -> JournalBlock:
        layer = LayerKey(row["coder"], row["hookpoint"])
        latent = LatentId(row["coder"], row["hookpoint"], row["latent"])
        return self._coders.block_of(self.study, layer, EXPLAIN)(latent)

    def _has_records(self, cell: Cell) -> bool:
        """Whether a run would find the cell's records as they are, and all that they rest on."""
        whole = WholeStudy()
        places: dict[str, Place] = {"token_dataset": whole, "window_embeddings": whole}
        # In the order of the data: a stage is looked at only if its inputs are there.
        return all(s.is_current(places.get(name, cell)) for name, s in self._upstream.items())

    def _state_of(self, cell: Cell) -> _Cell:
        made = self._explaining.stage.made(cell)
        if made is None:
            selection = self._explaining.selection(cell)
            donors = self._explaining.donors(cell, selection)
        else:
            selection = self.store.table(made.blob(SELECTION.name))
            donors = self.store.table(made.blob(DONORS.name))
        return _Cell(cell, made, selection, donors, {}, set())

    def _explain(self, state: _Cell) -> Iterator[Piece]:
        latents = state.selection["latent"].to_list()
        for explainer in self.study.explainers:
            frame = self._explained_before(state, explainer, latents)
            if frame is not None:
                yield self._piece(EXPLAIN, state, explainer, None)
            else:
                answers: list[Explanation] = []
                explaining = self._explaining.explanations(state.cell, explainer, latents)
                piece = self._piece(EXPLAIN, state, explainer, _kept(explaining, answers))
                yield piece
                deque(piece.asked, maxlen=0)
                frame = explanations_frame(answers)
            frame = self._stand_ins(explainer, frame)
            if frame.filter(pl.col("reason") == "not_recorded").is_empty():
                state.explanations[explainer] = frame

    def _explained_before(
        self, state: _Cell, explainer: str, latents: list[int]
    ) -> pl.DataFrame | None:
        if state.made is not None:
            return self.store.table(state.made.blob(f"{EXPLANATIONS.name}/{explainer}"))
        parameters = self._explaining.part_parameters(state.cell, explainer, latents)
        part = self._explaining.stage.found_part(explainer, parameters)
        return None if part is None else self.store.table(part.blob)

    def _score(self, state: _Cell, name: str, work: ScoringWork) -> Iterator[Piece]:
        for explainer in work.part_names:
            if self._is_scored(state, explainer, work):
                yield self._piece(name, state, explainer, None)
                continue
            if explainer == NO_EXPLAINER:
                explained = work.explained(state.cell, explainer)
            elif explainer in state.explanations:
                frame = state.explanations[explainer]
                explained = Explained(frame, state.selection, state.donors)
            else:
                yield self._piece(name, state, explainer, iter(()), waits=True)
                continue
            judging = work.verdicts(state.cell, explainer, explained)
            piece = self._piece(name, state, explainer, judging)
            yield piece
            deque(piece.asked, maxlen=0)

    def _is_scored(self, state: _Cell, explainer: str, work: ScoringWork) -> bool:
        if explainer != NO_EXPLAINER:
            if state.made is None:
                return False
            work.stage.take(EXPLAIN, state.cell, state.made)
        if work.stage.made(state.cell) is not None:
            return True
        parameters = work.part_parameters(state.cell, explainer)
        return work.stage.found_part(explainer, parameters) is not None

    def _piece(
        self,
        stage: str,
        state: _Cell,
        explainer: str,
        answering: Iterator[object] | None,
        *,
        waits: bool = False,
    ) -> Piece:
        asked = iter(()) if answering is None else self._asked(answering, state.pending)
        model = self._llms[self._part(stage, explainer)]
        return Piece(stage, state.cell, explainer, model, answering is None, waits, asked)

    def _part(self, stage: str, explainer: str) -> LLMPart:
        """The part of the model that is asked first; of any, where none is."""
        parts = parts_asked(self.study, stage)
        if stage == EXPLAIN:
            parts = parts_of_explainer(self.study.explainers[explainer]) or parts
        return parts[0] if parts else next(iter(self._llms))

    def _asked(self, answering: Iterator[object], pending: set[int]) -> Iterator[Asked]:
        """What models are asked while somebody goes through their answers.

        Each call is pending once: a run would find the second one under way or in the journal.
        """
        self._heard.clear()
        is_over = False
        while not is_over:
            is_over = next(answering, _OVER) is _OVER
            while self._heard:
                model, request, completion = self._heard.popleft()
                wanted = hash((completion.call_id, request.block))  # a number is much smaller
                is_pending = completion.reason == "not_recorded" and wanted not in pending
                if is_pending:
                    pending.add(wanted)
                if is_pending or completion.reason != "not_recorded":
                    yield Asked(model, request, completion.call_id, completion, is_pending)

    def _open_models(self, opening: ExitStack) -> dict[LLMPart, Replayed]:
        """A model for every part that some stage asks; alike ones are one."""
        models: dict[LLMPart, Replayed] = {}
        for part in all_parts_asked(self.study, stages_that_ask(self.study)):
            config = llm_config(self.study, part)
            alike = [model for model in models.values() if model.config == config]
            if not alike:
                alike = [Replayed(config, self._journal, self._heard)]
                opening.callback(alike[0].close)
            models[part] = alike[0]
        return models

    def _upstream_stages(self) -> dict[str, StageInputs]:
        made = {stage.name for stage in stages_of(self.study)}
        return {
            name: StageInputs.of(
                self.store,
                self.study,
                name,
                models=self._identities.models(name),
                external=self._identities.external,
            )
            for name in _UPSTREAM
            if name in made
        }

    def _explaining_work(self) -> ExplainingWork:
        parts = parts_asked(self.study, EXPLAIN)
        llms: dict[LLMPart, LLM] = {part: self._llms[part] for part in parts}
        subject = SubjectModels().of(self.study)
        asked = {part: llm.identity for part, llm in llms.items()}
        stage = StageInputs.of(
            self.store,
            self.study,
            EXPLAIN,
            models=asked,
            external=self._identities.external,
        )
        return ExplainingWork(stage, self.study, llms, self._coders, subject, self._progress)

    def _scoring_work(self, stage_name: str, detokenizer: Detokenizer) -> ScoringWork:
        (part,) = parts_asked(self.study, stage_name)
        llm = self._llms[part]
        stage = StageInputs.of(self.store, self.study, stage_name, models={part: llm.identity})
        name = stage_name.removeprefix("score_")
        verdicts = answering(name, self.study, detokenizer, self._coders, llm)
        return ScoringWork(stage, self.study, verdicts, self._progress)


def _kept(answers: Iterator[Explanation], kept: list[Explanation]) -> Iterator[Explanation]:
    for answer in answers:
        kept.append(answer)
        yield answer
