"""A disk that is full in the middle of a run, and has room again for the next one.

Each disk is a file system of its own in memory, which takes root to mount.
"""

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measure import NotMeasured, Result
from rehearsals.faults.rehearsal import Rehearsal, none, say
from rehearsals.faults.trial import n_differing

N_STORES = 6
"""Runs whose store's disk is full after some share of what the study takes."""
_SPOOL_BYTES = 16_384
_HOME_SHARE = 0.3
"""Of the records of two runs: what the undisturbed home holds."""

Figures = Iterator[Result | NotMeasured]


def disk(rehearsal: Rehearsal) -> Figures:
    """The store's disk at several moments, then the spool's, then that of Dagster's records."""
    reason = _cannot_mount()
    if reason:
        yield NotMeasured("full disk", reason)
        return
    home = _room(Path(rehearsal.undisturbed.environment["DAGSTER_HOME"]))
    whole = _room(Path(rehearsal.undisturbed.root))
    shares = [(i + rehearsal.rng.random()) / (N_STORES + 1) for i in range(N_STORES)]
    disks = [(f"store at {share:.0%}", "store", int(share * whole)) for share in shares]
    disks += [("spool", "spool", _SPOOL_BYTES), ("home", "home", int(_HOME_SHARE * home))]
    n_failed = n_plain = n_damaged = n_differ = n_stale = n_made = 0
    for name, folder, n_bytes in disks:
        trial = rehearsal.trial(f"disk-{name.replace(' ', '-')}")
        with _small_disk(trial.folder / folder, n_bytes):
            process = trial.start()
            process.join()
            is_plain = not trial.has_traceback() and str(trial.folder / folder) in trial.error()
            n_failed += process.exitcode != 0
            n_plain += is_plain
            say(f"full disk of {name}: {trial.error()}")
            if not is_plain:
                say(trial.output.read_text()[-3000:])
            n_made = len(trial.contents())  # the last is of Dagster's records
            say(f"full disk of {name}: {n_made} places made before")
            n_damaged += len(trial.faults())
            _enlarge(trial.folder / folder)
            trial.run()
            n_damaged += len(trial.faults())
            n_differ += n_differing(trial.contents(), rehearsal.contents)
            n_stale += len(trial.stale())
    n = len(disks)
    yield Result("full disk: runs that it ended", n_failed, n, "runs")
    yield Result("full disk: of these, told in one line that names the path", n_plain, n, "runs")
    yield Result("full disk of Dagster's records: places made before", n_made, 1, "places")
    yield none("full disk: damaged files", n_damaged, "files")
    yield none("full disk: places that differ in the end", n_differ, "places")
    yield none("full disk: places out of date in the end", n_stale, "places")


def _room(folder: Path) -> int:
    """Bytes that the files of a folder take on a file system with blocks of 4 kB."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in files)


def _cannot_mount() -> str | None:
    """Why no file system can be mounted here."""
    with tempfile.TemporaryDirectory() as name:
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return f"a small file system cannot be mounted: {error}"
        if done.returncode == 0:
            subprocess.run(["umount", name], check=True)
            return None
    return f"a small file system cannot be mounted (this takes root): {done.stderr.strip()}"


@contextmanager
def _small_disk(folder: Path, n_bytes: int) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    size = f"size={max(n_bytes, 4096)}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _enlarge(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)
