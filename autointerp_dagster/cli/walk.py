"""The walk from a score back to what made it, from the store alone.

verdict -> call -> prompt and answer; verdict -> window -> document; manifest -> upstream manifests
-> weights and corpus hashes. The walk follows the manifests that the score was made from, not the
present heads, so an old score is explained as it was.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow.compute as pc

from autointerp_dagster.adapters.datasets import document_of, read_dataset
from autointerp_dagster.adapters.lineage import Lineage, Made, lineage_of
from autointerp_dagster.adapters.llm import Journal, open_journal
from autointerp_dagster.adapters.manifests import Manifest
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.cli.latent_statistics import read_statistics
from autointerp_dagster.cli.lineage import (
    Call,
    Explained,
    JudgedWindow,
    LatentWalk,
    ScoreWalk,
)
from autointerp_dagster.core.errors import StudyError
from autointerp_dagster.core.llm import JournalBlock
from autointerp_dagster.core.schemas import EXPLANATIONS, VERDICTS, WINDOWS
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import Cell, LayerKey
from autointerp_dagster.resources.coders import LATENTS_PER_BLOCK
from autointerp_dagster.study import Study
from autointerp_dagster.study.stages import SCORE_STAGES

SHOWN_WINDOWS = 4
"""Per explainer and subject, unless more are asked for; the table in the store has them all."""


@dataclass(frozen=True, slots=True)
class Walk:
    """What is known of one score, from its manifest on."""

    store: Store
    lineage: Lineage

    def verdicts(self, latent: int) -> pl.DataFrame:
        """All verdicts on a latent's windows."""
        blobs = [b for b in self.lineage.manifest.blobs if b.name.startswith("verdicts")]
        tables = [self.store.table(blob) for blob in blobs]
        return pl.concat([VERDICTS.empty(), *tables], how="diagonal").filter(
            pl.col("latent") == latent
        )

    def neighbours(self, latent: int) -> dict[int, int]:
        """Which latent fires in each window of kind ``neighbour``."""
        records = self.lineage.ancestors["latent_records"]
        blobs = [blob for blob in records.blobs if blob.name == WINDOWS.name]
        tables = [self.store.table(blob, pc.field("latent") == latent) for blob in blobs]
        rows = pl.concat([WINDOWS.empty(), *tables], how="diagonal").drop_nulls("neighbour")
        return dict(rows.select("window_id", "neighbour").iter_rows())

    def explanation(self, latent: int, explainer: str) -> dict[str, Any]:
        """The explanation's row."""
        blob = self.lineage.ancestors["explanations"].blob(f"{EXPLANATIONS.name}/{explainer}")
        rows = self.store.table(blob).filter((pl.col("latent") == latent) & pl.col("selected"))
        return rows.row(0, named=True)

    def block(self, stage: str, layer: LayerKey, latent: int) -> JournalBlock:
        """Where the calls about a latent are journalled."""
        coder_hash = self.lineage.external[f"sparse_coders {layer}"]
        return JournalBlock(stage, coder_hash, latent // LATENTS_PER_BLOCK)

    def why_unscored(self, latent: int) -> str:
        """Why a latent has no verdict here."""
        explained = self.lineage.ancestors.get("explanations")
        if explained is None:
            return "not scored: outside the scorer's latents, dead, rare, or with too few windows"
        rows = [self.store.table(b) for b in explained.blobs if b.name.startswith("explanations")]
        every = pl.concat([EXPLANATIONS.empty(), *rows])
        mine = every.filter((pl.col("latent") == latent) & pl.col("selected"))
        if mine.is_empty():
            return "not scored: the study did not select this latent to be explained"
        reasons = ", ".join(
            f"{row['explainer']} {row['reason'] or 'ok'}" for row in mine.to_dicts()
        )
        if (mine["status"] == "ok").any():
            return (
                f"not scored: explained ({reasons}), but this scorer was asked about other latents "
                "or explainers, or found no windows"
            )
        return f"not scored: no explanation ({reasons})"

    def dataset(self) -> TokenDataset:
        """The tokens that the windows were cut from."""
        return read_dataset(self.store, self.lineage.ancestors["token_dataset"])

    def explained(
        self, journal: Journal, layer: LayerKey, latent: int, n_windows: int
    ) -> Iterator[Explained]:
        """The verdicts on a latent, by explainer and subject.

        Args:
            journal: Where the calls are.
            layer: The latent's.
            latent: In the score's range.
            n_windows: Windows of each that are walked.
        """
        verdicts = self.verdicts(latent)
        if verdicts.is_empty():
            return
        dataset, neighbours = self.dataset(), self.neighbours(latent)
        judging = self.block(self.lineage.manifest.stage, layer, latent)
        groups = verdicts.partition_by("explainer", "subject", as_dict=True, maintain_order=True)
        for (explainer, subject), rows in groups.items():
            row = (
                {} if explainer is None else self.explanation(rows["explanation_of"][0], explainer)
            )
            writing = self.block("explanations", layer, row.get("latent", latent))
            judged = [
                judged_window(v, dataset, neighbours, call_of(journal, v["call_id"], judging))
                for v in rows.head(n_windows).iter_rows(named=True)
            ]
            yield Explained(
                explainer=explainer,
                subject=subject,
                explanation_of=row.get("latent"),
                explanation=row.get("text"),
                written_by=call_of(journal, row.get("call_id"), writing),
                n_windows=rows.height,
                windows=tuple(judged),
            )


def walk_latent(
    study: Study,
    store: Store,
    layer: str,
    latent: int,
    *,
    scorer: str | None = None,
    manifest: str | None = None,
    n_windows: int = SHOWN_WINDOWS,
) -> LatentWalk:
    """The walk of one latent's scores, and how it fires.

    Args:
        study: The study.
        store: Its store.
        layer: Key of the layer.
        latent: Index of the latent.
        scorer: Only its score.
        manifest: Path of an older score's manifest; the present ones by default.
        n_windows: Windows that are walked, of each explainer and subject.

    Raises:
        StudyError: If the study has no such layer, latent or scorer, or it was never scored.
        StoreError: If something on the way is missing or damaged.
    """
    cell = _cell_of(study, layer, latent)
    manifests = (
        [_older(store, cell, manifest)] if manifest else list(_heads(study, store, cell, scorer))
    )
    if not manifests:
        raise StudyError(
            f"{study.name} {layer} latent {latent}: no score{f' by {scorer}' if scorer else ''}. "
            f"Run `autointerp run {study.name}` first."
        )
    shown: set[str | None] = set()
    scores = []
    with open_journal(store.root) as journal:
        for found in manifests:
            walk = Walk(store, lineage_of(store, found))
            cache, activations = walk.lineage.ancestors.get("activation_cache"), None
            if cache is not None and cache.path not in shown:  # the same for most scores
                activations = read_statistics(store, cache, walk.dataset(), latent)
                shown.add(cache.path)
            explained = tuple(walk.explained(journal, cell.layer, latent, n_windows))
            scores.append(
                ScoreWalk(
                    made=Made.of(found),
                    why_unscored=None if explained else walk.why_unscored(latent),
                    explained=explained,
                    made_from=tuple(walk.lineage.made),
                    external=dict(sorted(walk.lineage.external.items())),
                    text=walk.lineage.text,
                    activations=activations,
                )
            )
    return LatentWalk(study.name, str(cell.layer), latent, tuple(scores))


def judged_window(
    verdict: Mapping[str, Any],
    dataset: TokenDataset,
    neighbours: Mapping[int, int],
    judged_by: Call | None,
) -> JudgedWindow:
    """What a walk says of a row of ``schemas.VERDICTS``."""
    window, kind = verdict["window_id"], verdict["negative_kind"]
    context, position = window >> 16, window & 0xFFFF
    document = document_of(dataset, context)
    predicted = verdict["predicted"]
    copied = ("variant", "is_activating", "prediction", "probability", "score", "status", "reason")
    return JudgedWindow(
        window_id=window,
        context=context,
        position=position,
        document=str(document["doc_id"]),
        text_hash=str(document["content_hash"]),
        negative_kind=kind,
        neighbour=neighbours.get(window) if kind == "neighbour" else None,
        predicted=None if predicted is None else tuple(float(x) for x in predicted),
        judged_by=judged_by,
        **{name: verdict[name] for name in copied},
    )


def call_of(journal: Journal, call_id: str | None, block: JournalBlock) -> Call | None:
    """What a walk says of a call; null if nobody was asked."""
    if call_id is None:
        return None
    entry = journal.find(call_id, block)
    if entry is None:
        return Call(call_id, is_known=False)
    return Call(
        call_id,
        is_known=True,
        model=entry.model,
        time=entry.time,
        messages=entry.messages,
        prompt=entry.prompt,
        answer=entry.reply.text,
    )


def _older(store: Store, cell: Cell, path: str) -> Manifest:
    manifest = store.manifest(path)
    if manifest.stage not in SCORE_STAGES or manifest.cell != str(cell):
        raise StudyError(
            f"{path}: a manifest of {manifest.stage} {manifest.cell}, wanted a score of {cell}. "
            "Give the path of a score's manifest, or another layer and latent."
        )
    return manifest


def _cell_of(study: Study, layer: str, latent: int) -> Cell:
    known = [str(key) for key in study.layer_keys]
    if layer not in known:
        raise StudyError(f"study {study.name}: no layer {layer!r}. It has: {known}.")
    for block in study.ranges:
        if block.start <= latent < block.stop:
            return Cell(LayerKey.parse(layer), block)
    raise StudyError(
        f"study {study.name}: latent {latent} is beyond max_num_latents {study.max_num_latents}."
    )


def _heads(study: Study, store: Store, cell: Cell, scorer: str | None) -> Iterator[Manifest]:
    wanted = SCORE_STAGES if scorer is None else (f"score_{scorer}",)
    if wanted[0] not in SCORE_STAGES:
        known = [name.removeprefix("score_") for name in SCORE_STAGES]
        raise StudyError(f"no scorer {scorer!r}. There are: {known}.")
    for stage in wanted:
        head = store.head(study.name, stage, str(cell))
        if head is not None:
            yield head
