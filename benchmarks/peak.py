"""How much memory a piece of work needs at most, on Linux."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_mb(work: Callable[[], object]) -> float:
    """Largest resident memory during the work, beyond what was resident before it, in MB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still resident would hide a need
    _CLEAR.write_text("5")  # sets the peak to what is resident now
    before = _kb("VmRSS")
    work()
    return (_kb("VmHWM") - before) / 1024


def _kb(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
