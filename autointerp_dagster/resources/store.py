"""The store as Dagster sees it: one run of one stage skips, commits and reports its places.

An asset reads:  with store.stage(...) as stage: for place in stage.pending(): ... stage.commit(...)
and then ``yield from stage.report()``. What is already in the store, from whatever study, is linked
instead of computed. Every place gets its own event with its own data version and the exact versions
of its inputs; after a failure the finished places are reported all the same.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

import dagster as dg
import polars as pl

from autointerp_dagster.adapters.hashing import json_hash
from autointerp_dagster.adapters.manifests import (
    Blob,
    Manifest,
    Part,
    Provenance,
    Upstream,
    content_hash_of,
)
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.schemas import Table
from autointerp_dagster.core.types import Cell, LayerKey, Place
from autointerp_dagster.partitions import place_of
from autointerp_dagster.resources.events import observe, report_place
from autointerp_dagster.resources.versions import code_revision, library_versions
from autointerp_dagster.study import Study
from autointerp_dagster.study.parameters import parameters_of
from autointerp_dagster.study.stages import STAGES, Stage, inputs_at, upstream_of

_logger = logging.getLogger(__name__)

OUTSIDE_CODER = "outside_coder"
"""Status of a cell beyond the coder's width: an empty manifest."""

External = Mapping[str, Callable[[Place], str]]
"""Of each external input: the version that it has now, by place."""


@dataclass(frozen=True, slots=True)
class Commit:
    """What an asset hands over for one place."""

    blobs: Sequence[Blob]
    summary: Mapping[str, Any]
    """Numbers and short texts for people; shown in the UI and kept in the manifest."""
    complete: bool = True
    status: str = "ok"
    usage: Mapping[str, Any] = field(default_factory=dict)
    execution: Mapping[str, Any] = field(default_factory=dict)
    shown: Mapping[str, dg.MetadataValue] = field(default_factory=dict)
    """Tables and plots for the UI only."""


class StoreResource(dg.ConfigurableResource):
    """Opens the store that a study names."""

    root: str | None = None
    """Overrides every study's ``store``; null: the study decides."""

    def of(self, study: Study) -> Store:
        """The study's store."""
        return Store(self.root or study.store)

    def stage(
        self,
        context: dg.AssetExecutionContext,
        study: Study,
        name: str,
        *,
        models: Mapping[str, Any] | None = None,
        external: External | None = None,
    ) -> "StageRun":
        """This run of one stage.

        Args:
            context: Of the asset that runs.
            study: Whose cells these are.
            name: The stage.
            models: Identities of the models that the stage asks; JSON-ready.
            external: The present version of each external input.
        """
        stage = STAGES[name]
        parameters = {**parameters_of(study, name), **(models or {})}
        return StageRun(context, self.of(study), study, stage, parameters, external or {})


class StageRun:
    """One run of one stage over some places. A context manager."""

    def __init__(
        self,
        context: dg.AssetExecutionContext,
        store: Store,
        study: Study,
        stage: Stage,
        parameters: dict[str, Any],
        external: External,
    ) -> None:
        self.store = store
        self._context = context
        self._study = study
        self._stage = stage
        self.parameters = parameters
        """All that decides the result besides inputs and the stage's version."""
        self._external = external
        self._done: dict[Place, tuple[Manifest, Mapping[str, dg.MetadataValue]]] = {}
        self._inputs: dict[Place, tuple[Upstream, ...]] = {}
        self._read: dict[tuple[str, Place], Manifest] = {}
        self._started = self._entered = time.time()

    def __enter__(self) -> Self:
        """The run itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Reports what was finished before a failure; the failure goes on."""
        if error is not None and not isinstance(error, GeneratorExit):
            self._log_events()

    def asked(self) -> list[Place]:
        """The places that this run was asked for, in the order of the partitions."""
        if self._stage.scope == "study":  # such an asset may share a run with partitioned ones
            return [place_of(None)]
        return [place_of(key) for key in self._context.partition_keys]

    def pending(self, places: Sequence[Place] | None = None) -> list[Place]:
        """The places that must be computed; the others are linked to what the store holds.

        Args:
            places: Which to look at; those asked for by default.

        Raises:
            StoreError: If an input was never materialized.
        """
        pending = []
        for place in self.asked() if places is None else places:
            found = self.store.find(self._stage.name, self.fingerprint(place))
            if found is not None:
                self.store.set_head(self._study.name, self._stage.name, str(place), found)
                self._done[place] = (found, {})
                self._context.log.info("%s %s: already in the store", self._stage.name, place)
            elif self._is_outside_coder(place):
                self.commit(place, Commit([], {}, status=OUTSIDE_CODER))
            else:
                pending.append(place)
        self._started = time.time()
        return pending

    def pending_cells(self, cells: Sequence[Cell] | None = None) -> list[Cell]:
        """:meth:`pending` of a stage over layer x range."""
        return [place for place in self.pending(cells) if isinstance(place, Cell)]

    def pending_layers(self) -> list[LayerKey]:
        """:meth:`pending` of a stage over layers."""
        return [place for place in self.pending() if isinstance(place, LayerKey)]

    def fingerprint(self, place: Place) -> str:
        """Identity of the inputs of a place: decides between computing and linking."""
        return json_hash(
            {
                "stage": self._stage.name,
                "version": self._stage.version,
                "place": str(place),
                "parameters": self.parameters,
                "upstream": sorted(
                    [up.asset, up.cell, up.content_hash] for up in self._inputs_of(place)
                ),
            }
        )

    def input(self, asset: str, place: Place) -> Manifest:
        """The manifest of an upstream place, the same for the whole run though its head may move.

        Raises:
            StoreError: If it was never materialized; says which asset to materialize first.
        """
        if (asset, place) in self._read:
            return self._read[asset, place]
        manifest = self.store.head(self._study.name, asset, str(place))
        if manifest is None:
            raise StoreError(
                f"{self._study.name}: {self._stage.name} needs {asset} {place}, which was never "
                f"materialized. Materialize {asset} first (or run `autointerp run`)."
            )
        self._read[asset, place] = manifest
        return manifest

    def inputs(self, asset: str, place: Place) -> list[Manifest]:
        """The manifests of every upstream place that ``place`` is made from."""
        scope = STAGES[asset].scope
        return [self.input(asset, source) for source in inputs_at(self._study, place, scope)]

    def table(self, asset: str, place: Place, blob: str) -> pl.DataFrame:
        """A table of an upstream asset: rows of all the places that ``place`` is made from."""
        manifests = self.inputs(asset, place)
        frames = [self.store.table(m.blob(blob)) for m in manifests if m.status == "ok"]
        return pl.concat(frames)

    def tables(self, asset: str, place: Place, table: Table) -> pl.DataFrame:
        """One table that an upstream asset keeps in parts (one per explainer), put together."""
        frames = [
            self.store.table(blob)
            for manifest in self.inputs(asset, place)
            for blob in manifest.blobs
            if blob.name.split("/")[0] == table.name
        ]
        return pl.concat([table.empty(), *frames])

    def all_complete(self, place: Place) -> bool:
        """Whether no input of a place was cut short by a budget."""
        return all(
            manifest.complete
            for stage in upstream_of(self._study, self._stage)
            if not stage.is_external
            for manifest in self.inputs(stage.name, place)
        )

    def part(self, name: str, parameters: Mapping[str, Any], make: Callable[[], Part]) -> Part:
        """A piece of a cell: the stored one if its inputs are the same, else a new one.

        Args:
            name: Of the piece, e.g. the explainer.
            parameters: All that decides this piece: parameters and content hashes of its inputs.
            make: Computes it; ``Part.fingerprint`` is filled in here.
        """
        fingerprint = json_hash(
            {
                "stage": self._stage.name,
                "version": self._stage.version,
                "part": name,
                **parameters,
            }
        )
        found = self.store.find_part(self._stage.name, fingerprint)
        if found is not None:
            return found
        made = make().model_copy(update={"name": name, "fingerprint": fingerprint})
        if made.complete:
            self.store.put_part(self._stage.name, made)
        return made

    def commit(self, place: Place, commit: Commit) -> Manifest:
        """Makes the result of a place durable: manifest, then head."""
        now = time.time()
        blobs = tuple(sorted(commit.blobs, key=lambda blob: blob.name))
        manifest = self.store.commit(
            Manifest(
                stage=self._stage.name,
                stage_version=self._stage.version,
                cell=str(place),
                input_fingerprint=self.fingerprint(place),
                content_hash=content_hash_of(blobs, commit.status),
                status=commit.status,
                complete=commit.complete,
                parameters=self.parameters,
                upstream=self._inputs_of(place),
                blobs=blobs,
                summary=dict(commit.summary),
                provenance=Provenance(
                    study=self._study.name,
                    run_id=self._context.run_id,
                    started=_iso(self._started),
                    finished=_iso(now),
                    seconds=round(now - self._started, 3),
                    git_sha=code_revision(),
                    versions=library_versions(),
                    execution=dict(commit.execution),
                    usage=dict(commit.usage),
                ),
            )
        )
        self.store.set_head(self._study.name, self._stage.name, str(place), manifest)
        self._done[place] = (manifest, commit.shown)
        self._started = now
        return manifest

    def report(self) -> Iterator[dg.MaterializeResult]:
        """The step's result, followed by one exact event per finished place."""
        yield dg.MaterializeResult()
        self._log_events()

    def _log_events(self) -> None:
        for place, (manifest, shown) in self._done.items():
            report_place(self._context, self._study, self._stage, place, manifest, shown)
        run_id = self._context.run_id
        new = [m for m, _ in self._done.values() if m.provenance.run_id == run_id]
        _logger.info(
            "%s: %d new, %d from the store, %d rows, %.1f s",
            self._stage.name,
            len(new),
            len(self._done) - len(new),
            sum(blob.n_rows or 0 for manifest in new for blob in manifest.blobs),
            time.time() - self._entered,
        )

    def _is_outside_coder(self, place: Place) -> bool:
        """Whether an input says that the range lies beyond the coder's width."""
        return isinstance(place, Cell) and any(
            self.input(stage.name, place).status == OUTSIDE_CODER
            for stage in upstream_of(self._study, self._stage)
            if stage.scope == "cell"
        )

    def _inputs_of(self, place: Place) -> tuple[Upstream, ...]:
        if place not in self._inputs:
            self._inputs[place] = tuple(
                upstream
                for stage in upstream_of(self._study, self._stage)
                for source in inputs_at(self._study, place, stage.scope)
                for upstream in [self._upstream(stage, source)]
            )
        return self._inputs[place]

    def _upstream(self, stage: Stage, source: Place) -> Upstream:
        if not stage.is_external:
            manifest = self.input(stage.name, source)
            return Upstream(
                asset=stage.name,
                cell=str(source),
                content_hash=manifest.content_hash,
                manifest=manifest.path,
            )
        version = self._external[stage.name](source)
        observe(self._context, self._study, stage, source, version)
        return Upstream(asset=stage.name, cell=str(source), content_hash=version)


def _iso(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="milliseconds")
