"""Walking a score back to what made it, from the store alone.

verdict -> call -> prompt and answer; verdict -> window -> document; manifest -> upstream manifests
-> weights and corpus hashes. The walk follows the manifests that the score was made from, not the
present heads, so an old score is explained as it was.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import polars as pl
import pyarrow.compute as pc
from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from autointerp_dagster.adapters.datasets import document_of, read_dataset
from autointerp_dagster.adapters.llm import Entry, Journal, open_journal
from autointerp_dagster.adapters.manifests import Manifest, Upstream
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.cli.latent_statistics import add_statistics
from autointerp_dagster.core.errors import StudyError
from autointerp_dagster.core.llm import JournalBlock
from autointerp_dagster.core.schemas import EXPLANATIONS, VERDICTS, WINDOWS
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import Cell, LayerKey
from autointerp_dagster.resources.coders import LATENTS_PER_BLOCK
from autointerp_dagster.study import Study
from autointerp_dagster.study.stages import SCORE_STAGES

SHOWN_WINDOWS = 4
"""Per explainer and subject; the table in the store has them all."""
_SHOWN_CHARACTERS = 600


@dataclass(frozen=True, slots=True)
class Walk:
    """What is known of one score, read from its manifest on."""

    store: Store
    manifest: Manifest
    """Of the score."""
    made_from: dict[str, list[Manifest]]
    """By asset: all manifests that the score rests on, the nearest first. Neighbours, for one, are
    counted on every range of a layer."""
    external: dict[str, str]
    """``asset place`` to weights' or corpus hash."""

    @classmethod
    def start(cls, store: Store, manifest: Manifest) -> "Walk":
        """Reads every manifest below ``manifest``.

        Raises:
            StoreError: If one is missing or was changed.
        """
        made_from: dict[str, list[Manifest]] = {}
        external: dict[str, str] = {}
        for upstream in _ancestors(store, manifest):
            if upstream.manifest is None:
                external.setdefault(f"{upstream.asset} {upstream.cell}", upstream.content_hash)
            else:
                found = made_from.setdefault(upstream.asset, [])
                found.append(store.manifest(upstream.manifest))
        return cls(store, manifest, made_from, external)

    @property
    def ancestors(self) -> dict[str, Manifest]:
        """By asset: what the score itself was made from, of its own cell where there is one."""
        cell = self.manifest.cell
        return {
            asset: next((m for m in found if m.cell == cell), found[0])
            for asset, found in self.made_from.items()
        }

    def verdicts(self, latent: int) -> pl.DataFrame:
        """All verdicts on a latent's windows."""
        tables = [self.store.table(b) for b in self.manifest.blobs if b.name.startswith("verdicts")]
        return pl.concat([VERDICTS.empty(), *tables], how="diagonal").filter(
            pl.col("latent") == latent
        )

    def neighbours(self, latent: int) -> dict[int, int]:
        """Which latent fires in each window of kind ``neighbour``."""
        blobs = [b for b in self.ancestors["latent_records"].blobs if b.name == WINDOWS.name]
        tables = [self.store.table(blob, pc.field("latent") == latent) for blob in blobs]
        rows = pl.concat([WINDOWS.empty(), *tables], how="diagonal").drop_nulls("neighbour")
        return dict(rows.select("window_id", "neighbour").iter_rows())

    def explanation(self, latent: int, explainer: str) -> dict[str, object]:
        """The explanation's row."""
        blob = self.ancestors["explanations"].blob(f"{EXPLANATIONS.name}/{explainer}")
        rows = self.store.table(blob).filter((pl.col("latent") == latent) & pl.col("selected"))
        return rows.row(0, named=True)

    def block(self, stage: str, layer: LayerKey, latent: int) -> JournalBlock:
        """Where the calls about a latent are journalled."""
        coder_hash = self.external[f"sparse_coders {layer}"]
        return JournalBlock(stage, coder_hash, latent // LATENTS_PER_BLOCK)

    def why_unscored(self, latent: int) -> str:
        """Why a latent has no verdict here."""
        explained = self.ancestors.get("explanations")
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
        return read_dataset(self.store, self.ancestors["token_dataset"])


def walk_score(
    study: Study,
    store: Store,
    layer: str,
    latent: int,
    scorer: str | None,
    manifest: str | None,
    console: Console,
) -> None:
    """Prints the walk of one latent's scores, and how it fires.

    Raises:
        StudyError: If the study has no such layer, latent or scorer, or it was never scored.
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
    with open_journal(store.root) as journal:
        for found in manifests:
            walk = Walk.start(store, found)
            tree = Tree(f"[bold]{found.stage}[/] {escape(str(cell.layer))} latent {latent}")
            cache = walk.ancestors.get("activation_cache")
            if cache is not None and cache.path not in shown:  # the same for most scores
                add_statistics(tree, study, store, cache, walk.dataset(), latent)
                shown.add(cache.path)
            _add_verdicts(tree, walk, journal, cell.layer, latent)
            _add_manifests(tree, walk)
            console.print(tree)


def _add_verdicts(tree: Tree, walk: Walk, journal: Journal, layer: LayerKey, latent: int) -> None:
    verdicts = walk.verdicts(latent)
    if verdicts.is_empty():
        tree.add(walk.why_unscored(latent))
        return
    dataset, neighbours = walk.dataset(), walk.neighbours(latent)
    groups = verdicts.partition_by("explainer", "subject", as_dict=True, maintain_order=True)
    for (explainer, subject), rows in groups.items():
        if explainer is None:
            branch = tree.add("no explanation needed")
        else:
            row = walk.explanation(rows["explanation_of"][0], str(explainer))
            branch = tree.add(
                f"explainer [bold]{escape(str(explainer))}[/], explanation of latent "
                f"{row['latent']} ({subject}): {escape(repr(row['text']))}"
            )
            writing = walk.block("explanations", layer, int(str(row["latent"])))
            _add_call(branch, journal, row["call_id"], writing, "written by")
        judging = walk.block(walk.manifest.stage, layer, latent)
        for verdict in rows.head(SHOWN_WINDOWS).iter_rows(named=True):
            leaf = branch.add(_verdict_line(verdict, dataset, neighbours))
            _add_call(leaf, journal, verdict["call_id"], judging, "judged by")
        if rows.height > SHOWN_WINDOWS:
            branch.add(f"... and {rows.height - SHOWN_WINDOWS} more windows in the table")


def _verdict_line(
    verdict: dict[str, object], dataset: TokenDataset, neighbours: Mapping[int, int]
) -> str:
    window = int(str(verdict["window_id"]))
    context, start = window >> 16, window & 0xFFFF
    document = document_of(dataset, context)
    said = f"judge said {verdict['prediction']}"
    if verdict["explainer"] is None and verdict["prediction"] is not None:
        said = "intruder found" if verdict["prediction"] else "intruder not found"
    if verdict["score"] is not None:
        said = f"score {verdict['score']:.3g}"
    elif verdict["predicted"] is not None:
        predicted = [round(float(x), 1) for x in cast("list[float]", verdict["predicted"])]
        said = f"predicted {predicted}"
    outcome = said if verdict["status"] == "ok" else f"failed: {verdict['reason']}"
    return escape(
        f"window {window} (context {context}, position {start}) of document "
        f"{document['doc_id']!r} (text {document['content_hash']}): "
        f"activating {verdict['is_activating']}{_kind_of(verdict, neighbours)}, {outcome}"
    )


def _kind_of(verdict: dict[str, object], neighbours: Mapping[int, int]) -> str:
    kind = verdict["negative_kind"]
    if kind is None:
        return ""
    neighbour = neighbours.get(int(str(verdict["window_id"]))) if kind == "neighbour" else None
    fires = "" if neighbour is None else f": latent {neighbour} fires here"
    return f" ({kind}{fires})"


def _add_call(tree: Tree, journal: Journal, call_id: object, block: JournalBlock, how: str) -> None:
    if call_id is None:
        return
    entry = journal.find(str(call_id), block)
    branch = tree.add(f"{how} call {call_id}")
    if entry is None:
        branch.add("[yellow]not in the journal any more[/]")
        return
    branch.add(f"model {escape(entry.model)}, {entry.time}")
    branch.add(f"asked: {escape(_asked(entry))}")
    branch.add(f"answered: {escape(repr(entry.reply.text))}")


def _asked(entry: Entry) -> str:
    if entry.prompt is not None:  # what was asked for stands at the end, after worked examples
        end = repr(entry.prompt[-_SHOWN_CHARACTERS:])
        return f"a plain text of {len(entry.prompt)} characters, the end: {end}"
    last = repr(entry.messages[-1].content)
    shown = last if len(last) <= _SHOWN_CHARACTERS else last[:_SHOWN_CHARACTERS] + "..."
    return f"{len(entry.messages)} messages, the last: {shown}"


def _add_manifests(tree: Tree, walk: Walk) -> None:
    branch = tree.add("made from")
    for asset, manifests in {walk.manifest.stage: [walk.manifest], **walk.made_from}.items():
        several = len(manifests) > 1
        what = "ranges" if "/" in manifests[0].cell else "places"
        below = branch.add(f"{asset}: {len(manifests)} {what}") if several else branch
        for manifest in manifests:
            when, run = manifest.provenance.finished, manifest.provenance.run_id
            below.add(f"{manifest.path} version {manifest.stage_version}, run {run}, {when}")
    for name, version in sorted(walk.external.items()):
        branch.add(f"{escape(name)}: hash {version}")
    tokens = walk.ancestors.get("token_dataset")
    for key, value in (tokens.summary.get("corpus", {}) if tokens else {}).items():
        branch.add(f"text: {key} {escape(str(value))}")


def _ancestors(store: Store, manifest: Manifest) -> Iterator[Upstream]:
    seen: set[str] = set()
    todo = list(manifest.upstream)
    while todo:
        upstream = todo.pop(0)
        address = upstream.manifest or f"{upstream.asset} {upstream.cell}"
        if address in seen:
            continue
        seen.add(address)
        yield upstream
        if upstream.manifest is not None:
            todo.extend(store.manifest(upstream.manifest).upstream)


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
