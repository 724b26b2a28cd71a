"""A study that is run in processes of its own, by the command itself, and what became of it."""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from autointerp_dagster.adapters.heads import Name, read_heads
from autointerp_dagster.adapters.pruning.deleting import prune
from autointerp_dagster.adapters.pruning.survey import DAY_S, Survey
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.adapters.verifying import verify
from autointerp_dagster.cli.main import app
from autointerp_dagster.resources.staleness import out_of_date
from autointerp_dagster.resources.versions import CHECKOUT
from autointerp_dagster.study import Study, load_study

_PRELOADED = ["rehearsals.faults.trial", "torch", "transformers", "sentence_transformers"]
_LATER_S = 40 * DAY_S
_started: list[BaseProcess] = []


@dataclass
class Trial:
    """One study with a store, a spool and a Dagster home of its own, all below ``folder``."""

    folder: Path
    write: Callable[[Path, str], Path]
    """Writes the study file, given a folder for it and the store's root."""
    environment: dict[str, str] = field(default_factory=dict)
    """Of its processes, beside this one's."""
    root: str = ""
    """Of the store; ``folder/store`` by default."""

    def __post_init__(self) -> None:
        """Writes the study file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.root = self.root or str(self.folder / "store")
        self.path = self.write(self.folder, self.root)
        self.environment = {
            "DAGSTER_HOME": str(self.folder / "home"),
            "AUTOINTERP_SPOOL": str(self.folder / "spool"),
            "AUTOINTERP_STUDIES": str(self.path.parent),
            "DAGSTER_DISABLE_TELEMETRY": "1",
            **self.environment,
        }

    @property
    def study(self) -> Study:
        """As it is loaded."""
        return load_study(self.path)

    @property
    def store(self) -> Store:
        """The study's."""
        return Store(self.root)

    def start(self, *arguments: str, home: str | None = None) -> BaseProcess:
        """Begins ``autointerp run`` in a group of its own, from modules that are loaded already.

        Args:
            arguments: Beside the study.
            home: Another folder for Dagster's records.
        """
        environment = self.environment | ({"DAGSTER_HOME": home} if home else {})
        make_home(Path(environment["DAGSTER_HOME"]))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        command = ["run", str(self.path), *arguments]
        process = context.Process(target=_run, args=(command, environment, self.output))
        process.start()
        _started.append(process)
        return process

    @property
    def output(self) -> Path:
        """What the last run printed."""
        return self.folder / "output"

    def run(self, *arguments: str) -> float:
        """A run that must succeed; its seconds.

        Raises:
            AssertionError: If it does not.
        """
        started = time.monotonic()
        process = self.start(*arguments)
        process.join()
        if process.exitcode != 0:
            raise AssertionError(f"a run that nothing disturbed failed:\n{self.output.read_text()}")
        return time.monotonic() - started

    def error(self) -> str:
        """The line that the last run ended with."""
        lines = self.output.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def has_traceback(self) -> bool:
        """Whether the last run showed a person the code that failed."""
        return "Traceback (most recent call last)" in self.output.read_text(errors="replace")

    def contents(self) -> dict[Name, str]:
        """The content hash of every complete place: its tables row by row, its tensors."""
        heads = read_heads(self.store, self.study.name).manifests
        return {name: head.content_hash for name, head in heads.items() if head.complete}

    def faults(self) -> list[str]:
        """What ``autointerp verify`` finds."""
        found = verify(self.store, self.study.name).faults
        return [f"{fault.path}: {fault.text}" for fault in found]

    def stale(self) -> list[str]:
        """What ``autointerp stale`` lists."""
        found = out_of_date(self.study, self.store)
        return [f"{one.asset} {one.cell}: {one.causes}" for one in found]

    def n_spooled(self) -> int:
        """Files of spools; a pass that was ended leaves its own for the next one, or for a week."""
        return sum(path.is_file() for path in (self.folder / "spool").rglob("*"))

    def prune(self) -> int:
        """Deletes what nothing needs, as ``autointerp gc`` in 40 days; how many files went."""
        survey = Survey(self.store, clock=lambda: time.time() + _LATER_S)
        return len(prune(survey, survey.look()))

    def n_made(self) -> Counter[str]:
        """Heads by stage; of a local store only, and cheap."""
        heads = Path(self.root) / "heads" / self.path.stem
        return Counter(
            path.relative_to(heads).parts[0]
            for path in heads.rglob("*")
            if not path.name.startswith(".") and path.is_file()
        )


def make_home(home: Path) -> None:
    """A folder for Dagster's records, with the settings that come along: pools have limits."""
    home.mkdir(parents=True, exist_ok=True)
    settings = home / "dagster.yaml"
    if not settings.exists():
        settings.write_text((CHECKOUT / "dagster_home" / "dagster.yaml").read_text())


def n_differing(found: Mapping[Name, str], wanted: Mapping[Name, str]) -> int:
    """Places that hold something else, or that one of the two lacks."""
    return sum(found.get(name) != wanted.get(name) for name in found.keys() | wanted.keys())


def kill(process: BaseProcess) -> bool:
    """SIGKILL to the whole group; false if it had ended before."""
    assert process.pid is not None
    for send in (os.killpg, os.kill):  # the group may not be there yet
        if process.exitcode is None:
            with suppress(ProcessLookupError):
                send(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def kill_all() -> None:
    """Ends whatever still runs, e.g. after Ctrl-C."""
    for process in _started:
        kill(process)


def ticks(seconds: float, every_s: float = 0.02) -> Iterator[float]:
    """The seconds gone by, again and again, until ``seconds`` are over."""
    started = time.monotonic()
    while (gone := time.monotonic() - started) < seconds:
        yield gone
        time.sleep(every_s)


def _run(command: list[str], environment: dict[str, str], output: Path) -> None:
    """``autointerp`` with these arguments, as in a fresh process."""
    os.setsid()
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    try:
        app(command)
    except Exception:
        os.write(descriptor, traceback.format_exc().encode())
        raise
