"""Events with exact versions: what Dagster's staleness and lineage are computed from.

A run over many partitions yields one result; Dagster would stamp all of them with one version. So
each place gets an ``AssetMaterialization`` of its own, the last word on it, with the content hash
as data version and, for every input, the version and event that were current.
"""

from collections.abc import Callable, Mapping
from typing import Any

import dagster as dg

from autointerp_dagster.adapters.manifests import Manifest
from autointerp_dagster.core.types import Cell, Place
from autointerp_dagster.partitions import code_version, partition_key
from autointerp_dagster.study import Study
from autointerp_dagster.study.stages import Stage, inputs_at, upstream_of

_CODE_VERSION = "dagster/code_version"
_DATA_VERSION = "dagster/data_version"
_USER_PROVIDED = "dagster/data_version_is_user_provided"
_INPUT_VERSION = "dagster/input_data_version/"
_INPUT_POINTER = "dagster/input_event_pointer/"

About = Mapping[str, Callable[[], Mapping[str, Any]]]
"""By external input: what is shown of it beside its version, for people."""


def asset_key(study: Study, stage: Stage) -> dg.AssetKey:
    """The key of a stage's asset in a study."""
    return dg.AssetKey([study.name, stage.name])


def observe(
    context: dg.AssetExecutionContext,
    study: Study,
    stage: Stage,
    place: Place,
    version: str,
    about: About,
) -> None:
    """Records the version of an external input, unless it is the one recorded last."""
    key, partition = asset_key(study, stage), partition_key(place)
    last = _latest(context.instance, stage, key, partition)
    if last is not None and last[0] == version:
        return
    shown = about[stage.name]() if stage.name in about else {}
    context.log_event(
        dg.AssetObservation(key, partition=partition, tags={_DATA_VERSION: version}, metadata=shown)
    )


def observe_outside_runs(
    instance: dg.DagsterInstance,
    study: Study,
    stage: Stage,
    place: Place,
    version: str,
    shown: Mapping[str, dg.MetadataValue],
) -> None:
    """As :func:`observe`, where nothing is run: what is made of another version becomes stale."""
    key, partition = asset_key(study, stage), partition_key(place)
    last = _latest(instance, stage, key, partition)
    if last is None or last[0] != version:
        instance.report_runless_asset_event(
            dg.AssetObservation(
                key, partition=partition, metadata=shown, tags={_DATA_VERSION: version}
            )
        )


def report_place(
    context: dg.AssetExecutionContext,
    study: Study,
    stage: Stage,
    place: Place,
    manifest: Manifest,
    shown: Mapping[str, dg.MetadataValue],
) -> None:
    """Records the materialization of one place, as its manifest describes it.

    What was cut short carries a code version of its own, so that Dagster calls it stale: a run
    would not take it as it is.
    """
    version = code_version(study, stage)
    tags = {
        _CODE_VERSION: version if manifest.complete else f"{version}.cut_short",
        _DATA_VERSION: manifest.content_hash,
        _USER_PROVIDED: "true",
    }
    if isinstance(place, Cell):
        tags |= {"dagster/partition/layer": str(place.layer)}
        tags |= {"dagster/partition/range": str(place.range)}
    for upstream in upstream_of(study, stage):
        tags |= _input_tags(context.instance, study, stage, upstream, place)
    context.log_event(
        dg.AssetMaterialization(
            asset_key(study, stage),
            partition=partition_key(place),
            metadata={**_metadata(manifest), **shown},
            tags=tags,
        )
    )


def _input_tags(
    instance: dg.DagsterInstance, study: Study, stage: Stage, upstream: Stage, place: Place
) -> dict[str, str]:
    """Version and event of an input. For several partitions the newest event covers them all."""
    key = asset_key(study, upstream)
    records = [
        _latest(instance, upstream, key, partition_key(source))
        for source in inputs_at(study, stage, place, upstream)
    ]
    found = [record for record in records if record is not None]
    if not found:
        return {_INPUT_VERSION + key.to_user_string(): "INITIAL"} | {
            _INPUT_POINTER + key.to_user_string(): "NULL"
        }
    version, pointer = max(found, key=lambda record: record[1])
    return {
        _INPUT_VERSION + key.to_user_string(): version,
        _INPUT_POINTER + key.to_user_string(): str(pointer),
    }


def _latest(
    instance: dg.DagsterInstance, stage: Stage, key: dg.AssetKey, partition: str | None
) -> tuple[str, int] | None:
    """Data version and storage id of the newest event of one place."""
    where = dg.AssetRecordsFilter(
        asset_key=key, asset_partitions=None if partition is None else [partition]
    )
    if stage.is_external:
        records = instance.fetch_observations(where, limit=1).records
        event = records[0].asset_observation if records else None
    else:
        records = instance.fetch_materializations(where, limit=1).records
        event = records[0].asset_materialization if records else None
    if event is None:
        return None
    return (event.tags or {}).get(_DATA_VERSION, "INITIAL"), records[0].storage_id


def _metadata(manifest: Manifest) -> dict[str, dg.MetadataValue]:
    """A manifest's summary in the UI's terms, and where the result lies."""
    metadata: dict[str, dg.MetadataValue] = {}
    for name, value in manifest.summary.items():
        if isinstance(value, bool):
            metadata[name] = dg.MetadataValue.bool(value)
        elif isinstance(value, int):
            metadata[name] = dg.MetadataValue.int(value)
        elif isinstance(value, float):
            metadata[name] = dg.MetadataValue.float(value)
        elif isinstance(value, str):
            metadata[name] = dg.MetadataValue.text(value)
        else:
            metadata[name] = dg.MetadataValue.json(value)
    rows = sum(blob.n_rows or 0 for blob in manifest.blobs)
    usage = {
        name: dg.MetadataValue.float(float(value))
        for name, value in manifest.provenance.usage.items()
    }
    return {
        **metadata,
        **usage,
        "dagster/row_count": dg.MetadataValue.int(rows),
        "n_bytes": dg.MetadataValue.int(sum(blob.n_bytes for blob in manifest.blobs)),
        "seconds": dg.MetadataValue.float(manifest.provenance.seconds),
        "complete": dg.MetadataValue.bool(manifest.complete),
        "manifest": dg.MetadataValue.text(manifest.path or ""),
    }
