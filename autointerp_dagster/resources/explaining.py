"""One run of the explanations asset: selecting latents, explaining them, naming floor donors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from autointerp_dagster.adapters.manifests import Part
from autointerp_dagster.core.explainers import Explainer, explain, explanations_frame
from autointerp_dagster.core.llm import LLM
from autointerp_dagster.core.sampling import donors_of, floor_latents, select_latents
from autointerp_dagster.core.schemas import DONORS, EXPLANATIONS, FIRING_COUNTS, SELECTION, UNDONE
from autointerp_dagster.core.tokens import Detokenizer
from autointerp_dagster.core.types import Cell, Progress, WholeStudy
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.plots import preview
from autointerp_dagster.resources.scoring import read_records, spent
from autointerp_dagster.resources.store import Commit, StageRun
from autointerp_dagster.study import Study


@dataclass(frozen=True, slots=True)
class Explaining:
    """The cells of one step, one after another; the parts of a cell are its explainers."""

    stage: StageRun
    study: Study
    explainers: Sequence[Explainer]
    llm: LLM
    coders: Coders
    detokenizer: Detokenizer
    progress: Progress
    usage: Callable[[], Mapping[str, float]]

    def commit_cells(self) -> None:
        """Explains the selected latents of every pending cell and commits them."""
        for cell in self.stage.pending_cells():
            before = self.usage()
            selection = self._selection(cell)
            latents = selection["latent"].to_list()
            parts = [self._part(cell, explainer, latents) for explainer in self.explainers]
            explained = pl.concat([self.stage.store.table(part.blob) for part in parts])
            blobs = [
                *(part.blob for part in parts),
                self.stage.store.put_table(SELECTION, selection),
                self.stage.store.put_table(DONORS, self._donors(cell, selection)),
            ]
            now = self.usage()
            commit = Commit(
                blobs,
                _summary(selection, explained),
                complete=all(part.complete for part in parts),
                usage={name: value - before.get(name, 0) for name, value in now.items()},
                shown={"preview": preview(explained.select("latent", "explainer", "text"))},
            )
            self.stage.commit(cell, commit)

    def _selection(self, cell: Cell) -> pl.DataFrame:
        """The latents of the cell that are to be explained; chosen over the whole layer."""
        counts = self.stage.table("activation_cache", cell, FIRING_COUNTS.name)
        chosen = select_latents(cell.layer, counts, self.study.latents)
        firing = counts.filter(pl.col("n_tokens") >= self.study.sampling.min_tokens)["latent"]
        likely = chosen[np.isin(chosen, firing.to_numpy())]  # the others are dead or rare
        floors = floor_latents(cell.layer, likely, self.study.floors)
        mine = chosen[(chosen >= cell.range.start) & (chosen < cell.range.stop)]
        frame = pl.DataFrame({"latent": mine, "is_floor": np.isin(mine, floors)})
        return SELECTION.conform(frame, cell.layer)

    def _donors(self, cell: Cell, selection: pl.DataFrame) -> pl.DataFrame:
        candidates = selection["latent"].to_numpy().astype(np.int64)
        floors = selection.filter("is_floor")["latent"].to_numpy().astype(np.int64)
        coder = self.coders.of(self.study, cell.layer).coder
        directions = coder.decoder_rows(candidates.tolist()).float().numpy()
        return donors_of(cell.layer, floors, candidates, directions, self.study.floors)

    def _part(self, cell: Cell, explainer: Explainer, latents: list[int]) -> Part:
        identity = {
            "explainer": self.stage.parameters["explainers"][explainer.name],
            "explainer_llm": self.stage.parameters["explainer_llm"]
            if explainer.asks_a_model
            else None,
            "latents": latents,
            "latent_records": self.stage.input("latent_records", cell).content_hash,
            "token_dataset": self.stage.input("token_dataset", WholeStudy()).content_hash,
        }
        return self.stage.part(
            explainer.name, identity, lambda: self._explain(cell, explainer, latents)
        )

    def _explain(self, cell: Cell, explainer: Explainer, latents: list[int]) -> Part:
        shown = self.progress(
            read_records(self.stage, cell, latents),
            total=len(latents),
            description=f"{cell.layer} {cell.range} {explainer.name}",
            unit="latents",
            note=lambda: spent(self.usage()),
        )
        block_of = self.coders.block_of(self.study, cell.layer, "explanations")
        frame = explanations_frame(explain(explainer, shown, self.detokenizer, self.llm, block_of))
        name = f"{EXPLANATIONS.name}/{explainer.name}"
        blob = self.stage.store.put_table(EXPLANATIONS, frame, name=name)
        complete = frame.filter(pl.col("reason").is_in(UNDONE)).is_empty()
        return Part(name=explainer.name, fingerprint="", blob=blob, complete=complete)


def _summary(selection: pl.DataFrame, explained: pl.DataFrame) -> dict[str, Any]:
    without = explained.filter(pl.col("status") != "ok")
    return {
        "n_selected": selection.height,
        "n_floor_latents": int(selection["is_floor"].sum()),
        "n_explanations": explained.height - without.height,
        "n_without_text": without.height,
        "reasons": dict(without["reason"].value_counts().iter_rows()),
    }
