"""The folders of spools: made, locked while a process uses them, and swept when forgotten.

A lock is the kernel's (``flock``): it ends with its process, however that ends.
"""

import fcntl
import logging
import os
import re
import shutil
import tempfile
import time
import uuid
import weakref
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Self

from autointerp_dagster.adapters.cache.plan import PassPlan
from autointerp_dagster.core.errors import StoreError

SPOOL_VARIABLE = "AUTOINTERP_SPOOL"
"""Environment variable: the folder for spools, on a local disk."""

SWEPT_AFTER_S = 7 * 24 * 3600.0
"""Age at which a spool that nobody uses is removed, in seconds."""

_LOCK = "lock"
_NAME = re.compile(r"\.?[0-9a-f]{16}-[0-9a-f]{8}")

_logger = logging.getLogger(__name__)


def default_spool_dir() -> Path:
    """Where spools are: ``$AUTOINTERP_SPOOL``, or this user's folder among the temporary files.

    The latter is made if need be, for this user alone.

    Raises:
        StoreError: If somebody else has made it.
    """
    named = os.environ.get(SPOOL_VARIABLE)
    if named:
        return Path(named)
    path = Path(tempfile.gettempdir()) / f"autointerp-spool-{os.getuid()}"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    about = path.lstat()
    if about.st_uid != os.getuid() or path.is_symlink():
        raise StoreError(
            f"spool {path}: belongs to user {about.st_uid} or is a link, wanted a folder of user "
            f"{os.getuid()}. Name a folder of your own on a local disk in {SPOOL_VARIABLE}."
        )
    path.chmod(0o700)
    return path


class SpoolFolder:
    """A folder that no other process uses until it is released."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock: int | None = lock
        _release_in_forks()
        _held.add(self)

    @classmethod
    def new(cls, root: Path, key: str) -> Self:
        """Makes an empty folder for a pass of this key.

        Raises:
            OSError: If it cannot be made.
        """
        name = f"{key}-{uuid.uuid4().hex[:8]}"
        hidden = root / f".{name}"  # nobody looks for it there before it is locked
        hidden.mkdir(parents=True, mode=0o700)
        found = cls.claim(hidden)
        assert found is not None
        found.path = hidden.rename(root / name)
        return found

    @classmethod
    def claim(cls, path: Path) -> Self | None:
        """Locks a folder; null if another process has it, it is another user's, or it is gone."""
        try:
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except (FileNotFoundError, PermissionError):
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        if not (path / _LOCK).exists():  # its last user removed it meanwhile
            os.close(lock)
            return None
        return cls(path, lock)

    def release(self) -> None:
        """Lets others use it. Does nothing the second time."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
            _held.discard(self)

    def remove(self) -> None:
        """Removes the folder; first the plan, without which nobody finds it. Not once released."""
        if self._lock is None:
            return
        PassPlan.path_in(self.path).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()


_held: weakref.WeakSet[SpoolFolder] = weakref.WeakSet()


@cache
def _release_in_forks() -> None:
    """A forked child would hold its parent's locks on, beyond the parent's death."""
    os.register_at_fork(after_in_child=lambda: [folder.release() for folder in list(_held)])


def folders_of(root: Path, key: str) -> Iterator[Path]:
    """The folders of passes with this key, in no particular order."""
    yield from root.glob(f"{key}-*/")


def forgotten(root: Path) -> list[Path]:
    """Spools that nobody has touched for a week, by name; another process may still lock one."""
    found = root.iterdir() if root.is_dir() else ()
    return sorted(
        path
        for path in found
        if _NAME.fullmatch(path.name) and time.time() - _last_touched(path) >= SWEPT_AFTER_S
    )


def sweep(root: Path) -> list[Path]:
    """Removes spools that nobody uses and nobody has touched for a week; returns which."""
    removed = []
    for path in forgotten(root):
        folder = SpoolFolder.claim(path)
        if folder is not None:
            _logger.info("removed the spool %s, which nobody touched for a week", path)
            folder.remove()
            removed.append(path)
    return removed


def _last_touched(path: Path) -> float:
    times = [0.0]
    for file in [path, *path.glob("*")]:
        try:
            times.append(file.stat().st_mtime)
        except FileNotFoundError:  # its user is at work
            return time.time()
    return max(times)
