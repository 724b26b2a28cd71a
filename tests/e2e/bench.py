"""One study with its store and its Dagster instance, and what a test wants to know of them."""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContextForTest
from planted import answer, write_study

from autointerp_dagster.adapters.llm.fake.rule_judge import ChatMessages
from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer, Fault
from autointerp_dagster.adapters.manifests import Manifest
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.cli.run import Selection, materialize
from autointerp_dagster.definitions import build_definitions
from autointerp_dagster.partitions import partition_key
from autointerp_dagster.resources.events import asset_key
from autointerp_dagster.resources.staleness import OutOfDate, out_of_date
from autointerp_dagster.study import Study, load_study
from autointerp_dagster.study.stages import STAGES, places_of, stages_of

SMALL: dict[str, Any] = {
    "latents": [0, 1, 7, 9],
    "explainers": {"top_tokens": None},
    "metrics": {"n_bootstrap": 100},
}
"""Four latents per layer, of which two have a meaning, by one explainer."""

Name = tuple[str, str]
"""(asset, place)."""


@dataclass
class Script:
    """What the fake server does from now on; tests change it, :meth:`reset` changes it back."""

    answer: Callable[[ChatMessages], str] = answer
    latency_s: Callable[[int], float] = lambda number: 0.0
    fault: Callable[[int], Fault | None] = lambda number: None

    def reset(self) -> None:
        """An ideal model that answers at once."""
        vars(self).update(vars(Script()))

    def server(self) -> FakeLLMServer:
        """A server, not started, that follows this script."""
        return FakeLLMServer(
            lambda messages: self.answer(messages),
            latency_s=lambda number: self.latency_s(number),
            faults=lambda number: self.fault(number),
        )


@dataclass
class Bench:
    """A study file in ``folder``, its store below it, and the instance that runs are kept in."""

    folder: Path
    world: Path
    base_url: str
    instance: dg.DagsterInstance
    overrides: dict[str, Any] = field(default_factory=dict)
    name: str = "planted"

    @property
    def path(self) -> Path:
        """The study file, written anew."""
        return write_study(self.folder, self.world, self.base_url, self.name, **self.overrides)

    @property
    def study(self) -> Study:
        return load_study(self.path)

    @property
    def store(self) -> Store:
        return Store(self.study.store)

    def run(
        self,
        layers: list[str] | None = None,
        ranges: list[str] | None = None,
        until: str | None = None,
    ) -> None:
        """As ``autointerp run`` does."""
        study = self.study
        materialize(study, Selection.of(study, layers, ranges, until), self.instance)

    def run_stale(self, layers: list[str] | None = None) -> None:
        """As ``autointerp run --stale`` does."""
        study, only = self.study, {one.name for one in self.out_of_date()}
        selection = Selection.of(study, layers, None, None)
        materialize(study, selection, self.instance, only=only)

    def heads(self) -> dict[Name, Manifest]:
        """The present manifest of every place that has one."""
        study, store = self.study, self.store
        found = {
            (stage.name, str(place)): store.head(study.name, stage.name, str(place))
            for stage in stages_of(study)
            for place in places_of(study, stage.scope)
        }
        return {name: head for name, head in found.items() if head is not None}

    def contents(self) -> dict[Name, str]:
        """The data version of every place."""
        return {name: head.content_hash for name, head in self.heads().items()}

    def table(self, asset: str, table: str) -> pl.DataFrame:
        """One table of an asset, put together from all places and parts, in order of all columns
        that can be sorted by."""
        store = self.store
        frames = [
            store.table(blob)
            for (name, _), head in self.heads().items()
            if name == asset
            for blob in head.blobs
            if blob.name.split("/")[0] == table
        ]
        frame = pl.concat(frames)
        flat = [name for name, kind in frame.schema.items() if not kind.is_nested()]
        return frame.sort(flat, nulls_last=True)

    def statuses(self) -> dict[Name, str]:
        """What Dagster says of every place: FRESH, STALE or MISSING."""
        study = self.study
        resolver = CachingStaleStatusResolver(
            self.instance,
            build_definitions([study]).resolve_asset_graph(),
            LoadingContextForTest(self.instance),
        )
        return {
            (stage.name, str(place)): resolver.get_status(
                asset_key(study, stage), partition_key(place)
            ).value
            for stage in stages_of(study)
            if not stage.is_external
            for place in places_of(study, stage.scope)
        }

    def stale(self) -> set[Name]:
        """The places that are not FRESH, by Dagster and by `autointerp stale` alike.

        The command knows changed files before they are observed; Dagster does not.
        """
        found = {name for name, status in self.statuses().items() if status != "FRESH"}
        assert {one.name for one in self.out_of_date() if one.is_direct} == found
        return found

    def out_of_date(self) -> list[OutOfDate]:
        """What `autointerp stale` lists."""
        return out_of_date(self.study, self.store)

    def n_events(self) -> dict[str, int]:
        """Materializations that Dagster knows of, by asset."""
        study = self.study
        found = {
            stage.name: self.instance.fetch_materializations(asset_key(study, stage), limit=1000)
            for stage in stages_of(study)
            if not stage.is_external
        }
        return {name: len(result.records) for name, result in found.items()}

    def observe(self, asset: str) -> None:
        """Observes an external asset, as the UI's button does."""
        study = self.study
        job = dg.define_asset_job("observe", [asset_key(study, STAGES[asset])])
        definitions = build_definitions([study])
        whole = dg.Definitions.merge(definitions, dg.Definitions(jobs=[job]))
        quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
        whole.resolve_job_def("observe").execute_in_process(
            run_config=quiet, instance=self.instance
        )

    def copied_to(self, folder: Path, instance: dg.DagsterInstance, **overrides: Any) -> "Bench":
        """Another bench with a copy of the store and the same world."""
        shutil.copytree(self.folder / "store", folder / "store")
        return Bench(
            folder, self.world, self.base_url, instance, {**self.overrides, **overrides}, self.name
        )


def manifest_runs(heads: dict[Name, Manifest], names: Iterable[Name]) -> dict[Name, str]:
    """Which run made the present manifest of each of these places."""
    return {name: heads[name].provenance.run_id for name in names}


def in_flight(n: int) -> dict[str, object]:
    """``models`` with this many requests under way at once."""
    return {"explainer": {"max_in_flight": n}, "judge": {"max_in_flight": n}}
