"""What the scorer assets share: reading a cell's records and explanations, committing verdicts."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from autointerp_dagster.adapters.datasets import read_dataset
from autointerp_dagster.adapters.manifests import Part
from autointerp_dagster.core.interventions import Intervention, interventions_of
from autointerp_dagster.core.latent_records import LatentRecord, RecordTables, records_in_order
from autointerp_dagster.core.sampling import processing_order, scored_latents
from autointerp_dagster.core.schemas import (
    DONORS,
    EXPLANATIONS,
    INTERVENTION_PROMPTS,
    INTERVENTIONS,
    LATENTS,
    SELECTION,
    UNDONE,
    VERDICTS,
    WINDOWS,
)
from autointerp_dagster.core.scorers import (
    EXPLANATION_FREE,
    InterventionJob,
    Job,
    ScoringTask,
    Verdict,
    jobs_of,
    scoring_tasks,
    verdicts_frame,
)
from autointerp_dagster.core.types import Cell, LatentId, Progress, WholeStudy
from autointerp_dagster.resources.metering import UNMETERED, Meter, cost_of, offered, spent
from autointerp_dagster.resources.plots import preview
from autointerp_dagster.resources.selecting import selection_of
from autointerp_dagster.resources.stage_inputs import StageInputs
from autointerp_dagster.resources.store import Commit, StageRun
from autointerp_dagster.study import Study
from autointerp_dagster.study.stages import upstream_of

VerdictsOf = Callable[[Cell, Iterable[Any]], Iterator[Verdict]]
"""How one scorer turns jobs of a cell into verdicts. A job is a ``Job``, or an
``InterventionJob``."""

NO_EXPLAINER = "*"
"""The one part of a cell of a scorer that needs no explanation; no explainer can have the name."""


class Explained(NamedTuple):
    """What one explainer said of a cell, as a scorer needs it."""

    explanations: pl.DataFrame
    """``schemas.EXPLANATIONS``; empty for a scorer that needs none."""
    selection: pl.DataFrame
    """``schemas.SELECTION``."""
    donors: pl.DataFrame
    """``schemas.DONORS``."""


@dataclass(frozen=True, slots=True)
class ScoringWork:
    """What scoring a cell is made of; commits nothing."""

    stage: StageInputs
    study: Study
    verdicts_of: VerdictsOf
    progress: Progress
    meter: Meter = UNMETERED
    """Of the language model that ``verdicts_of`` asks."""

    @property
    def scorer(self) -> str:
        """Its name in the study."""
        return self.stage.stage.name.removeprefix("score_")

    @property
    def part_names(self) -> list[str]:
        """The parts of a cell: the explainers whose explanations are scored, or one for all."""
        if self.scorer in EXPLANATION_FREE:
            return [NO_EXPLAINER]
        asked = self.study.scorer_config(self.scorer).explainers
        return [name for name in self.study.explainers if asked is None or name in asked]

    def part_parameters(self, cell: Cell, explainer: str) -> dict[str, Any]:
        """All that decides one part of a cell: its own explanations, and every other input."""
        stages = [stage.name for stage in upstream_of(self.study, self.stage.stage)]
        parameters = dict(self.stage.parameters)
        parameters.pop("explainers")  # one explainer more changes nothing of the others
        for name in stages:
            if name == "explanations":
                explained = self.stage.input(name, cell)
                parameters |= {
                    "explanations": explained.blob(f"{EXPLANATIONS.name}/{explainer}").content_hash,
                    "selection": explained.blob(SELECTION.name).content_hash,
                    "donors": explained.blob(DONORS.name).content_hash,
                }
            else:
                (found,) = self.stage.inputs(name, cell)
                parameters[name] = found.content_hash
        return parameters

    def explained(self, cell: Cell, explainer: str) -> Explained:
        """What one explainer said of a cell, as the store has it."""
        if explainer == NO_EXPLAINER:
            selection = selection_of(self.stage, self.study, cell)
            return Explained(EXPLANATIONS.empty(), selection, DONORS.empty())
        manifest, store = self.stage.input("explanations", cell), self.stage.store
        return Explained(
            store.table(manifest.blob(f"{EXPLANATIONS.name}/{explainer}")),
            store.table(manifest.blob(SELECTION.name)),
            store.table(manifest.blob(DONORS.name)),
        )

    def verdicts(self, cell: Cell, explainer: str, explained: Explained) -> Iterator[Verdict]:
        """Every verdict on one explainer's explanations, as the model answers."""
        chosen = scored_latents(explained.selection, self.study.scorers.of(self.scorer).latents)
        latents, jobs = self._jobs(cell, explainer, explained, chosen)
        shown = self.progress(
            jobs,
            total=len(latents),
            description=f"{cell.layer} {cell.range} {explainer}",
            unit="latents",
            note=lambda: spent(self.meter),
        )
        return self.verdicts_of(cell, shown)

    def _jobs(
        self, cell: Cell, explainer: str, explained: Explained, chosen: pl.DataFrame
    ) -> tuple[Collection[int], Iterable[Any]]:
        """The latents that are scored, and what the scorer works on, one item for each."""
        if explainer == NO_EXPLAINER:
            latents = chosen.drop_nulls("rank")["latent"].to_list()
            return latents, (Job(r, ()) for r in read_records(self.stage, cell, latents))
        layer = cell.layer
        ids = [LatentId(layer.coder, layer.hookpoint, n) for n in chosen["latent"].to_list()]
        tasks = scoring_tasks(ids, explained.explanations, explained.donors)
        if self.scorer == "intervention":
            return tasks, self._intervention_jobs(cell, tasks)
        return tasks, jobs_of(read_records(self.stage, cell, list(tasks)), tasks)

    def _intervention_jobs(
        self, cell: Cell, tasks: Mapping[int, tuple[ScoringTask, ...]]
    ) -> Iterator[InterventionJob]:
        found = read_interventions(self.stage, cell)
        order = processing_order(cell.layer, np.array(list(tasks), dtype=np.int64))
        main = self.study.interventions.kl[0]
        for latent in order.tolist():
            mine = sorted(found.get(latent, ()), key=lambda i: (i.kl_target != main, i.kl_target))
            yield InterventionJob(tuple(mine), tasks[latent])


@dataclass(frozen=True, slots=True)
class Scoring(ScoringWork):
    """One run of a scorer asset."""

    stage: StageRun

    def commit_cells(self) -> None:
        """Scores every pending cell, one part per explainer, and commits it."""
        for cell in self.stage.pending_cells():
            before = self.meter.usage
            parts = [self._part(cell, name) for name in self.part_names]
            verdicts = pl.concat([self.stage.store.table(part.blob) for part in parts])
            failed = verdicts.filter(pl.col("status") == "failed")
            summary = {
                "n_verdicts": verdicts.height,
                "n_failed": failed.height,
                "n_latents": verdicts["latent"].n_unique(),
                "n_asked": verdicts.filter(pl.col("call_id").is_not_null())["latent"].n_unique(),
                "failures": dict(failed["reason"].value_counts().iter_rows()),
                **cost_of(parts),
            }
            commit = Commit(
                [part.blob for part in parts],
                summary,
                complete=all(part.complete for part in parts),
                usage=asdict(self.meter.usage - before),
                execution=offered(self.meter),
                shown={"preview": preview(verdicts)},
            )
            self.stage.commit(cell, commit)

    def _part(self, cell: Cell, explainer: str) -> Part:
        parameters = self.part_parameters(cell, explainer)
        return self.stage.part(explainer, parameters, lambda: self._made(cell, explainer))

    def _made(self, cell: Cell, explainer: str) -> Part:
        explained = self.explained(cell, explainer)
        before = self.meter.cost
        frame = verdicts_frame(self.verdicts(cell, explainer, explained))
        name = VERDICTS.name if explainer == NO_EXPLAINER else f"{VERDICTS.name}/{explainer}"
        blob = self.stage.store.put_table(VERDICTS, frame, name=name)
        complete = frame.filter(pl.col("reason").is_in(UNDONE)).is_empty()
        cost = asdict(self.meter.cost - before)
        return Part(name=explainer, fingerprint="", blob=blob, complete=complete, cost=cost)


def read_interventions(stage: StageInputs, cell: Cell) -> dict[int, tuple[Intervention, ...]]:
    """The interventions of a cell, by latent; empty beyond the coder's width."""
    manifest = stage.input("interventions", cell)
    tables = [
        stage.store.table(manifest.blob(t.name)) for t in (INTERVENTIONS, INTERVENTION_PROMPTS)
    ]
    return interventions_of(*tables)


def read_records(stage: StageInputs, cell: Cell, latents: Sequence[int]) -> Iterator[LatentRecord]:
    """The records of some latents of a cell, in hashed order: cut short, they are a sample."""
    manifest = stage.input("latent_records", cell)
    dataset = read_dataset(stage.store, stage.input("token_dataset", WholeStudy()))
    tables = RecordTables(
        stage.store.table(manifest.blob(LATENTS.name)),
        stage.store.table(manifest.blob(WINDOWS.name)),
    )
    order = processing_order(cell.layer, np.array(latents, dtype=np.int64))
    return records_in_order(tables, dataset, cell.layer, order.tolist())
