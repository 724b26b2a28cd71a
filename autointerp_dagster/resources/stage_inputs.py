"""What a stage is made from, as the store holds it: no Dagster, and nothing is written but parts.

A run of a stage (:class:`~autointerp_dagster.resources.store.StageRun`) adds committing and
reporting. What only wants to know what a run would do, such as a plan, uses this alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import polars as pl

from autointerp_dagster.adapters.hashing import json_hash
from autointerp_dagster.adapters.manifests import Manifest, Part, Upstream, fingerprint_of
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.schemas import Table
from autointerp_dagster.core.types import Cell, Place
from autointerp_dagster.study import Study
from autointerp_dagster.study.parameters import parameters_of
from autointerp_dagster.study.stages import STAGES, Stage, inputs_at, upstream_of

OUTSIDE_CODER = "outside_coder"
"""Status of a cell beyond the coder's width: an empty manifest."""

External = Mapping[str, Callable[[Place], str]]
"""Of each external input: the version that it has now, by place."""


class StageInputs:
    """One stage of one study: its inputs, and what of its results the store holds."""

    def __init__(
        self,
        store: Store,
        study: Study,
        stage: Stage,
        parameters: dict[str, Any],
        external: External,
    ) -> None:
        """Nothing is read yet.

        Args:
            store: Where everything is.
            study: Whose places these are.
            stage: The stage.
            parameters: All that decides the result besides inputs and the stage's version.
            external: The present version of each external input.
        """
        self.store = store
        self.study = study
        self.stage = stage
        self.parameters = parameters
        """All that decides the result besides inputs and the stage's version."""
        self._external = external
        self._inputs: dict[Place, tuple[Upstream, ...]] = {}
        self._read: dict[tuple[str, Place], Manifest] = {}

    @classmethod
    def of(
        cls,
        store: Store,
        study: Study,
        name: str,
        *,
        models: Mapping[str, Any] | None = None,
        external: External | None = None,
    ) -> "StageInputs":
        """The inputs of a stage as its asset has them.

        Args:
            store: Where everything is.
            study: Whose places these are.
            name: The stage.
            models: Identities of the models that the stage asks; JSON-ready.
            external: The present version of each external input.
        """
        parameters = {**parameters_of(study, name), **(models or {})}
        return StageInputs(store, study, STAGES[name], parameters, external or {})

    def fingerprint(self, place: Place) -> str:
        """Identity of the inputs of a place: decides between computing and linking."""
        stage = self.stage
        return fingerprint_of(
            stage.name, stage.version, str(place), self.parameters, self.upstream(place)
        )

    def made(self, place: Place) -> Manifest | None:
        """The complete result of a place that the store holds, from whatever study; null if none.

        Raises:
            StoreError: If an input was never materialized.
        """
        return self.store.find(self.stage.name, self.fingerprint(place))

    def is_current(self, place: Place) -> bool:
        """Whether the study's head of a place is complete and made from the present inputs.

        Raises:
            StoreError: If an input was never materialized.
        """
        head = self.store.head(self.study.name, self.stage.name, str(place))
        if head is None or not head.complete:
            return False
        return head.input_fingerprint == self.fingerprint(place)

    def take(self, asset: str, place: Place, manifest: Manifest) -> None:
        """Reads ``manifest`` for an upstream place from now on, whatever its head is."""
        self._read[asset, place] = manifest

    def input(self, asset: str, place: Place) -> Manifest:
        """The manifest of an upstream place, the same for the whole run though its head may move.

        Raises:
            StoreError: If it was never materialized; says which asset to materialize first.
        """
        if (asset, place) in self._read:
            return self._read[asset, place]
        manifest = self.store.head(self.study.name, asset, str(place))
        if manifest is None:
            raise StoreError(
                f"{self.study.name}: {self.stage.name} needs {asset} {place}, which was never "
                f"materialized. Materialize {asset} first (or run `autointerp run`)."
            )
        self._read[asset, place] = manifest
        return manifest

    def inputs(self, asset: str, place: Place) -> list[Manifest]:
        """The manifests of every upstream place that ``place`` is made from."""
        sources = inputs_at(self.study, self.stage, place, STAGES[asset])
        return [self.input(asset, source) for source in sources]

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
            for stage in upstream_of(self.study, self.stage)
            if not stage.is_external
            for manifest in self.inputs(stage.name, place)
        )

    def found_part(self, name: str, parameters: Mapping[str, Any]) -> Part | None:
        """The stored piece of a cell whose inputs are these; null if there is none.

        Args:
            name: Of the piece, e.g. the explainer.
            parameters: All that decides this piece: parameters and content hashes of its inputs.
        """
        return self.store.find_part(self.stage.name, self._part_fingerprint(name, parameters))

    def part(self, name: str, parameters: Mapping[str, Any], make: Callable[[], Part]) -> Part:
        """A piece of a cell: the stored one if its inputs are the same, else a new one.

        Args:
            name: As in :meth:`found_part`.
            parameters: As in :meth:`found_part`.
            make: Computes it; ``Part.fingerprint`` is filled in here.
        """
        fingerprint = self._part_fingerprint(name, parameters)
        found = self.store.take_part(self.stage.name, fingerprint)
        if found is not None:
            return found
        made = make().model_copy(update={"name": name, "fingerprint": fingerprint})
        if made.complete:
            self.store.put_part(self.stage.name, made)
        return made

    def is_outside_coder(self, place: Place) -> bool:
        """Whether an input says that the range lies beyond the coder's width."""
        return isinstance(place, Cell) and any(
            self.input(stage.name, place).status == OUTSIDE_CODER
            for stage in upstream_of(self.study, self.stage)
            if stage.scope == "cell"
        )

    def upstream(self, place: Place) -> tuple[Upstream, ...]:
        """Every input of a place with its version, the same for the whole run."""
        if place not in self._inputs:
            self._inputs[place] = tuple(
                self._upstream(stage, source)
                for stage in upstream_of(self.study, self.stage)
                for source in inputs_at(self.study, self.stage, place, stage)
            )
        return self._inputs[place]

    def external_version(self, stage: Stage, source: Place) -> str:
        """The version that an external input has now."""
        return self._external[stage.name](source)

    def _upstream(self, stage: Stage, source: Place) -> Upstream:
        if stage.is_external:
            version = self.external_version(stage, source)
            return Upstream(asset=stage.name, cell=str(source), content_hash=version)
        manifest = self.input(stage.name, source)
        return Upstream(
            asset=stage.name,
            cell=str(source),
            content_hash=manifest.content_hash,
            manifest=manifest.path,
        )

    def _part_fingerprint(self, name: str, parameters: Mapping[str, Any]) -> str:
        return json_hash(
            {
                "stage": self.stage.name,
                "version": self.stage.version,
                "part": name,
                **parameters,
            }
        )
