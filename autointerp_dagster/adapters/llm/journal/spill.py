"""Arrays that need not lie in memory: on this machine's disk, in files without a name."""

import mmap
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def mapped(arrays: Sequence[np.ndarray], folder: Path) -> list[np.ndarray]:
    """The same arrays, to be read only, in a file that the system reads as they are used.

    The file has no name and is gone with the last of the arrays, or with the process.

    Args:
        arrays: Those of larger items first, so that all of them stay aligned.
        folder: On a disk of this machine.

    Raises:
        OSError: If the disk is full or cannot be written.
    """
    if not any(array.nbytes for array in arrays):
        return list(arrays)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        for array in arrays:
            file.write(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
        file.flush()
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    found: list[np.ndarray] = []
    start = 0
    for array in arrays:
        flat = np.frombuffer(content, array.dtype, array.size, start)
        found.append(flat.reshape(array.shape))
        start += array.nbytes
    return found
