"""The store as Dagster sees it: one run of one stage skips, commits and reports its places.

An asset reads:  with store.stage(...) as stage: for place in stage.pending(): ... stage.commit(...)
and then ``yield from stage.report()``. What is already in the store, from whatever study, is linked
instead of computed. Every place gets its own event with its own data version and the exact versions
of its inputs; after a failure the finished places are reported all the same.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

import dagster as dg

from autointerp_dagster.adapters.manifests import Blob, Manifest, Provenance, content_hash_of
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.checks import Findings, Rebuilt
from autointerp_dagster.core.errors import StudyError
from autointerp_dagster.core.types import Cell, LayerKey, Place
from autointerp_dagster.partitions import place_of
from autointerp_dagster.resources.checking import check_results, refuse_to_read
from autointerp_dagster.resources.events import About, Finished, asset_key, observe, report_places
from autointerp_dagster.resources.measuring import Measuring
from autointerp_dagster.resources.showing_lineage import with_lineage
from autointerp_dagster.resources.stage_inputs import OUTSIDE_CODER, External, StageInputs
from autointerp_dagster.resources.versions import code_revision, library_versions
from autointerp_dagster.study import Study
from autointerp_dagster.study.parameters import parameters_of
from autointerp_dagster.study.stages import STAGES, Stage, inputs_at, upstream_of

__all__ = ["OUTSIDE_CODER", "Commit", "External", "StageRun", "StoreResource"]

_logger = logging.getLogger(__name__)


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
    rebuilt: Rebuilt | None = None
    """Of a coder from files, for its check."""
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
        about: About | None = None,
    ) -> "StageRun":
        """This run of one stage.

        Args:
            context: Of the asset that runs.
            study: Whose cells these are.
            name: The stage.
            models: Identities of the models that the stage asks; JSON-ready.
            external: The present version of each external input.
            about: What is shown of external inputs where Dagster is told of a new version.
        """
        stage = STAGES[name]
        parameters = {**parameters_of(study, name), **(models or {})}
        where = (context, self.of(study), study, stage)
        return StageRun(*where, parameters, external or {}, about or {})


class StageRun(StageInputs):
    """One run of one stage over some places. A context manager."""

    def __init__(
        self,
        context: dg.AssetExecutionContext,
        store: Store,
        study: Study,
        stage: Stage,
        parameters: dict[str, Any],
        external: External,
        about: About,
    ) -> None:
        super().__init__(store, study, stage, parameters, external)
        self._context, self._about = context, about
        self._done: dict[Place, Finished] = {}
        self._started = self._entered = time.time()
        self._is_reported = False
        self._measuring = Measuring(self)

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
        is_failure = error is not None and not isinstance(error, GeneratorExit)
        if is_failure and not self._is_reported:
            self._log_events(self._done)

    def asked(self) -> list[Place]:
        """The places that this run was asked for, in the order of the partitions.

        Raises:
            StudyError: If one is of no layer of the study, e.g. one that was added by hand.
        """
        if self.stage.scope == "study":  # such an asset may share a run with partitioned ones
            return [place_of(None)]
        places = [place_of(key) for key in self._context.partition_keys]
        known = {str(layer) for layer in self.study.layer_keys}
        strange = [p for p in places if str(getattr(p, "layer", p)) not in known]
        if strange:
            raise StudyError(
                f"{self.study.name}: {strange[0]} is of no layer of the study; it has: "
                f"{sorted(known)}. Layers are found by the study's sensor or `autointerp discover`."
            )
        return places

    def pending(self, places: Sequence[Place] | None = None) -> list[Place]:
        """The places that must be computed; the others are linked to what the store holds.

        Args:
            places: Which to look at; those asked for by default.

        Raises:
            StoreError: If an input was never materialized.
            CheckError: If a check refuses an input.
        """
        pending = []
        wanted = self.asked() if places is None else places
        self._refuse_inputs(wanted)
        for place in wanted:
            found = self.made(place)
            head = (self.study.name, self.stage.name, str(place))
            if found is not None and self.store.link(*head, found):
                self._done[place] = (found, {})
            elif self.is_outside_coder(place):
                self.commit(place, Commit([], {}, status=OUTSIDE_CODER))
            else:
                pending.append(place)
        self._context.log.info(  # one line: each is an event of Dagster's, too
            "%s: %d of %d places to be made, the others are in the store",
            *(self.stage.name, len(pending), len(wanted)),
        )
        self._started = time.time()
        return pending

    def _refuse_inputs(self, places: Sequence[Place]) -> None:
        made = (s for s in upstream_of(self.study, self.stage) if not s.is_external)
        for upstream in made:
            sources = {
                source: self.input(upstream.name, source)
                for place in places
                for source in inputs_at(self.study, self.stage, place, upstream)
            }
            refuse_to_read(self.study, self.stage, upstream, sources)

    def pending_cells(self, cells: Sequence[Cell] | None = None) -> list[Cell]:
        """:meth:`pending` of a stage over layer x range."""
        return [place for place in self.pending(cells) if isinstance(place, Cell)]

    def pending_layers(self) -> list[LayerKey]:
        """:meth:`pending` of a stage over layers."""
        return [place for place in self.pending() if isinstance(place, LayerKey)]

    def commit(self, place: Place, commit: Commit) -> Manifest:
        """Makes the result of a place durable: manifest, then head."""
        now = time.time()
        blobs = tuple(sorted(commit.blobs, key=lambda blob: blob.name))
        manifest = self.store.commit(
            Manifest(
                stage=self.stage.name,
                stage_version=self.stage.version,
                cell=str(place),
                input_fingerprint=self.fingerprint(place),
                content_hash=content_hash_of(blobs, commit.status),
                status=commit.status,
                complete=commit.complete,
                parameters=self.parameters,
                upstream=self.upstream(place),
                blobs=blobs,
                summary=dict(commit.summary),
                findings=self._findings(place, commit),
                provenance=Provenance(
                    study=self.study.name,
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
        self.store.set_head(self.study.name, self.stage.name, str(place), manifest)
        self._done[place] = (manifest, commit.shown)
        self._started = now
        return manifest

    def _findings(self, place: Place, commit: Commit) -> Findings | None:
        if commit.status != "ok":
            return None
        found = self._measuring.findings(place, commit.blobs)
        return found.model_copy(update={"rebuilt": commit.rebuilt})

    def external_version(self, stage: Stage, source: Place) -> str:
        """The version that an external input has now; Dagster is told of it."""
        version = super().external_version(stage, source)
        observe(self._context, self.study, stage, source, version, self._about)
        return version

    def report(self) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        """The step's result, one exact event per finished place, and then the checks.

        Raises:
            CheckError: If a check refuses what the places hold; their events stay.
        """
        yield dg.MaterializeResult()
        self._is_reported = True
        self._log_events(
            with_lineage(self.store, self.stage, self._done, list(self._read.values()))
        )
        made = {place: manifest for place, (manifest, _) in self._done.items()}
        key = asset_key(self.study, self.stage)
        yield from check_results(self.study, self.stage, key, made)

    def _log_events(self, done: Mapping[Place, Finished]) -> None:
        report_places(self._context, self.study, self.stage, done)
        run_id = self._context.run_id
        new = [m for m, _ in self._done.values() if m.provenance.run_id == run_id]
        _logger.info(
            "%s: %d new, %d from the store, %d rows, %.1f s",
            self.stage.name,
            len(new),
            len(self._done) - len(new),
            sum(blob.n_rows or 0 for manifest in new for blob in manifest.blobs),
            time.time() - self._entered,
        )


def _iso(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="milliseconds")
