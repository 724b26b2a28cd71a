"""What the scorer assets share: reading a cell's records and explanations, committing verdicts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from autointerp_dagster.adapters.datasets import read_dataset
from autointerp_dagster.adapters.manifests import Part
from autointerp_dagster.core.latent_records import LatentRecord, RecordTables, records_in_order
from autointerp_dagster.core.sampling import processing_order
from autointerp_dagster.core.schemas import (
    DONORS,
    EXPLANATIONS,
    LATENTS,
    SELECTION,
    UNDONE,
    VERDICTS,
    WINDOWS,
)
from autointerp_dagster.core.scorers import Job, Verdict, jobs_of, scoring_tasks, verdicts_frame
from autointerp_dagster.core.types import Cell, LatentId, Progress, WholeStudy
from autointerp_dagster.resources.metering import UNMETERED, Meter, cost_of, offered, spent
from autointerp_dagster.resources.plots import preview
from autointerp_dagster.resources.stage_inputs import StageInputs
from autointerp_dagster.resources.store import Commit, StageRun
from autointerp_dagster.study import Study

VerdictsOf = Callable[[Cell, Iterable[Job]], Iterator[Verdict]]
"""How one scorer turns jobs of a cell into verdicts."""


class Explained(NamedTuple):
    """What one explainer said of a cell, as a scorer needs it."""

    explanations: pl.DataFrame
    """``schemas.EXPLANATIONS``."""
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

    def part_parameters(self, cell: Cell, explainer: str) -> dict[str, Any]:
        """All that decides one explainer's part of a cell."""
        explained = self.stage.input("explanations", cell)
        return {
            **self.stage.parameters,
            "explanations": explained.blob(f"{EXPLANATIONS.name}/{explainer}").content_hash,
            "donors": explained.blob(DONORS.name).content_hash,
            "latent_records": self.stage.input("latent_records", cell).content_hash,
            "token_dataset": self.stage.input("token_dataset", WholeStudy()).content_hash,
        }

    def explained(self, cell: Cell, explainer: str) -> Explained:
        """What one explainer said of a cell, as the store has it."""
        manifest, store = self.stage.input("explanations", cell), self.stage.store
        return Explained(
            store.table(manifest.blob(f"{EXPLANATIONS.name}/{explainer}")),
            store.table(manifest.blob(SELECTION.name)),
            store.table(manifest.blob(DONORS.name)),
        )

    def verdicts(self, cell: Cell, explainer: str, explained: Explained) -> Iterator[Verdict]:
        """Every verdict on one explainer's explanations, as the judge answers."""
        layer, selected = cell.layer, explained.selection["latent"].to_list()
        ids = [LatentId(layer.coder, layer.hookpoint, latent) for latent in selected]
        tasks = scoring_tasks(ids, explained.explanations, explained.donors)
        shown = self.progress(
            jobs_of(read_records(self.stage, cell, list(tasks)), tasks),
            total=len(tasks),
            description=f"{cell.layer} {cell.range} {explainer}",
            unit="latents",
            note=lambda: spent(self.meter),
        )
        return self.verdicts_of(cell, shown)


@dataclass(frozen=True, slots=True)
class Scoring(ScoringWork):
    """One run of a scorer asset."""

    stage: StageRun

    def commit_cells(self) -> None:
        """Scores every pending cell, one part per explainer, and commits it."""
        for cell in self.stage.pending_cells():
            before = self.meter.usage
            parts = [self._part(cell, name) for name in self.study.explainers]
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
        name = f"{VERDICTS.name}/{explainer}"
        blob = self.stage.store.put_table(VERDICTS, frame, name=name)
        complete = frame.filter(pl.col("reason").is_in(UNDONE)).is_empty()
        cost = asdict(self.meter.cost - before)
        return Part(name=explainer, fingerprint="", blob=blob, complete=complete, cost=cost)


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
