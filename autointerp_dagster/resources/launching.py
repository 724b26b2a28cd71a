"""Which runs a study's new layers want: one for each, over all of its ranges."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import dagster as dg

from autointerp_dagster.adapters.found_layers import FoundLayer, FoundLayers
from autointerp_dagster.adapters.heads import read_heads
from autointerp_dagster.adapters.manifests import Manifest
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.types import Cell, LayerKey
from autointerp_dagster.partitions import partition_key
from autointerp_dagster.resources.events import asset_key
from autointerp_dagster.study import Study
from autointerp_dagster.study.stages import Stage, stages_of

STUDY_TAG, LAYERS_TAG = "autointerp/discovering", "autointerp/new_layers"
"""Of a run that a sensor or schedule asked for: the study, and the layers that were new then."""

_LAST = "latent_metrics"
"""The last stage of such a run; what follows it follows by itself."""

_made: set[tuple[str, str, str]] = set()
"""Store, study and finding of layers that this process saw made, by whomever: not looked up again.
"""


@dataclass(frozen=True, slots=True)
class Night:
    """One night's launches: they share a budget, and go on with what another night's cut short."""

    name: str
    """Different each night."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Of every run."""


def stages_of_new_layers(study: Study) -> list[Stage]:
    """The stages of a run over new layers: all that is made and does not follow by itself."""
    return [stage for stage in stages_of(study) if not (stage.is_external or stage.follows)]


def wanted_runs(
    instance: dg.DagsterInstance,
    study: Study,
    store: Store,
    records: FoundLayers,
    night: Night | None = None,
) -> list[tuple[dg.RunRequest, list[str]]]:
    """A run for each rectangle of a new layer (and its baselines) and all ranges, with its layers.

    New is what has no results yet and was in no run that was asked for before, failed ones
    included: what failed is run again by hand. By night, layers that a budget cut short are wanted
    as well. What another look is just asking a run for is not wanted: Dagster looks for a run of
    that key and then makes one, and two daemons, or sensor and schedule, may both find none.

    Args:
        instance: Where the runs are.
        study: With its layers in the order that Dagster has.
        store: Where results are.
        records: What was found.
        night: Null: it is not for a night.

    Raises:
        StoreError: If the store cannot be read or written.
    """
    found = {one.key: one for one in records.layers()}
    runs = _runs(instance, study)
    asked = {one for run in runs for one in _layers_of(run)}
    under_way = {one for run in runs if not run.is_finished for one in _layers_of(run)}
    seen = {layer: (str(store.root), study.name, _finding(found[layer])) for layer in found}
    open_ = [layer for layer in study.layer_keys if _finding(found[layer]) not in under_way]
    new = [k for k in open_ if _finding(found[k]) not in asked and seen[k] not in _made]
    wanted: list[LayerKey] = []
    if new or night is not None:
        heads = read_heads(store, study.name).manifests
        last = {layer: _last_heads(study, layer, heads) for layer in open_}
        _made.update(seen[layer] for layer in new if None not in last[layer])
        wanted = [
            k for k in open_ if (k in new and None in last[k]) or (night and _is_cut(last[k]))
        ]
    if wanted:
        again = "" if night is None else f" {night.name}"
        names = {k: _finding(found[k]) + ("" if k in new else again) for k in wanted}
        mine = records.claim_launches(names.values())
        since = _asked_since(instance, study, runs)
        wanted = [k for k in wanted if names[k] in mine and _finding(found[k]) not in since]
    return [_request(study, found, k, night) for k in _rectangles(study, found, wanted)]


def _request(
    study: Study,
    found: Mapping[LayerKey, FoundLayer],
    layers: Sequence[LayerKey],
    night: Night | None,
) -> tuple[dg.RunRequest, list[str]]:
    first, last = Cell(layers[0], study.ranges[0]), Cell(layers[-1], study.ranges[-1])
    findings = ",".join(_finding(found[layer]) for layer in layers)
    request = dg.RunRequest(
        run_key=":".join([study.name, findings, *([night.name] if night else [])]),
        asset_selection=[asset_key(study, stage) for stage in stages_of_new_layers(study)],
        tags={
            "dagster/asset_partition_range_start": str(partition_key(first)),
            "dagster/asset_partition_range_end": str(partition_key(last)),
            STUDY_TAG: study.name,
            LAYERS_TAG: findings,
            **(night.tags if night else {}),
        },
    )
    return request, [str(layer) for layer in layers]


def _runs(instance: dg.DagsterInstance, study: Study) -> Sequence[dg.DagsterRun]:
    return instance.get_runs(filters=dg.RunsFilter(tags={STUDY_TAG: study.name}))


def _asked_since(
    instance: dg.DagsterInstance, study: Study, before: Sequence[dg.DagsterRun]
) -> set[str]:
    """Findings with a run that another look asked for since."""
    known = {run.run_id for run in before}
    later = (run for run in _runs(instance, study) if run.run_id not in known)
    return {one for run in later for one in _layers_of(run)}


def _layers_of(run: dg.DagsterRun) -> list[str]:
    return run.tags.get(LAYERS_TAG, "").split(",")


def _finding(found: FoundLayer) -> str:
    """Names one finding of a layer: one that was forgotten and is found again is new again."""
    return f"{found.layer}/{found.found}"


def _last_heads(
    study: Study, layer: LayerKey, heads: Mapping[tuple[str, str], Manifest]
) -> list[Manifest | None]:
    return [heads.get((_LAST, str(Cell(layer, block)))) for block in study.ranges]


def _is_cut(heads: Sequence[Manifest | None]) -> bool:
    return any(head is not None and not head.complete for head in heads)


def _rectangles(
    study: Study, found: Mapping[LayerKey, FoundLayer], wanted: Sequence[LayerKey]
) -> Iterator[list[LayerKey]]:
    """Layers that stand side by side, a coder from files with the baselines after it."""
    order = list(study.layer_keys)
    block: list[LayerKey] = []
    for layer in wanted:
        is_baseline = found[layer].identity is None
        if block and not (is_baseline and order.index(layer) == order.index(block[-1]) + 1):
            yield block
            block = []
        block.append(layer)
    if block:
        yield block
