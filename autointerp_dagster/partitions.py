"""The partition grid, layer x range, in Dagster's terms.

Keys are built with ``MultiPartitionKey``, never by string: Dagster sorts dimensions by name.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg

from autointerp_dagster.adapters.hashing import json_hash
from autointerp_dagster.core.types import Cell, LatentRange, LayerKey, Place, WholeStudy
from autointerp_dagster.study import Study
from autointerp_dagster.study.checking import CHECKS, checks_of
from autointerp_dagster.study.parameters import models_asked, parameters_of
from autointerp_dagster.study.stages import STAGES, Scope, Stage, upstream_of


def partitions_of(study: Study, scope: Scope) -> dg.PartitionsDefinition | None:
    """The partitions of an asset of this scope; those of layers to be discovered grow."""
    if scope == "study":
        return None
    layers: dg.PartitionsDefinition
    if study.discovers:
        layers = dg.DynamicPartitionsDefinition(name=layers_name(study))
    else:
        layers = dg.StaticPartitionsDefinition([str(layer) for layer in study.layer_keys])
    if scope == "layer":
        return layers
    ranges = dg.StaticPartitionsDefinition([str(block) for block in study.ranges])
    return dg.MultiPartitionsDefinition({"layer": layers, "range": ranges})


def layers_name(study: Study) -> str:
    """Under which Dagster keeps the layers that a study discovers; one name for all of it."""
    return f"{study.name}_layers"


def partition_key(place: Place) -> str | None:
    """The key of a place; null for an asset without partitions."""
    if isinstance(place, Cell):
        return dg.MultiPartitionKey({"layer": str(place.layer), "range": str(place.range)})
    return None if isinstance(place, WholeStudy) else str(place)


def place_of(key: str | None) -> Place:
    """The place that a partition key names."""
    if key is None:
        return WholeStudy()
    if isinstance(key, dg.MultiPartitionKey):
        by_dimension = key.keys_by_dimension
        return Cell(LayerKey.parse(by_dimension["layer"]), LatentRange.parse(by_dimension["range"]))
    return LayerKey.parse(key)


def code_version(study: Study, stage: Stage) -> str:
    """The stage's version and a hash of the study's parameters for it.

    An edited parameter, prompt or model name makes the stage's cells stale in Dagster; how fast a
    model is asked does not.
    """
    decides = {**parameters_of(study, stage.name), "models": models_asked(study, stage.name)}
    return f"{stage.version}.{json_hash(decides)[:8]}"


def stage_asset(study: Study, name: str) -> Callable[[Callable[..., Any]], dg.AssetsDefinition]:
    """``dg.asset`` for a stage of a study: key, group, partitions, inputs, limits."""
    stage = STAGES[name]
    with _known_betas():
        deps = [_dependency(study, stage, upstream) for upstream in upstream_of(study, stage)]
    options = _options(study, stage) | {
        "code_version": code_version(study, stage),
        "deps": deps,
        "backfill_policy": dg.BackfillPolicy.single_run() if stage.scope != "study" else None,
        "pool": stage.pool,
        "check_specs": [
            dg.AssetCheckSpec(
                check,
                asset=dg.AssetKey([study.name, stage.name]),
                description=CHECKS[check],
                blocking=True,
            )
            for check in checks_of(study, stage)
        ],
        "automation_condition": dg.AutomationCondition.eager() if stage.follows else None,
    }
    with _known_betas():
        return dg.asset(**options)


def observed_asset(study: Study, name: str) -> Callable[[Callable[..., Any]], dg.AssetsDefinition]:
    """``dg.observable_source_asset`` for an external input of a study."""
    with _known_betas():
        observed: Any = dg.observable_source_asset(**_options(study, STAGES[name]))
    return observed


@contextmanager
def _known_betas() -> Iterator[None]:
    """No warning about the beta parts of Dagster in use here; dagster is pinned below 1.14."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        yield


def _options(study: Study, stage: Stage) -> dict[str, Any]:
    return {
        "name": stage.name,
        "key_prefix": study.name,
        "group_name": study.name,
        "description": stage.description,
        "tags": {f"dagster/kind/{kind}": "" for kind in stage.kinds},
        "partitions_def": partitions_of(study, stage.scope),
    }


def _dependency(study: Study, stage: Stage, upstream: Stage) -> dg.AssetDep:
    mapping: dg.PartitionMapping | None = None
    if {stage.scope, upstream.scope} == {"cell", "layer"}:
        mapping = dg.MultiToSingleDimensionPartitionMapping("layer")
    elif upstream.name in stage.spans:
        each, every = dg.IdentityPartitionMapping(), dg.AllPartitionMapping()
        mapping = dg.MultiPartitionMapping(
            {
                "layer": dg.DimensionPartitionMapping("layer", each),
                "range": dg.DimensionPartitionMapping("range", every),
            }
        )
    return dg.AssetDep(dg.AssetKey([study.name, upstream.name]), partition_mapping=mapping)
