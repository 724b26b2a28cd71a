"""What a manifest says: what was made, from what, by which run, at what cost."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field
from upath import UPath

from autointerp_dagster.adapters.hashing import combined_hash, json_hash
from autointerp_dagster.core.checks import Findings
from autointerp_dagster.core.errors import StoreError

FORMAT: Literal[1] = 1
"""Of manifest files; raised when a reader of the old ones would misread the new."""

_MAX_PATH = 200
_PATH = re.compile(r"\w+/[0-9a-f]+/[0-9a-f]+\.json")


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def to_json(self) -> bytes:
        """UTF-8 JSON, indented, for people too."""
        return self.model_dump_json(indent=1, exclude_none=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """The entry that :meth:`to_json` wrote.

        Raises:
            ValueError: If it is of a format that this version does not read.
        """
        return cls.model_validate_json(data)


class Blob(_Entry):
    """One file of the store."""

    name: str
    """Unique in its manifest, e.g. ``windows`` or ``explanations/default``."""
    path: str
    """Relative to the root."""
    content_hash: str
    """Over the logical content."""
    checksum: str
    """SHA-256 of the bytes."""
    n_bytes: int
    n_rows: int | None = None


class Part(_Entry):
    """A finished piece of a cell, e.g. one explainer's table."""

    name: str
    fingerprint: str
    """Over what this piece depends on."""
    blob: Blob
    complete: bool = True
    """False if a budget cut it short; such a part is not kept for reuse."""
    cost: dict[str, Any] = Field(default_factory=dict)
    """What the language model's answers behind it cost, whichever run paid for them."""


class Upstream(_Entry):
    """One input of a cell."""

    asset: str
    cell: str
    content_hash: str
    """What this cell's fingerprint was computed with."""
    manifest: str | None = None
    """Path of the manifest that was read; null for an external asset."""


class Provenance(_Entry):
    """The circumstances: recorded, never part of an identity."""

    study: str
    run_id: str
    started: str
    """ISO 8601, UTC."""
    finished: str
    seconds: float
    git_sha: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    """Library name to version."""
    execution: dict[str, Any] = Field(default_factory=dict)
    """Batch size, threads and other settings that may touch the last bits."""
    usage: dict[str, Any] = Field(default_factory=dict)
    """Tokens and USD that this run paid for the cell."""


class Manifest(_Entry):
    """The commit of one cell of one stage."""

    format: Literal[1] = FORMAT
    stage: str
    stage_version: str
    cell: str
    """``all``, a layer key, or ``<layer>/<range>``."""
    input_fingerprint: str
    content_hash: str
    status: str = "ok"
    """``outside_coder`` for a range beyond the coder's width."""
    complete: bool
    """False if a budget cut the work short: kept, shown, never taken as done."""
    parameters: dict[str, Any]
    upstream: tuple[Upstream, ...]
    blobs: tuple[Blob, ...]
    summary: dict[str, Any] = Field(default_factory=dict)
    """Numbers and short texts that describe the content, for people."""
    findings: Findings | None = None
    """What checks judge; null if an older version made it."""
    provenance: Provenance
    path: str | None = Field(default=None, exclude=True)
    """Where it is stored, relative to the root; not part of the file."""

    def stored_at(self, path: str) -> Self:
        """The same manifest, knowing its path."""
        return self.model_copy(update={"path": path})

    def blob(self, name: str) -> Blob:
        """The blob of a name.

        Raises:
            KeyError: If the manifest has none of that name; lists those it has.
        """
        for blob in self.blobs:
            if blob.name == name:
                return blob
        raise KeyError(
            f"{self.stage} {self.cell}: no blob {name!r}; there are {[b.name for b in self.blobs]}."
        )


def fingerprint_of(
    stage: str,
    version: str,
    cell: str,
    parameters: Mapping[str, Any],
    upstream: Iterable[Upstream],
) -> str:
    """Identity of the inputs of a cell: what decides between computing and linking."""
    return json_hash(
        {
            "stage": stage,
            "version": version,
            "place": cell,
            "parameters": parameters,
            "upstream": sorted([up.asset, up.cell, up.content_hash] for up in upstream),
        }
    )


def content_hash_of(blobs: tuple[Blob, ...], status: str) -> str:
    """A cell's data version: over the logical content of all its blobs, and its status."""
    return combined_hash([("status", status), *((blob.name, blob.content_hash) for blob in blobs)])


def is_manifest(path: str) -> bool:
    """Whether a manifest may lie at this path, relative to the root."""
    return len(path) < _MAX_PATH and _PATH.fullmatch(path) is not None


def checked_manifest(root: UPath, path: str, data: bytes) -> Manifest:
    """The manifest that was read at a path of a store.

    Raises:
        StoreError: If it was changed after it was written, or has a format that this version does
            not read.
    """
    if hashlib.sha256(data).hexdigest()[:32] != Path(path).stem:
        raise StoreError(
            f"{root}/{path}: the content does not match the manifest's name. It was changed or "
            "damaged; delete it and materialize the cell again."
        )
    try:
        return Manifest.from_json(data).stored_at(path)
    except ValueError as error:
        raise StoreError(
            f"{root}/{path}: a manifest of another version of this package: {error}. "
            "Use that version, or materialize the cell again."
        ) from error
