"""The interventions stage: drawing prompts, steering along latents, committing what came of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from autointerp_dagster.adapters.datasets import read_dataset
from autointerp_dagster.adapters.shards import ActivationShard
from autointerp_dagster.adapters.steering import SteeredModel, rows_that_fit, text_ends
from autointerp_dagster.adapters.subject_models import SubjectModel
from autointerp_dagster.core.interventions.experiment import (
    Outcome,
    Writer,
    has_enough,
    intervene,
    untried,
)
from autointerp_dagster.core.interventions.prompts import prompts_of
from autointerp_dagster.core.sampling import scored_latents
from autointerp_dagster.core.schemas import (
    INTERVENTION_PROMPTS,
    INTERVENTIONS,
    LATENTS,
)
from autointerp_dagster.core.sparse_coders import PlacedCoder
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import Cell, Progress, WholeStudy
from autointerp_dagster.core.windows import context_splits
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.plots import preview
from autointerp_dagster.resources.selecting import selection_of
from autointerp_dagster.resources.stage_inputs import StageInputs
from autointerp_dagster.resources.store import Commit, StageRun
from autointerp_dagster.study import Study


@dataclass(frozen=True, slots=True)
class InterveningWork:
    """What intervening on the latents of a cell is made of; commits nothing."""

    stage: StageInputs
    study: Study
    subject: SubjectModel
    coders: Coders
    progress: Progress

    def latents(self, cell: Cell) -> dict[int, str]:
        """The latents that are to be steered along, ascending, and the status of their records."""
        selection = selection_of(self.stage, self.study, cell)
        wanted = scored_latents(selection, self.study.interventions.latents)["latent"]
        records = self.stage.table("latent_records", cell, LATENTS.name)
        mine = records.filter(pl.col("latent").is_in(wanted.implode())).sort("latent")
        return dict(mine.select("latent", "status").iter_rows())

    def outcome(self, cell: Cell) -> Outcome:
        """Both tables of a cell, with a row for every latent of :meth:`latents`."""
        status_of = self.latents(cell)
        outcomes = self.progress(
            self._outcomes(cell, status_of),
            total=len(status_of),
            description=f"{cell.layer} {cell.range}",
            unit="latents",
        )
        return Outcome.concat(list(outcomes), cell.layer)

    def _outcomes(self, cell: Cell, status_of: dict[int, str]) -> Iterator[Outcome]:
        config = self.study.interventions
        dataset = read_dataset(self.stage.store, self.stage.input("token_dataset", WholeStudy()))
        usable = [i for i, status in status_of.items() if status == "ok"]
        prompts = self._prompts(cell, usable, dataset)
        waiting: list[pl.DataFrame] = []
        for latent, status in status_of.items():
            mine = prompts.get(latent)
            if status != "ok":
                yield untried(latent, status, config)  # type: ignore[arg-type]  # not "ok"
            elif mine is None or not has_enough(mine["is_for_explainer"].to_numpy()):
                yield untried(latent, "too_few", config, 0 if mine is None else mine.height)
            else:
                waiting.append(mine)
        if waiting:
            yield from self._steered(cell, waiting, dataset)

    def _prompts(
        self, cell: Cell, latents: Sequence[int], dataset: TokenDataset
    ) -> dict[int, pl.DataFrame]:
        manifest = self.stage.input("activation_cache", cell)
        activations = ActivationShard(self.stage.store, manifest).read_each(latents)
        wanted = np.array(latents, dtype=np.int64)
        splits = context_splits(dataset, self.study.sampling)
        found = prompts_of(activations, cell.layer, wanted, self.study.interventions, splits)
        return {
            int(key[0]): rows for key, rows in found.partition_by("latent", as_dict=True).items()
        }

    def _steered(
        self, cell: Cell, waiting: Sequence[pl.DataFrame], dataset: TokenDataset
    ) -> Iterator[Outcome]:
        """In groups of as many latents as fit."""
        placed = self.coders.of(self.study, cell.layer).placed
        writer = Writer(self.subject.detokenizer, text_ends(self.subject))
        n_rows = rows_that_fit(self.subject, self.study.interventions.prompt_len)
        for group in grouped(waiting, n_rows):
            yield from self._group(cell, pl.concat(group), dataset, placed, writer)

    def _group(
        self,
        cell: Cell,
        prompts: pl.DataFrame,
        dataset: TokenDataset,
        placed: PlacedCoder,
        writer: Writer,
    ) -> Iterator[Outcome]:
        places = prompts.select("context", "position").iter_rows()
        tokens = [dataset.context_tokens(context)[: last + 1] for context, last in places]
        latents = prompts["latent"].to_list()
        config = self.study.interventions
        model = SteeredModel(self.subject, placed, tokens, latents, config.prompt_len)
        yield from intervene(prompts, tokens, model, cell.layer, config, writer).values()


@dataclass(frozen=True, slots=True)
class Intervening(InterveningWork):
    """The cells of one step, one after another."""

    stage: StageRun

    def commit_cells(self) -> None:
        """Steers along the latents of every pending cell and commits what came of it."""
        for cell in self.stage.pending_cells():
            outcome = self.outcome(cell)
            blobs = [
                self.stage.store.put_table(INTERVENTIONS, outcome.interventions),
                self.stage.store.put_table(INTERVENTION_PROMPTS, outcome.prompts),
            ]
            commit = Commit(
                blobs,
                summary_of(outcome),
                execution=self.subject.execution,
                shown={"preview": preview(outcome.interventions.drop("coder", "hookpoint"))},
            )
            self.stage.commit(cell, commit)


def grouped(parts: Sequence[pl.DataFrame], n_rows: int) -> Iterator[list[pl.DataFrame]]:
    """Consecutive parts with at most ``n_rows`` rows together; a larger part stands alone."""
    group: list[pl.DataFrame] = []
    for part in parts:
        if group and sum(p.height for p in group) + part.height > n_rows:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def summary_of(outcome: Outcome) -> dict[str, Any]:
    """Counts for people."""
    table = outcome.interventions
    return {
        "n_interventions": table.height,
        "n_latents": table["latent"].n_unique(),
        "n_prompts": outcome.prompts.height,
        "statuses": dict(table["status"].value_counts().sort("status").iter_rows()),
        "median_steps": table.filter(pl.col("n_steps") > 0)["n_steps"].median(),
    }
