"""The planted study in processes of its own, and what became of it."""

import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import dagster as dg

from autointerp_dagster.adapters.heads import Name, read_heads
from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from autointerp_dagster.adapters.pruning.deleting import prune
from autointerp_dagster.adapters.pruning.survey import DAY_S, Survey
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.adapters.verifying import verify
from autointerp_dagster.cli.run import Selection, materialize
from autointerp_dagster.study import Study, load_study
from autointerp_dagster.study.stages import places_of, stages_of
from tests.e2e.planted import write_study

IN_FLIGHT = 4
_LLM = {"max_in_flight": IN_FLIGHT}
OVERRIDES: dict[str, Any] = {
    "latents": [0, 1, 7, 9, 14, 20],
    "metrics": {"n_bootstrap": 100},
    "models": {"explainer": _LLM, "judge": _LLM},
}
"""Of the planted study: six latents per layer, by two explainers and two scorers."""

_PRELOADED = ["autointerp_dagster.cli.run", "rehearsals.trial", "torch", "transformers"]


@dataclass
class Trial:
    """One study with a store and a Dagster home of its own."""

    folder: Path
    world: Path
    server: FakeLLMServer
    environment: dict[str, str] = field(default_factory=dict)
    """Of the processes, beside this one's."""
    store_root: str | None = None
    """Null: ``folder/store``."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.n_asked_before = len(self.server.requests)

    @property
    def study_path(self) -> Path:
        """The study file, written anew."""
        store = {} if self.store_root is None else {"store": self.store_root}
        return write_study(
            self.folder, self.world, self.server.base_url, "planted", **OVERRIDES, **store
        )

    @property
    def study(self) -> Study:
        """As it is loaded."""
        return load_study(self.study_path)

    @property
    def store(self) -> Store:
        """The study's."""
        return Store(self.study.store)

    def start(
        self, home: str = "home", *, until: str | None = None, max_file_bytes: int | None = None
    ) -> BaseProcess:
        """Begins `autointerp run` in a process of its own, from modules that are loaded already.

        Args:
            home: Folder of Dagster's records.
            until: The last stage.
            max_file_bytes: Writing more into a file fails, as on a full disk.
        """
        environment = {
            "DAGSTER_HOME": str(self.folder / home),
            "AUTOINTERP_SPOOL": str(self.folder / "spool"),
            "AUTOINTERP_CACHE": str(self.folder / "cache"),
            "DAGSTER_DISABLE_TELEMETRY": "1",
            **self.environment,
        }
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        arguments = (self.study_path, environment, self.error_path, until, max_file_bytes)
        process = context.Process(target=_run, args=arguments)
        process.start()
        return process

    @property
    def error_path(self) -> Path:
        """Where a run that fails says why."""
        return self.folder / "error.json"

    def run(self, home: str = "home", **options: Any) -> None:
        """A run that must succeed.

        Raises:
            AssertionError: If it does not.
        """
        process = self.start(home, **options)
        process.join()
        if process.exitcode != 0:
            raise AssertionError(f"a run that nothing disturbed failed: {self.error()}")

    def error(self) -> dict[str, str]:
        """Type and text of the error that the last run ended with."""
        return json.loads(self.error_path.read_text()) if self.error_path.exists() else {}

    def contents(self) -> dict[Name, str]:
        """The content hash of every complete place: tables, row by row."""
        heads = read_heads(self.store, "planted").manifests
        return {name: head.content_hash for name, head in heads.items() if head.complete}

    def faults(self) -> list[str]:
        """What `autointerp verify` finds."""
        return [f"{fault.path}: {fault.text}" for fault in verify(self.store, "planted").faults]

    def prune(self) -> int:
        """Deletes what nothing needs, as in 40 days; how many files went."""
        survey = Survey(self.store, clock=lambda: time.time() + 40 * DAY_S)
        return len(prune(survey, survey.look()))

    def stage(self) -> str:
        """The first stage that is not done everywhere."""
        made = Counter(asset for asset, _ in self.contents())
        study = self.study
        for stage in stages_of(study):
            if stage.version and made[stage.name] < len(list(places_of(study, stage.scope))):
                return stage.name
        return "done"

    def n_repeated(self) -> int:
        """Requests that were sent although the very same had been sent before."""
        bodies = self.server.requests[self.n_asked_before :]
        return len(bodies) - len({json.dumps(body, sort_keys=True) for body in bodies})


def differing(found: Mapping[Name, str], wanted: Mapping[Name, str]) -> int:
    """Places that hold something else, or that one of the two lacks."""
    return sum(found.get(name) != wanted.get(name) for name in found.keys() | wanted.keys())


def kill(process: BaseProcess) -> bool:
    """SIGKILL, as the system's out-of-memory killer sends it; false if it had ended before."""
    was_alive = process.is_alive()
    if was_alive and process.pid is not None:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return was_alive and process.exitcode == -signal.SIGKILL


def _run(
    study_path: Path,
    environment: dict[str, str],
    error_path: Path,
    until: str | None,
    max_file_bytes: int | None,
) -> None:
    os.environ.update(environment)
    home = Path(environment["DAGSTER_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    sys.stdout = sys.stderr = (home / "output").open("a")
    try:
        study = load_study(study_path)
        kept = max_file_bytes is None  # Dagster's own database could not be written either
        with dg.DagsterInstance.get() if kept else dg.DagsterInstance.ephemeral() as dagster:
            if max_file_bytes is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
            materialize(study, Selection.of(study, None, None, until), dagster)
    except BaseException as error:
        traceback.print_exc()
        told = {"type": type(error).__name__, "text": str(error)}
        error_path.write_text(json.dumps(told))
        raise SystemExit(1) from error
