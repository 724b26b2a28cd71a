"""Materializing a study in this process: one run for the cells, then layers, then the study."""

import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import dagster as dg
from rich.console import Console
from rich.table import Table

from autointerp_dagster.adapters.found_layers import FoundLayers
from autointerp_dagster.adapters.heads import Name, read_heads
from autointerp_dagster.adapters.llm import SpendFile
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.errors import AutoInterpError, StudyError
from autointerp_dagster.core.types import Cell, LatentRange, LayerKey, Place, WholeStudy
from autointerp_dagster.definitions import build_resources, build_study
from autointerp_dagster.partitions import partition_key
from autointerp_dagster.resources.events import asset_key
from autointerp_dagster.resources.llms import BUDGET_TAG, LLMs
from autointerp_dagster.resources.pending import stages_that_ask
from autointerp_dagster.resources.pools import PROCESS_TAG, this_process, watched_pools
from autointerp_dagster.resources.preflight import REPLAY_TAG, check_study
from autointerp_dagster.resources.progress import ProgressDisplay
from autointerp_dagster.resources.registering import register
from autointerp_dagster.resources.store import StoreResource
from autointerp_dagster.study import Study
from autointerp_dagster.study.stages import Stage, places_of, stages_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Selection:
    """What of a study is to be materialized."""

    cells: tuple[Cell, ...]
    stages: tuple[Stage, ...]
    """Without the external ones, in the order of the data."""

    @classmethod
    def of(
        cls, study: Study, layers: list[str] | None, ranges: list[str] | None, until: str | None
    ) -> "Selection":
        """The selection that the options of a command name.

        Raises:
            StudyError: If one names a layer, range or stage that the study does not have.
        """
        if not study.layer_keys:
            raise StudyError(
                f"study {study.name}: no layer is registered yet. Switch on its sensor "
                f"{study.name}_new_coders in the UI, or look by hand: `autointerp discover "
                f"{study.name}`."
            )
        known_layers = [str(layer) for layer in study.layer_keys]
        known_ranges = [str(block) for block in study.ranges]
        made = [stage for stage in stages_of(study) if not stage.is_external]
        names = [stage.name for stage in made]
        for given, known, what in (
            (layers or [], known_layers, "layer"),
            (ranges or [], known_ranges, "range"),
            ([until] if until else [], names, "stage"),
        ):
            for name in given:
                if name not in known:
                    raise StudyError(f"study {study.name}: no {what} {name!r}. It has: {known}.")
        cells = tuple(
            cell
            for cell in study.cells
            if str(cell.layer) in (layers or known_layers)
            and str(cell.range) in (ranges or known_ranges)
        )
        last = names.index(until) if until else len(names) - 1
        return cls(cells, tuple(made[: last + 1]))

    def layers(self, study: Study) -> list[LayerKey]:
        """The layers of its cells, in the study's order."""
        mine = {cell.layer for cell in self.cells}
        return [layer for layer in study.layer_keys if layer in mine]

    def spans_ranges(self, study: Study) -> bool:
        """Whether every range of the study is in it, so that whole layers can be made."""
        return {cell.range for cell in self.cells} == set(study.ranges)

    def is_whole(self, study: Study) -> bool:
        """Whether nothing of the study is left out."""
        made = [stage for stage in stages_of(study) if not stage.is_external]
        return len(self.cells) == len(study.cells) and len(self.stages) == len(made)


def materialize(
    study: Study,
    selection: Selection,
    instance: dg.DagsterInstance,
    mode: Literal["record", "replay"] = "record",
    only: Collection[Name] | None = None,
) -> str:
    """Materializes a selection in this process.

    Args:
        study: The study.
        selection: What of it.
        instance: Where the runs are kept.
        mode: In ``replay`` language models are not asked: the journal answers, or nobody does.
        only: Names of the places that may be looked at at all; null: all of the selection.

    Returns:
        Under which name its spending is counted.

    Raises:
        AutoInterpError: What went wrong in a stage, as the stage said it.
    """
    if study.discovers:  # a run takes neighbours in Dagster's order
        records = FoundLayers(StoreResource().of(study), study.name)
        study = register(instance, study, records)
    asking = set(stages_that_ask(study)) if mode == "replay" else set()
    runs = list(_chosen_runs(study, selection, only))
    names = {stage.name for stages, _ in runs for stage in stages}
    if names:
        chosen = {cell.layer for cell in selection.cells} if study.discovers else None
        check_study(study, names - asking, chosen)
    budget = str(uuid.uuid4())
    with watched_pools(instance):
        for stages, places in runs:
            _run(study, stages, places, budget, instance=instance, mode=mode)
    return budget


def _chosen_runs(
    study: Study, selection: Selection, only: Collection[Name] | None
) -> Iterator[tuple[list[Stage], list[Place]]]:
    return _runs(study, selection) if only is None else _runs_over(study, selection, only)


def _runs_over(
    study: Study, selection: Selection, only: Collection[Name]
) -> Iterator[tuple[list[Stage], list[Place]]]:
    """The Dagster runs over some places of a selection, an input before what is made from it.

    A run takes a rectangle of cells and the same stages for all of them. A stage that reads every
    range of a layer begins new runs, so that the ranges are there.
    """
    wholes = [stage for stage in selection.stages if (stage.name, str(WholeStudy())) in only]
    yield [stage for stage in wholes if not stage.follows], []
    yield from _cell_runs_over(study, selection, only)
    for stage in selection.stages if selection.spans_ranges(study) else ():
        if stage.scope == "layer":
            layers = selection.layers(study)
            due = [layer for layer in layers if (stage.name, str(layer)) in only]
            for block in _blocks(due, study.layer_keys):
                yield [stage], list(block)
    if selection.is_whole(study):
        yield [stage for stage in wholes if stage.follows], []


def _cell_runs_over(
    study: Study, selection: Selection, only: Collection[Name]
) -> Iterator[tuple[list[Stage], list[Place]]]:
    phases: list[list[Stage]] = [[]]
    for stage in selection.stages:
        if stage.scope == "cell":
            phases += [[]] if stage.spans else []
            phases[-1].append(stage)
    for phase in phases:
        groups: dict[tuple[Stage, ...], list[Cell]] = {}
        for cell in selection.cells:
            stages = tuple(stage for stage in phase if (stage.name, str(cell)) in only)
            groups.setdefault(stages, []).append(cell)
        for stages, cells in groups.items():
            for rectangle in _rectangles(study, cells):
                yield list(stages), list(rectangle)


def _runs(study: Study, selection: Selection) -> Iterator[tuple[list[Stage], list[Place]]]:
    """The Dagster runs that materialize a selection: the cells, then layers, then the study."""
    by_scope = {
        scope: [stage for stage in selection.stages if stage.scope == scope]
        for scope in ("study", "cell", "layer")
    }
    first = [stage for stage in by_scope["study"] if not stage.follows]
    for corner_cells in _rectangles(study, selection.cells):
        yield [*first, *by_scope["cell"]], list(corner_cells)
        first = []
    if by_scope["layer"] and selection.spans_ranges(study):
        for block in _blocks(selection.layers(study), study.layer_keys):
            yield by_scope["layer"], list(block)
    if selection.is_whole(study):
        yield [stage for stage in by_scope["study"] if stage.follows], []


def print_outcome(
    study: Study, selection: Selection, store: Store, budget: str, console: Console
) -> None:
    """Prints what a command left undone and what it paid; nothing if there is nothing to say."""
    known = read_heads(store, study.name).manifests
    for stage in selection.stages:
        if stage.scope != "cell":
            continue
        heads = [known.get((stage.name, str(cell))) for cell in selection.cells]
        n_cut = sum(head is not None and not head.complete for head in heads)
        if n_cut:
            console.print(
                f"Cut short: {n_cut} of {len(heads)} cells of {stage.name}. The next run goes on."
            )
    run, everything = SpendFile(store.root, study.name, budget).read_others()
    if run.tokens:
        console.print(
            f"Paid: {run.usd:.2f} USD, {run.tokens:,} tokens "
            f"(all runs of the study: {everything.usd:.2f} USD, {everything.tokens:,} tokens)."
        )


def print_dry_run(
    study: Study, selection: Selection, console: Console, only: Collection[Name] | None = None
) -> None:
    """Prints what a run would look at, and what of it the store already holds."""
    store = StoreResource().of(study)
    table = Table(
        "stage", "places", "made before (maybe out of date)", title=f"{study.name}: dry run"
    )
    looked_at: dict[str, list[Place]] = {}
    for stages, places in _chosen_runs(study, selection, only):
        for stage in stages:
            at = list(places) if stage.scope != "study" else list(places_of(study, "study"))
            looked_at.setdefault(stage.name, []).extend(at)
    known = read_heads(store, study.name).manifests
    for name, places in looked_at.items():
        heads = [known.get((name, str(place))) for place in places]
        made = sum(head is not None and head.complete for head in heads)
        table.add_row(name, str(len(places)), str(made))
    console.print(table)
    console.print("A run checks what was made before against its inputs and redoes what changed.")


def _run(
    study: Study,
    stages: list[Stage],
    places: Sequence[Place],
    budget: str,
    *,
    instance: dg.DagsterInstance,
    mode: Literal["record", "replay"],
) -> None:
    """One Dagster run over a rectangle of places (its corners are the first and the last)."""
    if not stages:
        return
    tags = {BUDGET_TAG: budget, PROCESS_TAG: this_process()}
    tags |= {REPLAY_TAG: "true"} if mode == "replay" else {}
    if places:
        tags["dagster/asset_partition_range_start"] = str(partition_key(places[0]))
        tags["dagster/asset_partition_range_end"] = str(partition_key(places[-1]))
    resources = build_resources() | {"progress": ProgressDisplay(style="bar")}
    if mode == "replay":
        resources["llms"] = LLMs(mode="replay")
    try:
        dg.materialize(
            build_study(study),
            selection=[asset_key(study, stage) for stage in stages],
            instance=instance,
            resources=resources,
            tags=tags,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )
    except dg.DagsterError as error:
        if isinstance(error.__cause__, AutoInterpError):
            raise error.__cause__ from None
        raise


def _rectangles(study: Study, cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells as rectangles of neighbouring layers and ranges: a run takes one of them."""
    ranges_of: dict[LayerKey, set[LatentRange]] = {}
    for cell in cells:
        ranges_of.setdefault(cell.layer, set()).add(cell.range)
    layers_of: dict[frozenset[LatentRange], list[LayerKey]] = {}
    for layer in study.layer_keys:
        if layer in ranges_of:
            layers_of.setdefault(frozenset(ranges_of[layer]), []).append(layer)
    return [
        [Cell(layer, r) for layer in rows for r in block]
        for chosen, layers in layers_of.items()
        for rows in _blocks(layers, study.layer_keys)
        for block in _blocks([r for r in study.ranges if r in chosen], study.ranges)
    ]


def _blocks(chosen: list[T], order: Sequence[T]) -> list[list[T]]:
    """What of an order is chosen, as stretches without a gap."""
    blocks: list[list[T]] = []
    for item in chosen:
        follows = blocks and order.index(item) == order.index(blocks[-1][-1]) + 1
        if follows:
            blocks[-1].append(item)
        else:
            blocks.append([item])
    return blocks
