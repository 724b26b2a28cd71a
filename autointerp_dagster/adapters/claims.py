"""Of several processes that would do a thing, one does it: claims in a store, which lapse.

Dagster has no write that only the first can make, nor has every store. Here each writes its claim
and only then looks for others: of two, one at least sees the other's, and whoever sees one gives
way. Both may, so what is not done in the end is claimed again by a later try.

    <folder>/<random>.json    the names of what somebody is about to do
"""

import json
import uuid
from collections.abc import Collection

from upath import UPath

from autointerp_dagster.adapters.bulk import list_files, look_at, read_files, remove
from autointerp_dagster.adapters.durable import deleting, write_durably, writing
from autointerp_dagster.adapters.heads import is_temporary
from autointerp_dagster.core.errors import StoreError

LAPSES_S = 180.0
"""Longer than it takes from a claim to what shows that the thing is done, such as Dagster's run."""


class Claim:
    """Some names of one folder, for whoever makes this first."""

    def __init__(self, root: UPath, folder: str, names: Collection[str]) -> None:
        """Claims names, and takes away claims that have lapsed.

        Args:
            root: The store.
            folder: Of the claims, relative to it.
            names: What is about to be done.

        Raises:
            StoreError: If the store cannot be read or written.
        """
        self._root, self._path = root, f"{folder}/{uuid.uuid4().hex}.json"
        self._write(names)
        files = list_files(root, folder)
        if self._path not in files:
            raise StoreError(f"{root}/{self._path}: was written, and is not there. Run again.")
        now = files.pop(self._path).written  # the store's clock tells the age, nobody else's
        old = {path: file for path, file in files.items() if now - file.written > LAPSES_S}
        with deleting(root, folder):
            for path, seen in old.items():
                remove(root, {path: seen})
        self.granted = set(names) - self._taken(files.keys() - old.keys())
        """Those that nobody else has claimed."""
        if not self.granted:
            self.release()
        elif self.granted != set(names):
            self._write(self.granted)

    def release(self) -> None:
        """Done, or given up: others need not wait until the claim lapses.

        Raises:
            StoreError: If the store cannot be written.
        """
        seen = look_at(self._root, self._path)
        if seen is not None:
            with deleting(self._root, self._path):
                remove(self._root, {self._path: seen})

    def _taken(self, paths: Collection[str]) -> set[str]:
        taken: set[str] = set()
        for _, data in read_files(self._root, sorted(p for p in paths if not is_temporary(p))):
            if data is not None:  # released meanwhile
                taken.update(json.loads(data))
        return taken

    def _write(self, names: Collection[str]) -> None:
        with writing(self._root, self._path):
            write_durably(self._root / self._path, json.dumps(sorted(names)).encode())
