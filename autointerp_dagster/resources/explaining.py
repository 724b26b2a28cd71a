"""The explanations stage: selecting latents, explaining them, naming floor donors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow.compute as pc

from autointerp_dagster.adapters.manifests import Blob, Part
from autointerp_dagster.adapters.subject_models import SubjectModel
from autointerp_dagster.core.config import (
    BestOfNExplainerConfig,
    DefaultExplainerConfig,
    ExplainerConfig,
    OutputExplainerConfig,
    RefineExplainerConfig,
)
from autointerp_dagster.core.explainers import (
    Explanation,
    explain,
    explanations_frame,
    make_explainer,
)
from autointerp_dagster.core.explainers.output import OutputCase, explain_outputs
from autointerp_dagster.core.latent_records import LatentRecord
from autointerp_dagster.core.llm import LLM
from autointerp_dagster.core.logit_lens import promoted_tokens
from autointerp_dagster.core.sampling import donors_of, scored_latents
from autointerp_dagster.core.schemas import (
    DONORS,
    EXPLANATIONS,
    LATENT_STATISTICS,
    SELECTION,
    UNDONE,
)
from autointerp_dagster.core.selection import SelectionModels, choose
from autointerp_dagster.core.types import Cell, Progress, WholeStudy
from autointerp_dagster.resources.coders import Coders
from autointerp_dagster.resources.metering import UNMETERED, Meter, cost_of, offered, spent
from autointerp_dagster.resources.plots import preview
from autointerp_dagster.resources.scoring import read_interventions, read_records
from autointerp_dagster.resources.selecting import selection_of
from autointerp_dagster.resources.stage_inputs import StageInputs
from autointerp_dagster.resources.store import Commit, StageRun
from autointerp_dagster.study import Study
from autointerp_dagster.study.parameters import LLMPart, parts_of_explainer

_SHOWN = ("latent", "explainer", "text")


@dataclass(frozen=True, slots=True)
class ExplainingWork:
    """What explaining a cell is made of; commits nothing."""

    stage: StageInputs
    study: Study
    llms: Mapping[LLMPart, LLM]
    """Of every part that an explainer asks."""
    coders: Coders
    subject: SubjectModel
    """For its detokenizer; its weights are not needed."""
    progress: Progress
    meter: Meter = UNMETERED
    """Of ``llms`` together."""

    def selection(self, cell: Cell) -> pl.DataFrame:
        """``schemas.SELECTION``: the latents of the cell that are to be explained."""
        return selection_of(self.stage, self.study, cell)

    def donors(self, cell: Cell, selection: pl.DataFrame) -> pl.DataFrame:
        """``schemas.DONORS``: whose explanations may stand in for a floor latent's own."""
        candidates = selection["latent"].to_numpy().astype(np.int64)
        floors = selection.filter("is_floor")["latent"].to_numpy().astype(np.int64)
        coder = self.coders.of(self.study, cell.layer).coder
        directions = coder.decoder_rows(candidates.tolist()).float().numpy()
        steered = None
        if self.study.output_explainers:
            rows = scored_latents(selection, self.study.interventions.latents)
            steered = rows["latent"].to_numpy().astype(np.int64)
        return donors_of(cell.layer, floors, candidates, directions, self.study.floors, steered)

    def part_parameters(self, cell: Cell, explainer: str, latents: Sequence[int]) -> dict[str, Any]:
        """All that decides one explainer's part of a cell."""
        config = self.study.explainers[explainer]
        parameters = {
            "explainer": self.stage.parameters["explainers"][explainer],
            "llms": {part: self.llms[part].identity for part in parts_of_explainer(config)},
            "latents": list(latents),
            "latent_records": self.stage.input("latent_records", cell).content_hash,
            "token_dataset": self.stage.input("token_dataset", WholeStudy()).content_hash,
        }
        if isinstance(config, OutputExplainerConfig):
            parameters["interventions"] = self.stage.input("interventions", cell).content_hash
        if _shows_promoted(config):
            parameters["statistics"] = self._statistics(cell).content_hash
        return parameters

    def explanations(
        self, cell: Cell, explainer: str, latents: Sequence[int]
    ) -> Iterator[Explanation]:
        """Every explanation of a cell by one explainer, or why there is none, as models answer."""
        config = self.study.explainers[explainer]
        shown = self.progress(
            self._records(cell, config, latents),
            total=len(latents),
            description=f"{cell.layer} {cell.range} {explainer}",
            unit="latents",
            note=lambda: spent(self.meter),
        )
        block_of = self.coders.block_of(self.study, cell.layer, "explanations")
        detokenizer = self.subject.detokenizer
        match config:
            case OutputExplainerConfig():
                cases = self._output_cases(cell, config, shown)
                return explain_outputs(explainer, config, cases, self.llms["base_lm"], block_of)
            case BestOfNExplainerConfig() | RefineExplainerConfig():
                models = SelectionModels(self.llms["explainer"], self.llms["judge"])
                return choose(explainer, config, shown, detokenizer, models, block_of)
            case _:
                one = make_explainer(explainer, config)
                llm = self.llms.get("explainer")
                return explain(one, shown, detokenizer, llm, block_of)

    def _records(
        self, cell: Cell, config: ExplainerConfig, latents: Sequence[int]
    ) -> Iterator[LatentRecord]:
        records = read_records(self.stage, cell, latents)
        if not _shows_promoted(config):
            return records
        promoted = self._promoted(cell, latents)
        return (replace(r, promoted_tokens=promoted[r.latent.index]) for r in records)

    def _statistics(self, cell: Cell) -> Blob:
        return self.stage.input("activation_cache", cell).blob(LATENT_STATISTICS.name)

    def _promoted(self, cell: Cell, latents: Sequence[int]) -> dict[int, tuple[str, ...]]:
        """Texts per latent; none for a decoder that writes elsewhere than before the head."""
        rows = self.stage.store.table(self._statistics(cell), pc.field("latent").isin(latents))
        ids = rows["promoted_tokens"].fill_null([]).to_list()
        pieces = self.subject.detokenizer.pieces
        texts = promoted_tokens(ids, lambda token: "".join(pieces(np.array([token]))))
        return dict(zip(rows["latent"].to_list(), texts, strict=True))

    def _output_cases(
        self, cell: Cell, config: OutputExplainerConfig, records: Iterator[LatentRecord]
    ) -> Iterator[OutputCase]:
        target = config.kl or self.study.interventions.kl[0]
        found = read_interventions(self.stage, cell)
        for record in records:
            mine = [i for i in found.get(record.latent.index, ()) if i.kl_target == target]
            yield OutputCase(record.latent, record.status, mine[0] if mine else None)


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
            parts = [self._part(cell, name, latents) for name in self.study.explainers]
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
                shown={"preview": preview(explained.filter("selected").select(*_SHOWN))},
            )
            self.stage.commit(cell, commit)

    def _part(self, cell: Cell, explainer: str, latents: list[int]) -> Part:
        parameters = self.part_parameters(cell, explainer, latents)
        return self.stage.part(explainer, parameters, lambda: self._made(cell, explainer, latents))

    def _made(self, cell: Cell, explainer: str, latents: list[int]) -> Part:
        before = self.meter.cost
        frame = explanations_frame(self.explanations(cell, explainer, latents))
        name = f"{EXPLANATIONS.name}/{explainer}"
        blob = self.stage.store.put_table(EXPLANATIONS, frame, name=name)
        complete = frame.filter(pl.col("reason").is_in(UNDONE)).is_empty()
        cost = asdict(self.meter.cost - before)
        return Part(name=explainer, fingerprint="", blob=blob, complete=complete, cost=cost)


def _shows_promoted(config: ExplainerConfig) -> bool:
    return isinstance(config, DefaultExplainerConfig) and config.show_promoted


def _summary(selection: pl.DataFrame, explained: pl.DataFrame) -> dict[str, Any]:
    explained = explained.filter("selected")
    without = explained.filter(pl.col("status") != "ok")
    return {
        "n_selected": selection.height,
        "n_asked": explained.filter(pl.col("call_id").is_not_null())["latent"].n_unique(),
        "n_floor_latents": int(selection["is_floor"].sum()),
        "n_explanations": explained.height - without.height,
        "n_without_text": without.height,
        "reasons": dict(without["reason"].value_counts().iter_rows()),
    }
