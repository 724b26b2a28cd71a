"""Files of a store, local or remote, that are wholly there after any crash, or not at all."""

import errno
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upath import UPath

from autointerp_dagster.adapters.local_files import TEMPORARY, remove_forgotten, write_whole
from autointerp_dagster.adapters.remote import is_local, store_errors
from autointerp_dagster.core.errors import StoreError

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


def write_durably(target: UPath, content: bytes | memoryview) -> None:
    """Return once ``target`` holds ``content`` and would after a crash.

    A reader sees nothing or all of it. Whoever writes the same content at the same time does no
    harm.

    Raises:
        OSError: If it cannot be written.
    """
    if not is_local(target):
        with store_errors(target):
            # One PUT: all or nothing. S3's library refuses a view of bytes.
            target.fs.pipe_file(target.path, bytes(content))
        return
    path = Path(target.path)
    write_whole(path, content)
    sync_folder(path.parent)


def read_whole(source: UPath) -> bytes:
    """What a file holds; a remote one is read by one request, so never half of each of two writes.

    Raises:
        FileNotFoundError: If there is none.
        OSError: If it cannot be read.
    """
    if is_local(source):
        return Path(source.path).read_bytes()
    with store_errors(source):
        data = source.fs.cat_file(source.path)
    assert isinstance(data, bytes)
    return data


@contextmanager
def here(source: UPath) -> Iterator[Path]:
    """A file on this machine: a local one itself, of a remote one a copy that goes afterwards.

    Raises:
        FileNotFoundError: If there is none.
        OSError: If it cannot be read.
        StoreError: If there is no room for a copy.
    """
    if is_local(source):
        yield Path(source.path)
        return
    copy = temporary_file()
    try:
        with copying():
            remove_forgotten(copy.parent)
            copy.touch()
        with _no_room_told(), store_errors(source):
            source.fs.get_file(source.path, str(copy))
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def temporary_file(folder: Path | None = None) -> Path:
    """A new name that ``remove_forgotten`` knows; in ``tempfile.gettempdir()`` by default."""
    return (folder or Path(tempfile.gettempdir())) / f"{TEMPORARY}{uuid.uuid4().hex}.tmp"


@contextmanager
def copying() -> Iterator[None]:
    """Writing a copy on this machine of what a remote store has or gets.

    Raises:
        StoreError: If it cannot be written; names the folder.
    """
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{tempfile.gettempdir()}: a temporary copy cannot be written: {error}. Free space "
            "there, or set TMPDIR to a folder with room, and run again."
        ) from error


@contextmanager
def _no_room_told() -> Iterator[None]:
    """What this machine's disk says while a file comes from another machine."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        with copying():
            raise


def is_damage(error: Exception) -> bool:
    """Whether a local file was read and is not what it should be, so that it may be read no more.

    Else the system could not read it now, which says nothing of what is in it. Arrow calls damage
    an OSError, too, but without the number that every error of the system has.
    """
    if isinstance(error, MemoryError):  # Arrow's, too
        return False
    return not isinstance(error, OSError) or error.errno is None


@contextmanager
def reading(root: UPath, path: str) -> Iterator[None]:
    """Reading a file of a store that should be there.

    Raises:
        StoreError: If it is not, or cannot be read.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise StoreError(
            f"{root}/{path}: missing. Materialize the cell that wrote it again."
        ) from error
    except OSError as error:
        raise StoreError(f"{root}/{path}: cannot be read: {error}.") from error


@contextmanager
def writing(root: UPath, path: str) -> Iterator[None]:
    """Writing a file of a store.

    Raises:
        StoreError: If it cannot be written.
    """
    try:
        yield
    except OSError as error:
        remedy = "free space or fix the permissions and run" if is_local(root) else "run"
        raise StoreError(
            f"{root}/{path}: cannot be written: {error}. Nothing of it will be read; {remedy} "
            "again."
        ) from error


@contextmanager
def deleting(root: UPath, path: str) -> Iterator[None]:
    """Deleting a file of a store.

    Raises:
        StoreError: If it cannot be deleted.
    """
    try:
        yield
    except OSError as error:
        raise StoreError(f"{root}/{path}: cannot be deleted: {error}.") from error


def sync_folder(folder: Path) -> None:
    """Return once new names in ``folder`` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
