"""What a result was made from: the walk from its manifest down to tokens, text, weights and models.

Manifests alone are read, level by level, each once. The walk follows what a result was made from,
not the present heads, so an old result is explained as it was.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autointerp_dagster.adapters.heads import read_manifests
from autointerp_dagster.adapters.manifests import Manifest, Upstream
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.study.parameters import MODEL_KEYS, PROMPT_KEYS

Known = Mapping[str, Manifest | StoreError]
"""Manifests by path; of one that cannot be read the reason."""


@dataclass(frozen=True, slots=True)
class Made:
    """What a walk says of one manifest."""

    asset: str
    cell: str
    manifest: str
    """Its path in the store."""
    content_hash: str
    version: str
    """Of the stage."""
    models: Mapping[str, str]
    """Identities of the models that were asked, by the part they played."""
    prompts: Mapping[str, str]
    """Versions of prompts, by their dotted key in the parameters."""
    run_id: str
    finished: str

    @classmethod
    def of(cls, manifest: Manifest) -> "Made":
        """From the manifest."""
        parameters = manifest.parameters
        return cls(
            asset=manifest.stage,
            cell=manifest.cell,
            manifest=str(manifest.path),
            content_hash=manifest.content_hash,
            version=manifest.stage_version,
            models={key: str(parameters[key]) for key in MODEL_KEYS if key in parameters},
            prompts=dict(_prompts(parameters)),
            run_id=manifest.provenance.run_id,
            finished=manifest.provenance.finished,
        )


@dataclass(frozen=True, slots=True)
class Lineage:
    """All that one result rests on."""

    manifest: Manifest
    """Of the result."""
    made_from: Mapping[str, Sequence[Manifest]]
    """By asset: all manifests that it rests on, the nearest first. Neighbours, for one, are counted
    on every range of a layer."""
    external: Mapping[str, str]
    """``asset place`` to weights' or corpus hash."""

    @classmethod
    def of(cls, manifest: Manifest, known: Known) -> "Lineage":
        """The walk from a manifest.

        Args:
            manifest: Where it begins.
            known: At least what :func:`manifests_below` finds below it.

        Raises:
            StoreError: If a manifest on the way cannot be read.
        """
        made_from: dict[str, list[Manifest]] = {}
        external: dict[str, str] = {}
        for upstream, found in _ancestors(manifest, known):
            if found is None:
                external.setdefault(f"{upstream.asset} {upstream.cell}", upstream.content_hash)
            else:
                made_from.setdefault(upstream.asset, []).append(found)
        return cls(manifest, made_from, external)

    @property
    def ancestors(self) -> dict[str, Manifest]:
        """By asset: what the result itself was made from, of its own cell where there is one."""
        cell = self.manifest.cell
        return {
            asset: next((m for m in found if m.cell == cell), found[0])
            for asset, found in self.made_from.items()
        }

    @property
    def made(self) -> Iterator[Made]:
        """What it rests on, in short; the nearest first."""
        return (Made.of(manifest) for found in self.made_from.values() for manifest in found)

    @property
    def text(self) -> dict[str, Any]:
        """Where the text is, and which version of it was read; empty if nobody says."""
        tokens = self.ancestors.get("token_dataset")
        return {} if tokens is None else tokens.summary.get("corpus", {})


def lineage_of(store: Store, manifest: Manifest) -> Lineage:
    """The walk from one manifest.

    Raises:
        StoreError: If a manifest on the way is missing or was changed.
    """
    return Lineage.of(manifest, manifests_below(store, [manifest]))


def manifests_below(
    store: Store, manifests: Sequence[Manifest], known: Sequence[Manifest] = ()
) -> dict[str, Manifest | StoreError]:
    """All that some manifests rest on, by path; what cannot be read as the reason.

    Args:
        store: Where they are.
        manifests: Where the walks begin.
        known: Some that were read before, and need not be read again.

    Raises:
        StoreError: If the store does not answer.
    """
    before = {str(manifest.path): manifest for manifest in known}
    found: dict[str, Manifest | StoreError] = {}
    todo: Sequence[Manifest] = manifests
    while todo:
        paths = {
            up.manifest
            for m in todo
            for up in m.upstream
            if up.manifest and up.manifest not in found
        }
        new = {path: before[path] for path in paths & before.keys()}
        level = new | read_manifests(store, paths - before.keys())
        found |= level
        todo = [manifest for manifest in level.values() if isinstance(manifest, Manifest)]
    return found


def _ancestors(manifest: Manifest, known: Known) -> Iterator[tuple[Upstream, Manifest | None]]:
    """Everything that a manifest rests on, the nearest first, each once; null: external."""
    seen: set[str] = set()
    todo = list(manifest.upstream)
    for upstream in todo:  # grows as it goes
        address = upstream.manifest or f"{upstream.asset} {upstream.cell}"
        if address in seen:
            continue
        seen.add(address)
        found = None if upstream.manifest is None else known[upstream.manifest]
        if isinstance(found, StoreError):
            raise found
        yield upstream, found
        if found is not None:
            todo.extend(found.upstream)


def _prompts(
    parameters: Mapping[str, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[str, str]]:
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            yield from _prompts(value, (*above, key))
        elif key in PROMPT_KEYS and value is not None:
            yield ".".join((*above, key)), str(value)
