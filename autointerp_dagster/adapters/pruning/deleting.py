"""Deleting what a survey found, so that nothing that is kept ever names what is gone.

1. In this order: manifests, those that nothing names before those that they name; pieces; blobs;
   answers; what killed processes left. Killed anywhere, it leaves only files that nothing names.
2. Before each step the store is looked at again, heads included: what a run has named meanwhile
   stays.
3. Each file's age is looked at again right before it goes. A run that takes up an old file makes
   it young first (``renewing.py``).

On a local store a file that is taken up meanwhile is never lost. A remote store cannot look and
delete at once: a run that takes up a file within the second between finds its cell missing later,
and makes it again.
"""

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from graphlib import TopologicalSorter
from itertools import groupby
from pathlib import Path

from upath import UPath

from autointerp_dagster.adapters.bulk import list_files, look_at, remove
from autointerp_dagster.adapters.durable import write_durably
from autointerp_dagster.adapters.local_files import remove_unless_written_since
from autointerp_dagster.adapters.pruning.survey import Doomed, Found, Kind, Survey
from autointerp_dagster.adapters.remote import is_local, store_errors
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.types import Progress, silent

_THEN: tuple[Kind, ...] = ("piece", "blob", "journal", "temporary")
_TOGETHER = 1000
"""Files that a remote store deletes by one request."""


def prune(survey: Survey, found: Found, progress: Progress = silent) -> list[Doomed]:
    """Deletes what was found, unless it is needed by now; returns what was deleted.

    Args:
        survey: Of the store.
        found: What it said; nothing else is deleted.
        progress: Shows how far it is.

    Raises:
        StoreError: If the store does not answer, or does not let a file be deleted.
    """
    removed: list[Doomed] = []
    deletions = _deletions(survey, found, removed)
    for _ in progress(deletions, total=len(found.doomed), description="gc", unit="files"):
        pass
    return removed


def _deletions(survey: Survey, found: Found, removed: list[Doomed]) -> Iterator[None]:
    """Goes on by one for each file that was looked at."""
    for step in _steps(found):
        still = survey.look().doomed
        due = [doomed for doomed in step if doomed.path in still]
        gone = _remove_old(survey, due) if due else set[str]()
        removed += [doomed for doomed in due if doomed.path in gone]
        yield from (None for _ in step)


def _steps(found: Found) -> Iterator[list[Doomed]]:
    """What may be deleted together."""
    for paths in _generations(found.upstream):
        yield [found.doomed[path] for path in paths]
    unreadable = [d for d in found.doomed.values() if d.kind == "manifest"]
    yield [d for d in unreadable if d.path not in found.upstream]
    for kind in _THEN:
        yield [doomed for doomed in found.doomed.values() if doomed.kind == kind]


def _generations(upstream: Mapping[str, tuple[str, ...]]) -> Iterator[list[str]]:
    """Manifests in groups: whatever names one of a group is in a group before."""
    order = TopologicalSorter[str]()
    for path, above in upstream.items():
        order.add(path)
        for other in above:
            if other in upstream:
                order.add(other, path)
    order.prepare()
    while order.is_active():
        ready = order.get_ready()
        yield sorted(ready)
        order.done(*ready)


def _remove_old(survey: Survey, doomed: Sequence[Doomed]) -> set[str]:
    """Deletes files of one kind that are still old; their paths, and of those gone already."""
    root, kind = survey.store.root, doomed[0].kind
    moment = survey.clock() - survey.limit_s(kind)
    try:
        with store_errors(root):
            if is_local(root):
                return {
                    one.path
                    for one in doomed
                    if remove_unless_written_since(Path((root / one.path).path), moment)
                }
            return _remove_remote(root, [one.path for one in doomed], moment)
    except OSError as error:
        raise StoreError(
            f"{root}: a file cannot be deleted: {error}. What is there is whole; fix the "
            "permissions and run gc again."
        ) from error


def _remove_remote(root: UPath, paths: Sequence[str], moment: float) -> set[str]:
    gone: set[str] = set()
    for folder, group in groupby(sorted(paths), key=_listed_together):
        inside = list(group)
        for start in range(0, len(inside), _TOGETHER):
            files = list_files(root, folder)
            some = inside[start : start + _TOGETHER]
            gone |= {path for path in some if path not in files}
            old = [path for path in some if path in files and files[path].written <= moment]
            if old:
                remove(root, {path: files[path] for path in old})
                gone |= set(old)
    return gone


def _listed_together(path: str) -> str:
    """A folder that is small enough to be listed anew before each deletion, e.g. ``blobs/ab``."""
    return "/".join(path.split("/")[:-1][:2])


def clock_of(store: Store) -> float:
    """What the store's clock is ahead of this machine's, in seconds; writes a file for a moment.

    Raises:
        StoreError: If the store cannot be written.
    """
    name = f".autointerp-{uuid.uuid4().hex}.tmp"
    if is_local(store.root) and not store.root.exists():
        return 0.0
    try:
        with store_errors(store.root):
            before = time.time()
            write_durably(store.root / name, b"what time is it")
            found = look_at(store.root, name)
            if found is not None:
                remove(store.root, {name: found})
    except OSError as error:
        raise StoreError(f"{store.root}: cannot be written, so not pruned: {error}.") from error
    return 0.0 if found is None else found.written - before
