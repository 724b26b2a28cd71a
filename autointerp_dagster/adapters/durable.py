"""Files of a store, local or remote, that are wholly there after any crash, or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upath import UPath

from autointerp_dagster.adapters.local_files import write_whole
from autointerp_dagster.core.errors import StoreError

_LOCAL = frozenset({"", "file", "local"})


def is_local(root: UPath) -> bool:
    """Whether ``root`` is a folder of this machine."""
    return root.protocol in _LOCAL


@contextmanager
def store_errors(path: UPath) -> Iterator[None]:
    """Work on a store, whose failures are OSErrors whatever library speaks to it.

    botocore's and gcsfs's exceptions, for example, are plain ones. They are known by their type
    alone: what they say may hold signed addresses.

    Raises:
        OSError: If the store failed.
    """
    try:
        yield
    except (OSError, StoreError):
        raise
    except Exception as error:
        if is_local(path):
            raise
        raise OSError(f"{path}: the store failed with {type(error).__name__}") from error


def write_durably(target: UPath, content: bytes | memoryview) -> None:
    """Return once ``target`` holds ``content`` and would after a crash.

    A reader sees nothing or all of it. Whoever writes the same content at the same time does no
    harm.

    Raises:
        OSError: If it cannot be written.
    """
    if not is_local(target):
        with store_errors(target):
            target.fs.pipe_file(target.path, content)  # one PUT: all or nothing
        return
    path = Path(target.path)
    write_whole(path, content)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Return once new names in ``folder`` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
