"""Files that are used again count as new, so that pruning a store at that moment keeps them.

Nothing that names a file protects it before a head does. What protects it until then is its age:
whoever takes a file that was there before makes it young first, see
:mod:`~autointerp_dagster.adapters.pruning`.
"""

import os
import time
from pathlib import Path

from upath import UPath

from autointerp_dagster.adapters.bulk import look_at
from autointerp_dagster.adapters.durable import read_whole, write_durably
from autointerp_dagster.adapters.remote import is_local

_YOUNG_S = 12 * 3600.0
"""Half of the age at which anything is ever pruned; clocks may differ by the other half."""


def renew(root: UPath, path: str) -> bool:
    """Makes a small file of a store young; whether there is such a file.

    Raises:
        OSError: If the store does not answer.
        StoreError: Likewise.
    """
    file = root / path
    if is_local(root):
        return touch(Path(file.path))
    found = look_at(root, path)
    if found is not None and not _is_young(found.written):
        write_durably(file, read_whole(file))
    return found is not None


def is_reusable(root: UPath, path: str) -> bool:
    """Whether a file is there and young, made so if that takes no writing.

    Raises:
        StoreError: If the store does not answer.
    """
    if is_local(root):
        return touch(Path((root / path).path))
    found = look_at(root, path)
    return found is not None and _is_young(found.written)


def touch(path: Path) -> bool:
    """Makes a local file young; whether there is such a file."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except PermissionError:  # another user's, who alone can make it young
        return path.exists()
    return True


def _is_young(written: float) -> bool:
    return time.time() - written < _YOUNG_S
