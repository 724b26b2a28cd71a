"""The walk below an event as Dagster's own records have it: tags, event ids, partition mappings."""

from dataclasses import dataclass, field

import dagster as dg
from bench import Bench, Name

from autointerp_dagster.definitions import build_definitions
from autointerp_dagster.study.stages import STAGES

POINTER = "dagster/input_event_pointer/"
INPUT_VERSION = "dagster/input_data_version/"


@dataclass(frozen=True, slots=True)
class Event:
    """A materialization, or an observation of an external asset."""

    key: dg.AssetKey
    partition: str | None
    version: str
    storage_id: int
    tags: dict[str, str]

    @property
    def name(self) -> Name:
        """As the store names the place."""
        return self.key.path[-1], (self.partition or "all").replace("|", "/")


@dataclass
class DagsterWalk:
    """Events of a bench's study, from one to those it was made from."""

    bench: Bench
    _below: dict[int, dict[Name, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph = build_definitions([self.bench.study]).resolve_asset_graph()

    def newest(
        self, key: dg.AssetKey, partition: str | None, up_to: int | None = None
    ) -> Event | None:
        """The newest event of a partition, not after an event id."""
        where = dg.AssetRecordsFilter(
            asset_key=key,
            asset_partitions=None if partition is None else [partition],
            before_storage_id=None if up_to is None else up_to + 1,
        )
        instance = self.bench.instance
        if STAGES[key.path[-1]].is_external:
            records = instance.fetch_observations(where, limit=1).records
            events = [record.asset_observation for record in records]
        else:
            records = instance.fetch_materializations(where, limit=1).records
            events = [record.asset_materialization for record in records]
        for record, event in zip(records, events, strict=True):
            tags = dict((event and event.tags) or {})
            version = tags["dagster/data_version"]
            return Event(key, partition, version, record.storage_id, tags)
        return None

    def inputs(self, event: Event) -> list[Event]:
        """What an event was made from: of every mapped partition what was newest then."""
        found = []
        for tag, pointer in event.tags.items():
            if tag.startswith(POINTER):
                key = dg.AssetKey.from_user_string(tag.removeprefix(POINTER))
                events = [self.newest(key, p, int(pointer)) for p in self._mapped(event, key)]
                assert all(events), (event.name, key)
                found += [one for one in events if one is not None]
        return found

    def below(self, event: Event) -> dict[Name, str]:
        """Data versions of all that an event rests on, by asset and place."""
        if event.storage_id not in self._below:
            found: dict[Name, str] = {}
            for one in self.inputs(event):
                found |= {one.name: one.version} | self.below(one)
            self._below[event.storage_id] = found
        return self._below[event.storage_id]

    def _mapped(self, event: Event, upstream: dg.AssetKey) -> list[str | None]:
        mine, above = (self.graph.get(key).partitions_def for key in (event.key, upstream))
        if above is None:
            return [None]
        if mine is None:
            return list(above.get_partition_keys())
        mapping = self.graph.get_partition_mapping(event.key, parent_asset_key=upstream)
        result = mapping.get_upstream_mapped_partitions_result_for_partitions(
            mine.subset_with_partition_keys([str(event.partition)]), mine, above
        )
        return sorted(result.partitions_subset.get_partition_keys())
