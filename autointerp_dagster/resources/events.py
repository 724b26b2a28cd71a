"""Events with exact versions: what Dagster's staleness and lineage are computed from.

A run over many partitions yields one result; Dagster would stamp all of them with one version. So
each place gets an ``AssetMaterialization`` of its own, the last word on it, with the content hash
as data version and, for every input, the version and event that were read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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

_TOGETHER = 500
"""Partitions that one query asks for."""
_EVENTS_EACH = 2
"""A run writes two per place."""
_LOOKED_BACK = 50
"""Events of a place among which the one of a version that is not the newest is looked for."""

Finished = tuple[Manifest, Mapping[str, dg.MetadataValue]]
"""What a place holds now, and tables and plots for the UI only."""


class _Event(NamedTuple):
    version: str
    """Of the data."""
    storage_id: int


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
    last = _newest(context.instance, stage, key, [partition]).get(partition)
    if last is not None and last.version == version:
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
    last = _newest(instance, stage, key, [partition]).get(partition)
    if last is None or last.version != version:
        instance.report_runless_asset_event(
            dg.AssetObservation(
                key, partition=partition, metadata=shown, tags={_DATA_VERSION: version}
            )
        )


def report_places(
    context: dg.AssetExecutionContext, study: Study, stage: Stage, made: Mapping[Place, Finished]
) -> None:
    """Records the materialization of some places, as their manifests describe them.

    What was cut short carries a code version of its own, so that Dagster calls it stale: a run
    would not take it as it is.
    """
    version = code_version(study, stage)
    inputs = {
        upstream: _Versions.of(context.instance, study, stage, upstream, made)
        for upstream in upstream_of(study, stage)
    }
    for place, (manifest, shown) in made.items():
        tags = {
            _CODE_VERSION: version if manifest.complete else f"{version}.cut_short",
            _DATA_VERSION: manifest.content_hash,
            _USER_PROVIDED: "true",
        }
        if isinstance(place, Cell):
            tags |= {"dagster/partition/layer": str(place.layer)}
            tags |= {"dagster/partition/range": str(place.range)}
        read = {(up.asset, up.cell): up.content_hash for up in manifest.upstream}
        for upstream, versions in inputs.items():
            sources = inputs_at(study, stage, place, upstream)
            tags |= versions.tags({p: read.get((upstream.name, str(p))) for p in sources})
        context.log_event(
            dg.AssetMaterialization(
                asset_key(study, stage),
                partition=partition_key(place),
                metadata={**_metadata(manifest), **shown},
                tags=tags,
            )
        )


@dataclass(frozen=True, slots=True)
class _Versions:
    """What Dagster knows of an input, at every place that some places are made from."""

    instance: dg.DagsterInstance
    stage: Stage
    key: dg.AssetKey
    newest: Mapping[str | None, _Event]
    """By partition."""

    @classmethod
    def of(
        cls,
        instance: dg.DagsterInstance,
        study: Study,
        stage: Stage,
        upstream: Stage,
        places: Iterable[Place],
    ) -> "_Versions":
        """Asks for all places at once: one by one it would be most of a cell's cost."""
        key = asset_key(study, upstream)
        sources = {
            partition_key(source): None
            for place in places
            for source in inputs_at(study, stage, place, upstream)
        }
        newest = _newest(instance, upstream, key, list(sources))
        return cls(instance, upstream, key, newest)

    def tags(self, sources: Mapping[Place, str | None]) -> dict[str, str]:
        """Version and event of some places. For several the newest event covers them all.

        Of places that were replaced after they were read, it is the event of what was read, so that
        what was made of it is stale at once.

        Args:
            sources: The places, each with the version that was read.
        """
        found = {partition_key(place): version for place, version in sources.items()}
        events = [self.newest[key] for key in found if key in self.newest]
        replaced = [
            event
            for key, version in found.items()
            if key in self.newest and self.newest[key].version != version
            for event in self._as_read(key, version)
        ]
        version, pointer = "INITIAL", "NULL"
        if events:
            version, storage_id = max(replaced or events, key=lambda event: event.storage_id)
            pointer = str(storage_id)
        key = self.key.to_user_string()
        return {_INPUT_VERSION + key: version, _INPUT_POINTER + key: pointer}

    def _as_read(self, partition: str | None, version: str | None) -> list[_Event]:
        """The newest event of a version before the newest of all; none if there is none."""
        where = dg.AssetRecordsFilter(
            asset_key=self.key,
            asset_partitions=None if partition is None else [partition],
            before_storage_id=self.newest[partition].storage_id,
        )
        page = _fetched(self.instance, self.stage, where, _LOOKED_BACK)
        return [event for _, event in _events(page) if event.version == version][:1]


def _newest(
    instance: dg.DagsterInstance,
    stage: Stage,
    key: dg.AssetKey,
    partitions: Sequence[str | None],
) -> dict[str | None, _Event]:
    """The newest event of each partition that has one; of all partitions null: the asset's."""
    newest: dict[str | None, _Event] = {}
    for start in range(0, len(partitions), _TOGETHER):
        missing = set(partitions[start : start + _TOGETHER])
        named = sorted(name for name in missing if name is not None)
        where = dg.AssetRecordsFilter(asset_key=key, asset_partitions=named or None)
        cursor: str | None = None
        while missing:
            page = _fetched(instance, stage, where, _EVENTS_EACH * len(missing), cursor)
            for partition, event in _events(page):
                if partition in missing:
                    missing.remove(partition)
                    newest[partition] = event
            cursor = page.cursor
            if not page.has_more:
                break
    return newest


def _fetched(
    instance: dg.DagsterInstance,
    stage: Stage,
    where: dg.AssetRecordsFilter,
    limit: int,
    cursor: str | None = None,
) -> dg.EventRecordsResult:
    """Observations of an external input, materializations of a stage."""
    fetch = instance.fetch_observations if stage.is_external else instance.fetch_materializations
    return fetch(where, limit=limit, cursor=cursor)


def _events(page: dg.EventRecordsResult) -> Iterator[tuple[str | None, _Event]]:
    """By partition, the newest first."""
    for record in page.records:
        event = record.asset_observation or record.asset_materialization
        if event is not None:
            version = (event.tags or {}).get(_DATA_VERSION, "INITIAL")
            yield event.partition, _Event(version, record.storage_id)


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
