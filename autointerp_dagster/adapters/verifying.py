"""Checking that a store still holds what was put into it, all that some heads rest on.

1. Heads, and the manifests that they reach: each against its file name, its fingerprint, the hashes
   of its blobs and of what it was made from.
2. Every blob of these manifests, once: the SHA-256 of its bytes, and the hash of its content.
3. The journal's segments and templates about the coders that were reached, against their names.

Files are read in pieces; nothing grows with their size but a temporary copy of one remote blob.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO, Literal, NamedTuple

import pyarrow as pa

from autointerp_dagster.adapters.bulk import list_files, look_at, remove
from autointerp_dagster.adapters.durable import deleting, here, is_damage, reading
from autointerp_dagster.adapters.hashing import tensor_file_hash
from autointerp_dagster.adapters.heads import Name, read_manifests, read_pointers
from autointerp_dagster.adapters.manifests import (
    Blob,
    Manifest,
    content_hash_of,
    fingerprint_of,
    is_manifest,
)
from autointerp_dagster.adapters.parquet import table_file_hash
from autointerp_dagster.adapters.shards import CONTENT, OFFSETS
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.types import Progress, silent

Kind = Literal["head", "manifest", "blob", "journal"]
"""Of a file that is not what it was."""

_PIECE = 8 * 2**20
_SEGMENT_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Fault:
    """One file that is damaged or missing."""

    kind: Kind
    asset: str
    cell: str
    """Of the manifest that names it."""
    path: str
    """Relative to the root."""
    text: str
    """What is wrong."""
    is_there: bool = True
    """False: the file is missing."""


@dataclass(slots=True)
class Verified:
    """What was checked, and what was found."""

    faults: list[Fault] = field(default_factory=list)
    n_manifests: int = 0
    n_blobs: int = 0
    n_bytes: int = 0
    """Of blobs."""
    n_segments: int = 0
    """Of the journal, with its templates."""
    manifests: dict[str, Manifest] = field(default_factory=dict)
    """By path: those that could be read."""


class _Named(NamedTuple):
    """A file and the place whose manifest names it."""

    asset: str
    cell: str
    path: str


def verify(
    store: Store, study: str, names: Collection[Name] | None = None, progress: Progress = silent
) -> Verified:
    """Reads and checks everything that the heads of a study rest on.

    Args:
        store: Where it is; only read.
        study: Whose heads.
        names: Only the heads of these places; null: of all.
        progress: Shows how far it is.

    Raises:
        StoreError: If the store does not answer.
    """
    found = Verified()
    _walk(store, study, names, found)
    blobs = {blob.path: (m, blob) for m in found.manifests.values() for blob in m.blobs}
    shown = progress(blobs.items(), total=len(blobs), description="verify", unit="files")
    for path, (manifest, blob) in shown:
        wrong = wrong_with(store, blob)
        found.n_blobs += 1
        found.n_bytes += blob.n_bytes
        if wrong is not None:
            text, is_there = wrong
            fault = Fault("blob", manifest.stage, manifest.cell, path, text, is_there)
            found.faults.append(fault)
    _check_journal(store, found)
    return found


def _walk(store: Store, study: str, names: Collection[Name] | None, found: Verified) -> None:
    """Reads the manifests that some heads reach, level by level."""
    heads = _heads(store, study, names, found)
    todo, seen = list(heads), set[str]()
    while todo:
        new = {named.path: named for named in todo if named.path not in seen}
        seen |= new.keys()
        todo = []
        for path, manifest in read_manifests(store, set(new)).items():
            if isinstance(manifest, Manifest):
                found.manifests[path] = manifest
                above = [u for u in manifest.upstream if u.manifest is not None]
                todo += [_Named(u.asset, u.cell, str(u.manifest)) for u in above]
            else:
                asset, cell, _ = new[path]
                text = str(manifest).removeprefix(f"{store.root}/{path}: ")
                is_there = look_at(store.root, path) is not None
                found.faults.append(Fault("manifest", asset, cell, path, text, is_there))
    found.n_manifests = len(seen)
    for asset, cell, path in heads:
        manifest = found.manifests.get(path)
        if manifest is not None and (manifest.stage, manifest.cell) != (asset, cell):
            text = f"points at {manifest.stage} {manifest.cell}"
            head = f"heads/{study}/{asset}/{cell}"
            found.faults.append(Fault("head", asset, cell, head, text))
    for path, manifest in found.manifests.items():
        wrong = _contradiction(path, manifest, found.manifests)
        if wrong is not None:
            found.faults.append(Fault("manifest", manifest.stage, manifest.cell, path, wrong))


def _heads(
    store: Store, study: str, names: Collection[Name] | None, found: Verified
) -> list[_Named]:
    """The chosen heads, with the manifest that each points at."""
    heads = []
    for head, path in read_pointers(store, f"heads/{study}").items():
        _, _, asset, cell = head.split("/", maxsplit=3)
        if names is not None and (asset, cell) not in names:
            continue
        if is_manifest(path):
            heads.append(_Named(asset, cell, path))
        else:
            text = f"points at {path[:80]!r}, which is no manifest"
            found.faults.append(Fault("head", asset, cell, head, text))
    return heads


def _contradiction(path: str, manifest: Manifest, others: dict[str, Manifest]) -> str | None:
    """What in a manifest does not fit itself, or what it was made from; null if all fits."""
    fingerprint = fingerprint_of(
        manifest.stage,
        manifest.stage_version,
        manifest.cell,
        manifest.parameters,
        manifest.upstream,
    )
    folder = f"{manifest.stage}/{manifest.input_fingerprint}"
    if not path.startswith(f"{folder}/"):
        return f"lies in another folder than its own, {folder}"
    if fingerprint != manifest.input_fingerprint:
        return "its fingerprint is not that of its parameters and inputs"
    if content_hash_of(manifest.blobs, manifest.status) != manifest.content_hash:
        return "its content hash is not that of its blobs"
    for up in manifest.upstream:
        above = others.get(up.manifest or "")
        if above is not None and above.content_hash != up.content_hash:
            return f"names another content of {up.asset} {up.cell} than {up.manifest} has"
    return None


def wrong_with(store: Store, blob: Blob) -> tuple[str, bool] | None:
    """What is wrong with a blob, and whether it is there; null if it is what was written.

    Raises:
        StoreError: If the store does not answer.
    """
    try:
        with _opened(store, blob.path) as file:
            digest = hashlib.sha256()
            n_bytes = _read_through(file, digest.update)
            if (digest.hexdigest(), n_bytes) != (blob.checksum, blob.n_bytes):
                return f"its {n_bytes:,} bytes are not the {blob.n_bytes:,} of its manifest", True
            file.seek(0)
            content = _content_hash(file, blob)
    except FileNotFoundError:
        return "missing", False
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        if not is_damage(error):
            with reading(store.root, blob.path):
                raise
        return f"cannot be read: {error}", True
    if content != blob.content_hash:
        return "its content hash is not the one of its manifest", True
    return None


def _content_hash(file: BinaryIO, blob: Blob) -> str:
    if blob.path.endswith(".parquet"):
        return table_file_hash(file)
    return tensor_file_hash(file, CONTENT if blob.name == OFFSETS else None)


@contextmanager
def _opened(store: Store, path: str) -> Iterator[BinaryIO]:
    """A file at its beginning; a remote one is read once, into a temporary copy.

    Raises:
        FileNotFoundError: If there is none.
        StoreError: If it cannot be opened.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(stack.enter_context(here(store.root / path)).open("rb"))
        except FileNotFoundError:
            raise
        except OSError:
            with reading(store.root, path):
                raise
        yield file


def _read_through(file: BinaryIO, update: Callable[[bytes], None]) -> int:
    """Hands over all that follows in a file, piece by piece; how many bytes."""
    n_bytes = 0
    while data := file.read(_PIECE):
        update(data)
        n_bytes += len(data)
    return n_bytes


def _check_journal(store: Store, found: Verified) -> None:
    """Segments of the coders that were reached, and the beginnings of their prompts."""
    coders = {
        up.content_hash
        for manifest in found.manifests.values()
        for up in manifest.upstream
        if up.manifest is None
    }
    segments = [
        path
        for path in list_files(store.root, "journal")
        if path.endswith(".parquet") and path.split("/")[2] in coders
    ]
    templates = list_files(store.root, "journal-templates")
    paths = sorted([*segments, *(path for path in templates if path.endswith(".json"))])
    for path in paths:
        text = _segment_fault(store, path)
        found.n_segments += 1
        if text is not None:
            stage = path.split("/")[1] if path.startswith("journal/") else "journal-templates"
            found.faults.append(Fault("journal", stage, "", path, text))


def _segment_fault(store: Store, path: str) -> str | None:
    """What is wrong with a file that is named by its content; null if nothing is."""
    digest = hashlib.blake2b(digest_size=_SEGMENT_DIGEST_BYTES)
    try:
        with _opened(store, path) as file:
            _read_through(file, digest.update)
    except FileNotFoundError:  # compacted meanwhile: its calls are in another segment
        return None
    except OSError:
        with reading(store.root, path):
            raise
    is_right = digest.hexdigest() == path.rsplit("/", maxsplit=1)[-1].partition(".")[0]
    return None if is_right else "its content does not match its name"


def discard(store: Store, found: Verified) -> list[str]:
    """Deletes what is damaged, so that a run makes it again; returns the paths, relative.

    What rests on a manifest that is lost goes, too: it names a file that can never be made again.
    Answers in the journal are left alone.

    Raises:
        StoreError: If the store does not answer.
    """
    lost = {fault.path for fault in found.faults if fault.kind == "manifest"}
    known = dict(found.manifests)
    while new := {
        path: manifest
        for path, manifest in known.items()
        if path not in lost and any(up.manifest in lost for up in manifest.upstream)
    }:
        lost |= new.keys()
        for folder in {path.rpartition("/")[0] for path in new}:  # a run would take a sister
            sisters = read_manifests(store, set(list_files(store.root, folder)))
            known |= {path: m for path, m in sisters.items() if isinstance(m, Manifest)}
    others = [f.path for f in found.faults if f.kind in ("head", "blob")]
    removed: list[str] = []
    for path in (*sorted(lost), *others):
        seen = look_at(store.root, path)
        if seen is not None:
            with deleting(store.root, path):
                remove(store.root, {path: seen})
            removed.append(path)
    return removed
