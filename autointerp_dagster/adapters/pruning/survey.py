"""What a store needs, and what nothing names any more.

Kept are heads, with every manifest that they reach; manifests that a head left, or that were
written, less than 30 days ago, likewise; all blobs that these name, and the journal of the coders
that they are about; finished pieces of cells younger than that; and whatever is younger than a day,
for a run may be about to name it. Never touched are heads, the layers that were found, what was
spent, the records of batches, prompts' beginnings, and write-ahead logs: the next run seals these.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from autointerp_dagster.adapters.bulk import StoredFile, list_files, look_at, read_files
from autointerp_dagster.adapters.heads import is_temporary, read_manifests, read_pointers
from autointerp_dagster.adapters.manifests import Manifest, Part, is_manifest
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.types import Progress, silent
from autointerp_dagster.study.stages import STAGES

Kind = Literal["manifest", "piece", "blob", "journal", "temporary"]
"""``piece``: a finished part of a cell (``parts/``); ``journal``: sealed answers."""

DAY_S = 24 * 3600.0
YOUNG_S = DAY_S
SUPERSEDED_DAYS = 30.0

_KEPT = ("heads", "spend", "batches", "journal-templates", "journal-wal")


class Doomed(NamedTuple):
    """A file that may go."""

    kind: Kind
    path: str
    """Relative to the root."""
    n_bytes: int
    age_s: float
    """Since it was written, or last used again or left by a head."""
    why: str


@dataclass(frozen=True, slots=True)
class Found:
    """What a store holds at one moment."""

    doomed: Mapping[str, Doomed]
    """By path."""
    n_kept: int
    """Files."""
    n_bytes_kept: int
    upstream: Mapping[str, tuple[str, ...]]
    """Of every manifest in ``doomed`` that can be read: the manifests that it names."""
    lost: tuple[str, ...]
    """Manifests that something kept names and that are not there: for ``autointerp verify``."""


class _Links(NamedTuple):
    """What a manifest names."""

    upstream: tuple[str, ...]
    blobs: tuple[str, ...]
    external: tuple[str, ...]
    """Content hashes of external inputs, coders among them."""


@dataclass(slots=True)
class _Needs:
    """What is named by what is kept."""

    manifests: set[str]
    blobs: set[str]
    external: set[str]
    lost: set[str]


class Survey:
    """Looks at a store, as often as one likes; no manifest is read twice, for none ever changes."""

    def __init__(
        self,
        store: Store,
        *,
        superseded_s: float = SUPERSEDED_DAYS * DAY_S,
        clock: Callable[[], float] = time.time,
        progress: Progress = silent,
    ) -> None:
        """Nothing is read yet.

        Args:
            store: Only read.
            superseded_s: How long superseded manifests are kept, in seconds; at least a day.
            clock: The store's time, in seconds since 1970.
            progress: Shows how far the reading is.
        """
        self.store = store
        self.clock = clock
        self._superseded_s = max(superseded_s, YOUNG_S)
        self._progress = progress
        self._links: dict[str, _Links | StoreError] = {}
        self._blob_of_piece: dict[str, str | None] = {}

    def limit_s(self, kind: Kind) -> float:
        """The age from which on a file of a kind may go, in seconds."""
        return YOUNG_S if kind in ("blob", "temporary") else self._superseded_s

    def look(self) -> Found:
        """What may go now.

        Raises:
            StoreError: If the store does not answer, or something kept cannot be read: what it
                needs is not known then, and nothing may be deleted.
        """
        now = self.clock()
        files = list_files(self.store.root, "")
        heads = set(read_pointers(self.store).values())  # later: none can name what is not listed
        manifests = [path for path in files if is_manifest(path)]
        self._read(manifests)
        young = {path for path in manifests if self._is_young("manifest", files[path], now)}
        needs = self._reached(heads | young)
        blob_of_piece = self._pieces(files)
        for path, blob in blob_of_piece.items():
            if blob is not None and self._is_young("piece", files[path], now):
                needs.blobs.add(blob)
        journals = _newest_of_each_coder(files)
        doomed: dict[str, Doomed] = {}
        for path, file in files.items():
            kind = _kind_of(path)
            if kind is None or self._is_young(kind, file, now):
                continue
            if kind == "journal":
                coder = path.split("/")[2]
                if coder in needs.external or now - journals[coder] < self._superseded_s:
                    continue
            needed = needs.blobs if kind == "blob" else needs.manifests
            if path not in needed and blob_of_piece.get(path) not in needs.blobs:
                doomed[path] = Doomed(kind, path, file.n_bytes, now - file.written, _WHY[kind])
        kept = [file.n_bytes for path, file in files.items() if path not in doomed]
        return Found(doomed, len(kept), sum(kept), self._upstream(doomed), tuple(needs.lost))

    def _is_young(self, kind: Kind, file: StoredFile, now: float) -> bool:
        return now - file.written < self.limit_s(kind)

    def _read(self, paths: list[str]) -> None:
        new = sorted({path for path in paths if path not in self._links})
        if not new:
            return
        shown = self._progress(
            _in_bulk(self.store, new), total=len(new), description="gc", unit="manifests"
        )
        for path, manifest in shown:
            if isinstance(manifest, StoreError):
                self._links[path] = manifest
            else:
                self._links[path] = _Links(
                    tuple(sys.intern(u.manifest) for u in manifest.upstream if u.manifest),
                    tuple(sys.intern(blob.path) for blob in manifest.blobs),
                    tuple(
                        sys.intern(u.content_hash) for u in manifest.upstream if u.manifest is None
                    ),
                )

    def _reached(self, roots: set[str]) -> _Needs:
        needs = _Needs(set(), set(), set(), set())
        todo = roots
        while todo:
            needs.manifests |= todo
            self._read(sorted(todo))
            above: set[str] = set()
            for path in todo:
                links = self._links[path]
                if isinstance(links, StoreError):
                    self._refuse_unless_lost(path, links)
                    needs.lost.add(path)
                    continue
                needs.blobs.update(links.blobs)
                needs.external.update(links.external)
                above.update(links.upstream)
            todo = above - needs.manifests
        return needs

    def _refuse_unless_lost(self, path: str, error: StoreError) -> None:
        """What is not there needs nothing; what cannot be read may need anything."""
        del self._links[path]  # it may be there, or mended, the next time
        if is_manifest(path) and look_at(self.store.root, path) is None:
            return
        raise StoreError(
            f"{error} What it needs cannot be told, so nothing is deleted from {self.store.root}. "
            "`autointerp verify STUDY --discard` removes what is damaged; then run gc again."
        ) from error

    def _pieces(self, files: Mapping[str, StoredFile]) -> dict[str, str | None]:
        """The blob that each finished piece names; null for one that cannot be read."""
        paths = [path for path in files if _kind_of(path) == "piece"]
        new = sorted(path for path in paths if path not in self._blob_of_piece)
        for path, data in read_files(self.store.root, new):
            try:
                blob = None if data is None else Part.from_json(data).blob.path
            except ValueError:  # of another version, or damaged: a run makes it again
                blob = None
            self._blob_of_piece[path] = blob
        return {path: self._blob_of_piece[path] for path in paths}

    def _upstream(self, doomed: Mapping[str, Doomed]) -> dict[str, tuple[str, ...]]:
        links = {path: self._links.get(path) for path, d in doomed.items() if d.kind == "manifest"}
        return {path: found.upstream for path, found in links.items() if isinstance(found, _Links)}


_WHY: dict[Kind, str] = {
    "manifest": "no head reaches it",
    "piece": "nothing kept has its table",
    "blob": "nothing kept names it",
    "journal": "nothing kept is about its coder",
    "temporary": "a killed process left it",
}


def _kind_of(path: str) -> Kind | None:
    """What a file is; null for what is never pruned."""
    top = path.split("/", maxsplit=1)[0]
    if is_temporary(path):
        return "temporary"
    if top in _KEPT:
        return None
    if top == "journal":
        is_segment = path.endswith(".parquet") and path.split("/")[1] in STAGES
        return "journal" if is_segment else None
    if top == "parts":
        return "piece"
    if top == "blobs":
        return "blob"
    return "manifest" if is_manifest(path) else None


def _newest_of_each_coder(files: Mapping[str, StoredFile]) -> dict[str, float]:
    """When the newest segment of the journal about each coder was written, over all stages."""
    newest: dict[str, float] = {}
    for path, file in files.items():
        if _kind_of(path) == "journal":
            coder = path.split("/")[2]
            newest[coder] = max(newest.get(coder, 0.0), file.written)
    return newest


def _in_bulk(store: Store, paths: list[str]) -> Iterator[tuple[str, Manifest | StoreError]]:
    for start in range(0, len(paths), _TOGETHER):
        yield from read_manifests(store, set(paths[start : start + _TOGETHER])).items()


_TOGETHER = 1024
"""Manifests that are in memory at once."""
