"""A backfill through Dagster's own server and daemon, whose daemon is killed over and over."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autointerp_dagster.adapters.heads import Name
from autointerp_dagster.partitions import partition_key
from autointerp_dagster.study.stages import stages_of
from rehearsals.trial import Trial, differing

N_RESTARTS = 3
_START_S, _END_S = 120, 300

_LAUNCH = """
mutation ($params: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $params) {
  __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }"""
_STATUS = """
query ($id: String!) { partitionBackfillOrError(backfillId: $id) {
  ... on PartitionBackfill { status } } }"""


@dataclass(frozen=True)
class Told:
    """What became of a backfill."""

    status: str
    n_restarts: int
    seconds: float


def backfill_with_restarts(
    trial: Trial, rng: random.Random, undisturbed: Mapping[Name, str]
) -> Told:
    """Backfills every cell of a study; layer and study metrics follow by themselves.

    Waits until the places are those of the undisturbed run, or for five minutes.
    """
    started = time.monotonic()
    trial.run(until="token_dataset")
    home = trial.folder / "home"
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\nnux: {enabled: false}\n")
    port = _free_port()
    with ExitStack() as opened:
        web = ["dagster-webserver", "-m", "autointerp_dagster.definitions", "-p", str(port)]
        _serving(opened, trial, [*web, "-h", "127.0.0.1"], "webserver")
        _wait(lambda: _is_up(port), _START_S)
        daemon = _daemon(opened, trial)
        backfill = _launched(port, trial)
        n_restarts = 0
        while n_restarts < N_RESTARTS:
            time.sleep(rng.uniform(3, 8))
            _kill(daemon)
            n_restarts += 1
            daemon = _daemon(opened, trial)
        status = ""

        def is_over() -> bool:
            nonlocal status
            status = _ask(port, _STATUS, id=backfill)["partitionBackfillOrError"]["status"]
            is_done = status.startswith(("COMPLETED", "FAILED", "CANCELED"))
            return is_done and differing(trial.contents(), undisturbed) == 0

        _wait(is_over, _END_S)
    return Told(status, n_restarts, time.monotonic() - started)


def _launched(port: int, trial: Trial) -> str:
    study = trial.study
    stages = [stage for stage in stages_of(study) if stage.scope == "cell"]
    params = {
        "assetSelection": [{"path": [study.name, stage.name]} for stage in stages],
        "partitionNames": [str(partition_key(cell)) for cell in study.cells],
    }
    launched = _ask(port, _LAUNCH, params=params)["launchPartitionBackfill"]
    return launched["backfillId"]


def _daemon(opened: ExitStack, trial: Trial) -> subprocess.Popen[bytes]:
    command = ["dagster-daemon", "run", "-m", "autointerp_dagster.definitions"]
    return _serving(opened, trial, command, "daemon")


def _serving(
    opened: ExitStack, trial: Trial, command: list[str], name: str
) -> subprocess.Popen[bytes]:
    """A process of a group of its own, ended with the stack."""
    environment = {
        **os.environ,
        "DAGSTER_HOME": str(trial.folder / "home"),
        "AUTOINTERP_STUDIES": str(trial.study_path.parent),
        "AUTOINTERP_SPOOL": str(trial.folder / "spool"),
        "DAGSTER_DISABLE_TELEMETRY": "1",
    }
    log = opened.enter_context((trial.folder / f"{name}.log").open("ab"))
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / command[0]), *command[1:]],
        env=environment,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    opened.callback(_end, process)
    return process


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The daemon alone: the runs that it has launched go on, as they do on a real machine."""
    process.send_signal(signal.SIGKILL)
    process.wait()


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ask(port: int, query: str, **variables: object) -> dict[str, Any]:
    body = json.dumps({"query": query, "variables": variables}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/graphql", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["data"]


def _is_up(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    """Returns when it holds, or when the time is over: the figures tell."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(1)
