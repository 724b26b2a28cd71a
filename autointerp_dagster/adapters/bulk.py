"""Many files of a store at once: listed with size and age, and read together.

One request a file is nothing on a local disk and minutes for the thousands of small files of a
study behind a URL; what looks at all of them does it here.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from upath import UPath

from autointerp_dagster.adapters.durable import reading
from autointerp_dagster.adapters.remote import is_local, store_errors
from autointerp_dagster.core.errors import StoreError

_TOGETHER = 256
"""Files that are read at once; heads and manifests are a few KB each."""
_VERSIONS = ("ETag", "etag", "ino")
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
"""What the file systems call the time of the last write: local, s3, abfs, gcs, ..., memory."""


class StoredFile(NamedTuple):
    """What a listing says of a file."""

    n_bytes: int
    written: float
    """When, in seconds since 1970, by the store's clock."""
    version: str = ""
    """What else tells two writes apart, where the store says it: S3's clock counts seconds."""


def list_files(root: UPath, folder: str) -> dict[str, StoredFile]:
    """Every file below a folder of a store, by its path relative to the root.

    Empty if there is no such folder.

    Raises:
        StoreError: If the store cannot be listed, or does not say when a file was written.
    """
    base = _base(root)
    with _listing(root, folder):
        if is_local(root):
            return dict(_local_files(base, folder))
        found = root.fs.find(f"{base}/{folder}".rstrip("/"), detail=True)
    assert isinstance(found, dict)
    return {  # a folder is named where its first file came while this looked
        str(path).removeprefix(f"{base}/"): stored_file(root, info)
        for path, info in found.items()
        if info["type"] != "directory"
    }


def look_at(root: UPath, path: str) -> StoredFile | None:
    """One file as it is now; null if there is none.

    Raises:
        StoreError: If the store does not answer.
    """
    with _listing(root, path):
        try:
            return stored_file(root, root.fs.info(f"{_base(root)}/{path}"))
        except FileNotFoundError:
            return None


def read_files(root: UPath, paths: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
    """The content of small files, in the order given; null for one that is not there.

    Raises:
        StoreError: If the store does not answer.
    """
    base, wanted = _base(root), list(paths)
    for start in range(0, len(wanted), _TOGETHER):
        some = wanted[start : start + _TOGETHER]
        with _listing(root, some[0]):
            found: Any = root.fs.cat([f"{base}/{path}" for path in some], on_error="return")
        contents = {str(path).removeprefix(f"{base}/"): data for path, data in found.items()}
        for path in some:
            data = contents[path]
            if isinstance(data, FileNotFoundError):
                yield path, None
            elif isinstance(data, Exception):
                with reading(root, path), store_errors(root):
                    raise data
            else:
                yield path, data


def remove(root: UPath, seen: Mapping[str, StoredFile]) -> None:
    """Deletes files; it is no matter if some are gone, or are written anew meanwhile.

    S3 answers that all is well also where it refused to delete some files, and its library does not
    look: so this looks for them again.

    Args:
        root: The store.
        seen: The files by path, as they were when they were last looked at.

    Raises:
        OSError: If one cannot be deleted.
        StoreError: If the store does not answer.
    """
    base = _base(root)
    if is_local(root):
        for path in seen:
            Path(f"{base}/{path}").unlink(missing_ok=True)
        return
    with store_errors(root):
        try:
            root.fs.rm([f"{base}/{path}" for path in seen])
        except FileNotFoundError:  # somebody else was faster with one: the others are left
            for path in seen:
                with suppress(FileNotFoundError):
                    root.fs.rm_file(f"{base}/{path}")
    left = [path for path, file in _still_there(root, list(seen)) if file == seen[path]]
    if left:
        more = f" and {len(left) - 1} others" if len(left) > 1 else ""
        raise OSError(
            f"the store keeps {left[0]}{more}. Check that the credentials may delete there (on S3: "
            "s3:DeleteObject, and no object lock)"
        )


def _still_there(root: UPath, paths: list[str]) -> Iterator[tuple[str, StoredFile]]:
    """Those of some files that are there, by one request where they lie side by side."""
    if len(paths) == 1:
        file = look_at(root, paths[0])
        if file is not None:
            yield paths[0], file
        return
    files = list_files(root, os.path.commonpath([path.rpartition("/")[0] for path in paths]))
    yield from ((path, files[path]) for path in paths if path in files)


def stored_file(root: UPath, info: Mapping[str, Any]) -> StoredFile:
    """What a file system's own words say of a file.

    Raises:
        StoreError: If they do not say when it was written.
    """
    for name in _TIMES:
        when = info.get(name)
        if isinstance(when, str):
            when = datetime.fromisoformat(when)
        if isinstance(when, datetime):
            when = when.timestamp()
        if when is not None:
            version = next((str(info[name]) for name in _VERSIONS if name in info), "")
            return StoredFile(int(info["size"] or 0), float(when), version)
    raise StoreError(
        f"{root}: this kind of store does not say when a file was written, so what may be removed "
        "cannot be told. Use a local folder, s3://, gs:// or abfs://."
    )


def _local_files(base: str, folder: str) -> Iterator[tuple[str, StoredFile]]:
    """Not by fsspec, to which a folder that a shared disk fails to list is an empty one."""
    for parent, _, names in os.walk(os.path.join(base, folder), onerror=_raise_unless_gone):
        for name in names:
            path = os.path.join(parent, name)
            with suppress(FileNotFoundError):
                about = os.stat(path)
                yield os.path.relpath(path, base), _local_file(about)


def _local_file(about: os.stat_result) -> StoredFile:
    return StoredFile(about.st_size, about.st_mtime, str(about.st_ino))


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _base(root: UPath) -> str:
    """The root's path as the file system writes it in front of a file's."""
    return str(Path(root.path).absolute()) if is_local(root) else root.path.rstrip("/")


@contextmanager
def _listing(root: UPath, what: str) -> Iterator[None]:
    try:
        with store_errors(root):
            yield
    except OSError as error:
        raise StoreError(f"{root}/{what}: cannot be looked at: {error}.") from error
