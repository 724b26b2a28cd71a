"""Every head of a study, or of a whole store, read at once."""

from typing import NamedTuple

from autointerp_dagster.adapters.bulk import list_files, read_files
from autointerp_dagster.adapters.manifests import Manifest, checked_manifest, is_manifest
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.errors import StoreError

Name = tuple[str, str]
"""(asset, place)."""


class Heads(NamedTuple):
    """What the heads of a study point at."""

    manifests: dict[Name, Manifest]
    damaged: dict[Name, str]
    """Of the others: why their manifest cannot be read."""


def read_heads(store: Store, study: str) -> Heads:
    """The present manifest of every place of a study that was ever made.

    Raises:
        StoreError: If the store does not answer.
    """
    pointers = read_pointers(store, f"heads/{study}")
    read = read_manifests(store, set(pointers.values()))
    manifests: dict[Name, Manifest] = {}
    damaged: dict[Name, str] = {}
    for head, path in pointers.items():
        _, _, asset, cell = head.split("/", maxsplit=3)
        found = read[path]
        if isinstance(found, Manifest):
            manifests[asset, cell] = found
        else:
            damaged[asset, cell] = str(found)
    return Heads(manifests, damaged)


def read_pointers(store: Store, folder: str = "heads") -> dict[str, str]:
    """Of every head below a folder, by its path: the path of the manifest that it points at.

    Raises:
        StoreError: If the store does not answer.
    """
    paths = [path for path in list_files(store.root, folder) if not is_temporary(path)]
    contents = read_files(store.root, sorted(paths))
    return {
        path: data.decode(errors="replace").strip() for path, data in contents if data is not None
    }


def read_manifests(store: Store, paths: set[str]) -> dict[str, Manifest | StoreError]:
    """Manifests by path; of one that is missing, damaged or of another version the error.

    Raises:
        StoreError: If the store does not answer.
    """
    found: dict[str, Manifest | StoreError] = {
        path: StoreError(f"{store.root}/{path!r}: no manifest's path.")
        for path in paths
        if not is_manifest(path)
    }
    for path, data in read_files(store.root, sorted(paths - found.keys())):
        try:
            found[path] = (
                lost(store, path) if data is None else checked_manifest(store.root, path, data)
            )
        except StoreError as error:
            found[path] = error
    return found


def lost(store: Store, path: str) -> StoreError:
    """The error of a file that is not there."""
    return StoreError(f"{store.root}/{path}: missing. Materialize the cell that wrote it again.")


def is_temporary(path: str) -> bool:
    """Whether a file is one that a write begins with; a killed one leaves it."""
    name = path.rsplit("/", maxsplit=1)[-1]
    return name.startswith(".") and name.endswith((".tmp", ".new"))
