"""A study whose assets compute next to nothing: real Dagster, real store, real events."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContextForTest

from autointerp_dagster.adapters.manifests import Manifest
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.errors import AutoInterpError
from autointerp_dagster.core.schemas import Table
from autointerp_dagster.core.types import Cell, LayerKey, Place, WholeStudy
from autointerp_dagster.definitions import build_definitions
from autointerp_dagster.partitions import partition_key, stage_asset
from autointerp_dagster.resources.events import asset_key
from autointerp_dagster.resources.store import OUTSIDE_CODER, Commit, StageRun, StoreResource
from autointerp_dagster.study import Study
from autointerp_dagster.study.stages import STAGES, places_of, stages_of

LINES = Table("lines", {"line": pl.String}, ("line",))
WIDTH = 20
"""Latents of every toy coder; the study's grid covers more."""

Name = tuple[str, str]
"""(asset, place)."""


class BrokenError(Exception):
    """What a place in ``Toy.broken`` raises."""


@dataclass
class Toy:
    """A study of two layers and three ranges, of which the last lies outside of the coders.

    Change its attributes between runs; every run builds the assets anew.
    """

    root: Path
    instance: dg.DagsterInstance
    name: str = "toy"
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Identities of the models that each stage asks: a part of what decides its result."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the external inputs, by asset or by asset and place."""
    contents: dict[Name, str] = field(default_factory=dict)
    """What a place holds, other than its own name."""
    broken: set[Name] = field(default_factory=set)
    cut_short: set[Name] = field(default_factory=set)
    """Places that are committed as not complete."""
    computed: list[Name] = field(default_factory=list)
    """In order, over all runs."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the study's file; ``models`` is merged with what is there."""
    commit_of: Callable[[StageRun, Place], Commit] | None = None
    """What is committed instead of one line, if given."""

    @property
    def content(self) -> dict[str, Any]:
        """Of the study's file."""
        models = {"subject": {"source": "none"}, "explainer": {"source": "none"}}
        return {
            "corpus": {"kind": "embedded"},
            "coders": {"sae": {"path": "none"}},
            "layers": ["h.0", "h.1"],
            "max_num_latents": 30,
            "range_size": 10,
            "explainers": {"default": {"kind": "default"}},
            "floors": {"donor_block": 10},
            **self.changes,
            "models": {**models, **self.changes.get("models", {})},
        }

    @property
    def study(self) -> Study:
        return Study.model_validate({"name": self.name, **self.content})

    @property
    def store(self) -> Store:
        return Store(self.root)

    def run(self, *names: str, cells: slice | None = None, layer: int | None = None) -> str:
        """One run of some stages over the grid, or over some cells or one layer of it.

        Returns:
            The run's id.
        """
        study = self.study
        tags = {}
        if any(STAGES[name].scope == "cell" for name in names):
            chosen = study.cells if cells is None else study.cells[cells]
            tags = range_tags(chosen[0], chosen[-1])
        elif layer is not None:
            tags = range_tags(study.layer_keys[layer], study.layer_keys[layer])
        try:
            result = dg.materialize(
                [self.asset(name) for name in names],
                instance=self.instance,
                resources={"store": StoreResource(root=str(self.root))},
                tags=tags,
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            )
        except dg.DagsterError as error:
            if isinstance(error.__cause__, AutoInterpError | BrokenError):
                raise error.__cause__ from None
            raise
        return result.run_id

    def run_all(self) -> None:
        """The whole study, in as many runs as Dagster needs."""
        cells = [s.name for s in stages_of(self.study) if s.scope == "cell"]
        self.run("token_dataset", *cells)
        for layer in range(len(self.study.layer_keys)):
            self.run("layer_metrics", layer=layer)
        self.run("study_metrics")

    def asset(self, name: str) -> dg.AssetsDefinition:
        study = self.study

        @stage_asset(study, name)
        def asset(
            context: dg.AssetExecutionContext, store: StoreResource
        ) -> Iterator[dg.MaterializeResult]:
            models, external = self.models.get(name), self._external()
            with store.stage(context, study, name, models=models, external=external) as stage:
                for place in stage.pending():
                    stage.commit(place, self._made(stage, name, place))
                yield from stage.report()

        return asset

    def _external(self) -> dict[str, Callable[[Place], str]]:
        def version(asset: str, place: Place) -> str:
            fallback = f"{asset} {place} as it was"
            return self.versions.get(f"{asset} {place}", self.versions.get(asset, fallback))

        names = [stage.name for stage in stages_of(self.study) if stage.is_external]
        return {name: lambda place, name=name: version(name, place) for name in names}

    def _made(self, stage: StageRun, name: str, place: Place) -> Commit:
        if (name, str(place)) in self.broken:
            raise BrokenError(f"{name} {place}")
        self.computed.append((name, str(place)))
        if isinstance(place, Cell) and place.range.start >= WIDTH:
            return Commit([], {}, status=OUTSIDE_CODER)
        if self.commit_of is not None:
            return self.commit_of(stage, place)
        line = self.contents.get((name, str(place)), f"{name} {place}")
        complete = (name, str(place)) not in self.cut_short
        return Commit([stage.store.put_table(LINES, lines(line))], {"n_lines": 1}, complete)

    def head(self, name: str, place: Place) -> Manifest:
        found = self.store.head(self.name, name, str(place))
        assert found is not None, (name, place)
        return found

    def has_head(self, name: str, place: Place) -> bool:
        return self.store.head(self.name, name, str(place)) is not None

    def events(self, name: str, place: Place) -> list[dg.EventLogRecord]:
        """Materializations (or observations of an external asset), the newest first."""
        stage, partition = STAGES[name], partition_key(place)
        where = dg.AssetRecordsFilter(
            asset_key=asset_key(self.study, stage),
            asset_partitions=None if partition is None else [partition],
        )
        if stage.is_external:
            found = self.instance.fetch_observations(where, limit=100).records
        else:
            found = self.instance.fetch_materializations(where, limit=100).records
        return list(found)

    def event(self, name: str, place: Place) -> dg.AssetMaterialization:
        """The newest materialization."""
        event = self.events(name, place)[0].asset_materialization
        assert event is not None
        return event

    def not_fresh(self) -> set[Name]:
        """The places that Dagster does not call FRESH."""
        study = self.study
        made = [stage for stage in stages_of(study) if not stage.is_external]
        resolver = CachingStaleStatusResolver(
            self.instance,
            build_definitions([study]).resolve_asset_graph(),
            LoadingContextForTest(self.instance),
        )
        return {
            (stage.name, str(place))
            for stage in made
            for place in places_of(study, stage.scope)
            if resolver.get_status(asset_key(study, stage), partition_key(place)).value != "FRESH"
        }


def lines(*texts: str) -> pl.DataFrame:
    return LINES.conform(pl.DataFrame({"line": list(texts)}))


def range_tags(first: Place, last: Place) -> dict[str, str]:
    return {
        "dagster/asset_partition_range_start": str(partition_key(first)),
        "dagster/asset_partition_range_end": str(partition_key(last)),
    }


ALL = WholeStudy()
H0, H1 = LayerKey("sae", "h.0"), LayerKey("sae", "h.1")
