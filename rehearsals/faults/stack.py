"""Dagster's server, code location and daemons as processes of their own, on one DAGSTER_HOME."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from rehearsals.faults.trial import Trial, make_home

LOCATION = "autointerp"
_STARTING_S = 180
_SWITCH_ON = """
mutation ($selector: SensorSelector!) {
  startSensor(sensorSelector: $selector) { __typename ... on PythonError { message } } }"""
_LAUNCH = """
mutation ($params: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $params) {
  __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }"""
_BACKFILL = """
query ($id: String!) { partitionBackfillOrError(backfillId: $id) {
  ... on PartitionBackfill { status } } }"""
_RUNS = """
query { runsOrError { ... on Runs { results { runId status jobName tags { key value } } } } }"""


class Stack:
    """What an operator keeps running. A context manager; daemons are started one by one.

    The code location is a server of its own, as it should be where daemons come and go: runs are
    its children, so they outlive the daemon that asked for them.
    """

    def __init__(self, trial: Trial) -> None:
        """Nothing is started yet."""
        self._trial = trial
        self._opened = ExitStack()
        self._port = 0
        self._workspace = trial.folder / "workspace.yaml"

    def __enter__(self) -> Self:
        """Returns once the web server answers."""
        make_home(Path(self._trial.environment["DAGSTER_HOME"]))
        code, self._port = _free_port(), _free_port()
        self._workspace.write_text(
            f"load_from:\n- grpc_server: {{host: 127.0.0.1, port: {code}, "
            f"location_name: {LOCATION}}}\n"
        )
        with ExitStack() as opening:
            self._opened = opening
            serve = ["dagster", "api", "grpc", "-m", "autointerp_dagster.definitions"]
            self._start([*serve, "-h", "127.0.0.1", "-p", str(code)], "code")
            wait_for(lambda: _is_up(code), _STARTING_S)
            web = ["dagster-webserver", "-w", str(self._workspace), "-h", "127.0.0.1"]
            self._start([*web, "-p", str(self._port)], "webserver")
            wait_for(lambda: _is_up(self._port), _STARTING_S)
            self._opened = opening.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends all of it."""
        self._opened.close()

    def daemon(self, name: str = "daemon") -> subprocess.Popen[bytes]:
        """Starts one more daemon."""
        return self._start(["dagster-daemon", "run", "-w", str(self._workspace)], name)

    def switch_on(self, sensor: str) -> None:
        """As in the UI."""
        selector = {
            "repositoryLocationName": LOCATION,
            "repositoryName": "__repository__",
            "sensorName": sensor,
        }
        answer = self._ask(_SWITCH_ON, selector=selector)["startSensor"]
        if answer["__typename"] != "Sensor":
            raise AssertionError(f"{sensor} cannot be switched on: {answer}")

    def backfill(self, assets: list[str], partitions: list[str]) -> str:
        """Launches a backfill; its id."""
        study = self._trial.study.name
        params = {
            "assetSelection": [{"path": [study, asset]} for asset in assets],
            "partitionNames": partitions,
        }
        return self._ask(_LAUNCH, params=params)["launchPartitionBackfill"]["backfillId"]

    def backfill_status(self, backfill: str) -> str:
        """E.g. ``COMPLETED_SUCCESS``."""
        return self._ask(_BACKFILL, id=backfill)["partitionBackfillOrError"]["status"]

    def runs(self) -> list[dict[str, Any]]:
        """All runs: ``runId``, ``status``, ``jobName``, and ``tags`` by name."""
        found = self._ask(_RUNS)["runsOrError"]["results"]
        return [run | {"tags": {t["key"]: t["value"] for t in run["tags"]}} for run in found]

    def _ask(self, query: str, **variables: object) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/graphql", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["data"]

    def _start(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        log = self._opened.enter_context((self._trial.folder / f"{name}.log").open("ab"))
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / command[0]), *command[1:]],
            env={**os.environ, **self._trial.environment},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        self._opened.callback(end, process)
        return process


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Returns when it holds, or false when the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def _is_up(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
