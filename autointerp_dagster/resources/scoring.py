"""What the scorer assets share: reading a cell's records and explanations, committing verdicts."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

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
from autointerp_dagster.resources.plots import preview
from autointerp_dagster.resources.store import Commit, StageRun
from autointerp_dagster.study import Study

VerdictsOf = Callable[[Cell, Iterable[Job]], Iterator[Verdict]]
"""How one scorer turns jobs of a cell into verdicts."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """One run of a scorer asset."""

    stage: StageRun
    study: Study
    verdicts_of: VerdictsOf
    progress: Progress
    usage: Callable[[], Mapping[str, float]] = dict
    """What was paid so far."""

    def commit_cells(self) -> None:
        """Scores every pending cell, one part per explainer, and commits it."""
        for cell in self.stage.pending_cells():
            before = self.usage()
            parts = [self._part(cell, name) for name in self.study.explainers]
            paid = {name: value - before.get(name, 0) for name, value in self.usage().items()}
            verdicts = pl.concat([self.stage.store.table(part.blob) for part in parts])
            failed = verdicts.filter(pl.col("status") == "failed")
            summary = {
                "n_verdicts": verdicts.height,
                "n_failed": failed.height,
                "n_latents": verdicts["latent"].n_unique(),
                "failures": dict(failed["reason"].value_counts().iter_rows()),
            }
            commit = Commit(
                [part.blob for part in parts],
                summary,
                complete=all(part.complete for part in parts),
                usage=paid,
                shown={"preview": preview(verdicts)},
            )
            self.stage.commit(cell, commit)

    def _part(self, cell: Cell, explainer: str) -> Part:
        explained = self.stage.input("explanations", cell)
        blob = explained.blob(f"{EXPLANATIONS.name}/{explainer}")
        identity = {
            **self.stage.parameters,
            "explanations": blob.content_hash,
            "donors": explained.blob(DONORS.name).content_hash,
            "latent_records": self.stage.input("latent_records", cell).content_hash,
            "token_dataset": self.stage.input("token_dataset", WholeStudy()).content_hash,
        }
        return self.stage.part(explainer, identity, lambda: self._score(cell, explainer))

    def _score(self, cell: Cell, explainer: str) -> Part:
        explained = self.stage.input("explanations", cell)
        store = self.stage.store
        explanations = store.table(explained.blob(f"{EXPLANATIONS.name}/{explainer}"))
        selected = store.table(explained.blob(SELECTION.name))["latent"].to_list()
        ids = [LatentId(cell.layer.coder, cell.layer.hookpoint, latent) for latent in selected]
        tasks = scoring_tasks(ids, explanations, store.table(explained.blob(DONORS.name)))
        records = read_records(self.stage, cell, list(tasks))
        shown = self.progress(
            jobs_of(records, tasks),
            total=len(tasks),
            description=f"{cell.layer} {cell.range} {explainer}",
            unit="latents",
            note=lambda: spent(self.usage()),
        )
        frame = verdicts_frame(self.verdicts_of(cell, shown))
        blob = store.put_table(VERDICTS, frame, name=f"{VERDICTS.name}/{explainer}")
        complete = frame.filter(pl.col("reason").is_in(UNDONE)).is_empty()
        return Part(name=explainer, fingerprint="", blob=blob, complete=complete)


def read_records(stage: StageRun, cell: Cell, latents: list[int]) -> Iterator[LatentRecord]:
    """The records of some latents of a cell, in hashed order: cut short, they are a sample."""
    manifest = stage.input("latent_records", cell)
    dataset = read_dataset(stage.store, stage.input("token_dataset", WholeStudy()))
    tables = RecordTables(
        stage.store.table(manifest.blob(LATENTS.name)),
        stage.store.table(manifest.blob(WINDOWS.name)),
    )
    order = processing_order(cell.layer, np.array(latents, dtype=np.int64))
    return records_in_order(tables, dataset, cell.layer, order.tolist())


def spent(usage: Mapping[str, float]) -> str:
    """Spend in a few characters, for a progress bar."""
    tokens = usage.get("prompt_tokens", 0) + usage.get("completion_tokens", 0)
    return f"{tokens / 1000:.0f}k tokens ${usage.get('usd', 0):.2f}" if tokens else ""
