"""Files of this machine: written whole or not at all, and swept when a killed process left them."""

import os
import time
import uuid
from contextlib import suppress
from pathlib import Path

TEMPORARY = ".autointerp-"
"""How the name of a temporary file begins that takes long to write."""

_FORGOTTEN_AFTER_S = 24 * 3600.0


def write_whole(target: Path, data: bytes | memoryview) -> None:
    """Writes a local file: it is there with all of its bytes, on disk, or as it was before.

    Raises:
        OSError: If it cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def remove_forgotten(folder: Path) -> None:
    """Removes temporary files that nobody has written to for a day."""
    for path in folder.glob(f"{TEMPORARY}*.tmp"):
        with suppress(OSError):  # gone meanwhile, or another user's
            if time.time() - path.stat().st_mtime >= _FORGOTTEN_AFTER_S:
                path.unlink()


def remove_unless_written_since(path: Path, moment: float) -> bool:
    """Removes a file unless it was written or touched after a moment; whether it is gone.

    It gets another name first and is looked at then, so whoever touches it meanwhile either keeps
    it, or is told that there is no such file. Killed in between, it leaves a temporary file.

    Args:
        path: The file; nothing happens if there is none.
        moment: Seconds since 1970, by the file system's clock.

    Raises:
        OSError: If it cannot be removed.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.rename(aside)
        if aside.stat().st_mtime > moment:
            aside.rename(path)
            return False
        aside.unlink()
    except FileNotFoundError:  # somebody else removes the same
        return True
    return True
