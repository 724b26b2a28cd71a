"""The explanations stage: selecting latents, explaining them, naming floor donors."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl

from autointerp_dagster.adapters.manifests import Part
from autointerp_dagster.core.explainers import (
    Explainer,
    Explanation,
    explain,
    explanations_frame,
)
from autointerp_dagster.core.llm import LLM
from autointerp_dagster.core.sampling import donors_of, floor_latents, select_latents
from autointerp_dagster.core.schemas import DONORS, EXPLANATIONS, FIRING_COUNTS, SELECTION, UNDONE
from autointerp_dagster.core.tokens import Detokenizer
from autointerp_dagster.core.types import Cell, Progress, WholeStudy
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.metering import UNMETERED, Meter, cost_of, offered, spent
from autointerp_dagster.resources.plots import preview
from autointerp_dagster.resources.scoring import read_records
from autointerp_dagster.resources.stage_inputs import StageInputs
from autointerp_dagster.resources.store import Commit, StageRun
from autointerp_dagster.study import Study


@dataclass(frozen=True, slots=True)
class ExplainingWork:
    """What explaining a cell is made of; commits nothing."""

    stage: StageInputs
    study: Study
    explainers: Sequence[Explainer]
    llm: LLM
    coders: Coders
    detokenizer: Detokenizer
    progress: Progress
    meter: Meter = UNMETERED
    """Of ``llm``."""

    def selection(self, cell: Cell) -> pl.DataFrame:
        """``schemas.SELECTION``: the latents of the cell that are to be explained.

        They are chosen over the whole layer.
        """
        counts = self.stage.table("activation_cache", cell, FIRING_COUNTS.name)
        chosen = select_latents(cell.layer, counts, self.study.latents)
        firing = counts.filter(pl.col("n_tokens") >= self.study.sampling.min_tokens)["latent"]
        likely = chosen[np.isin(chosen, firing.to_numpy())]  # the others are dead or rare
        floors = floor_latents(cell.layer, likely, self.study.floors)
        mine = chosen[(chosen >= cell.range.start) & (chosen < cell.range.stop)]
        frame = pl.DataFrame({"latent": mine, "is_floor": np.isin(mine, floors)})
        return SELECTION.conform(frame, cell.layer)

    def donors(self, cell: Cell, selection: pl.DataFrame) -> pl.DataFrame:
        """``schemas.DONORS``: whose explanations may stand in for a floor latent's own."""
        candidates = selection["latent"].to_numpy().astype(np.int64)
        floors = selection.filter("is_floor")["latent"].to_numpy().astype(np.int64)
        coder = self.coders.of(self.study, cell.layer).coder
        directions = coder.decoder_rows(candidates.tolist()).float().numpy()
        return donors_of(cell.layer, floors, candidates, directions, self.study.floors)

    def part_parameters(
        self, cell: Cell, explainer: Explainer, latents: Sequence[int]
    ) -> dict[str, Any]:
        """All that decides one explainer's part of a cell."""
        return {
            "explainer": self.stage.parameters["explainers"][explainer.name],
            "explainer_llm": self.stage.parameters["explainer_llm"]
            if explainer.asks_a_model
            else None,
            "latents": list(latents),
            "latent_records": self.stage.input("latent_records", cell).content_hash,
            "token_dataset": self.stage.input("token_dataset", WholeStudy()).content_hash,
        }

    def explanations(
        self, cell: Cell, explainer: Explainer, latents: Sequence[int]
    ) -> Iterator[Explanation]:
        """One explanation per latent, or why there is none, as the model answers."""
        shown = self.progress(
            read_records(self.stage, cell, latents),
            total=len(latents),
            description=f"{cell.layer} {cell.range} {explainer.name}",
            unit="latents",
            note=lambda: spent(self.meter),
        )
        block_of = self.coders.block_of(self.study, cell.layer, "explanations")
        return explain(explainer, shown, self.detokenizer, self.llm, block_of)


@dataclass(frozen=True, slots=True)
class Explaining(ExplainingWork):
    """The cells of one step, one after another; the parts of a cell are its explainers."""

    stage: StageRun

    def commit_cells(self) -> None:
        """Explains the selected latents of every pending cell and commits them."""
        for cell in self.stage.pending_cells():
            before = self.meter.usage
            selection = self.selection(cell)
            latents = selection["latent"].to_list()
            parts = [self._part(cell, explainer, latents) for explainer in self.explainers]
            explained = pl.concat([self.stage.store.table(part.blob) for part in parts])
            blobs = [
                *(part.blob for part in parts),
                self.stage.store.put_table(SELECTION, selection),
                self.stage.store.put_table(DONORS, self.donors(cell, selection)),
            ]
            commit = Commit(
                blobs,
                {**_summary(selection, explained), **cost_of(parts)},
                complete=all(part.complete for part in parts),
                usage=asdict(self.meter.usage - before),
                execution=offered(self.meter),
                shown={"preview": preview(explained.select("latent", "explainer", "text"))},
            )
            self.stage.commit(cell, commit)

    def _part(self, cell: Cell, explainer: Explainer, latents: list[int]) -> Part:
        parameters = self.part_parameters(cell, explainer, latents)
        return self.stage.part(
            explainer.name, parameters, lambda: self._made(cell, explainer, latents)
        )

    def _made(self, cell: Cell, explainer: Explainer, latents: list[int]) -> Part:
        before = self.meter.cost
        frame = explanations_frame(self.explanations(cell, explainer, latents))
        name = f"{EXPLANATIONS.name}/{explainer.name}"
        blob = self.stage.store.put_table(EXPLANATIONS, frame, name=name)
        complete = frame.filter(pl.col("reason").is_in(UNDONE)).is_empty()
        cost = asdict(self.meter.cost - before)
        return Part(name=explainer.name, fingerprint="", blob=blob, complete=complete, cost=cost)


def _summary(selection: pl.DataFrame, explained: pl.DataFrame) -> dict[str, Any]:
    without = explained.filter(pl.col("status") != "ok")
    return {
        "n_selected": selection.height,
        "n_asked": explained.filter(pl.col("call_id").is_not_null())["latent"].n_unique(),
        "n_floor_latents": int(selection["is_floor"].sum()),
        "n_explanations": explained.height - without.height,
        "n_without_text": without.height,
        "reasons": dict(without["reason"].value_counts().iter_rows()),
    }
