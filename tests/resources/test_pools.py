"""Runs that were killed, and runs that wait, with the pools of the settings that come along."""

import os
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from autointerp_dagster.resources.pools import (
    PROCESS_TAG,
    end_dead_runs,
    is_gone,
    this_process,
    waiting_for,
    watched_pools,
)
from autointerp_dagster.resources.versions import CHECKOUT

ELSEWHERE = "another-host/pid:[1]/1/1"
HERE, _, _ = this_process().rsplit("/", 2)


@pytest.fixture
def shipped(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """With a limit of 1 for each pool."""
    shutil.copy(CHECKOUT / "dagster_home" / "dagster.yaml", tmp_path)
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        yield instance


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Another process of this host."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def process_of(sleeper: subprocess.Popen[bytes]) -> str:
    stat = Path(f"/proc/{sleeper.pid}/stat").read_text()
    return f"{HERE}/{sleeper.pid}/{stat.split()[21]}"


def run_in_step(instance: dg.DagsterInstance, process: str | None) -> str:
    """A run that has taken the pool gpu, or waits for it; its id."""
    tags = {} if process is None else {PROCESS_TAG: process}
    run = dg.DagsterRun("job", str(uuid.uuid4()), status=dg.DagsterRunStatus.STARTED, tags=tags)
    instance.add_run(run)
    events = instance.event_log_storage
    events.initialize_concurrency_limit_to_default("gpu")
    events.claim_concurrency_slot("gpu", run.run_id, "step")
    return run.run_id


def status_of(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRunStatus:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    return run.status


def holders(instance: dg.DagsterInstance) -> set[str]:
    return instance.event_log_storage.get_concurrency_info("gpu").active_run_ids


def test_a_process_is_gone_once_it_has_ended_or_its_pid_is_anothers(sleeper):
    process = process_of(sleeper)
    assert not is_gone(this_process())
    assert not is_gone(process)
    assert not is_gone(ELSEWHERE)
    assert is_gone(f"{HERE}/{os.getpid()}/1")  # began at another time
    container = f"{socket.gethostname()}/pid:[1]"
    assert not is_gone(f"{container}/{os.getpid()}/1")  # other pids under the same name
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(process)  # nobody has asked how it ended
    sleeper.wait()
    assert is_gone(process)


def test_a_run_that_was_killed_counts_as_failed_and_frees_its_pool(shipped, tmp_path):
    killed = """
import os, signal, sys
import dagster as dg
from autointerp_dagster.resources.pools import PROCESS_TAG, this_process
@dg.asset(pool="gpu")
def dies():
    os.kill(os.getpid(), signal.SIGKILL)
with dg.DagsterInstance.from_config(sys.argv[1]) as instance:
    dg.materialize([dies], instance=instance, tags={PROCESS_TAG: this_process()})
"""
    command = [sys.executable, "-c", killed, str(tmp_path)]
    assert subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == -9
    (run,) = shipped.get_runs()
    assert holders(shipped) == {run.run_id}
    (line,) = end_dead_runs(shipped)
    assert run.run_id[:8] in line
    assert status_of(shipped, run.run_id) is dg.DagsterRunStatus.FAILURE
    assert holders(shipped) == set()
    assert end_dead_runs(shipped) == []


def test_runs_that_may_be_alive_are_left_alone(shipped, sleeper):
    others = [process_of(sleeper), ELSEWHERE, None]
    runs = [run_in_step(shipped, process) for process in others]
    assert end_dead_runs(shipped) == []
    assert {status_of(shipped, run_id) for run_id in runs} == {dg.DagsterRunStatus.STARTED}
    assert holders(shipped) == {runs[0]}


def test_a_slot_of_a_dead_run_that_somebody_has_cancelled_is_freed(shipped):
    run_id = run_in_step(shipped, f"{HERE}/{os.getpid()}/1")
    shipped.report_run_canceled(shipped.get_run_by_id(run_id))
    assert len(end_dead_runs(shipped)) == 1
    assert status_of(shipped, run_id) is dg.DagsterRunStatus.CANCELED
    assert holders(shipped) == set()


@pytest.mark.parametrize(
    ("process", "told"),
    [(ELSEWHERE, "(process 1 on another-host)"), (None, "of the UI or daemon (if that is gone")],
)
def test_waiting_names_the_pool_and_who_holds_it(shipped, process, told):
    holder = run_in_step(shipped, process)
    assert waiting_for(shipped) == []
    run_in_step(shipped, ELSEWHERE)
    assert waiting_for(shipped) == []  # that others wait is not our business
    run_in_step(shipped, this_process())
    (line,) = waiting_for(shipped)
    assert line.startswith(f"Waits for the pool gpu, held by run {holder[:8]} {told}")


def test_a_run_says_that_it_waits_and_goes_on_once_the_holder_is_dead(shipped, sleeper):
    @dg.asset(pool="gpu")
    def needs_the_gpu() -> None:
        pass

    holder, said = run_in_step(shipped, process_of(sleeper)), list[str]()

    def say(line: str) -> None:
        said.append(line)
        sleeper.kill()

    with watched_pools(shipped, say):
        tags = {PROCESS_TAG: this_process()}
        assert dg.materialize([needs_the_gpu], instance=shipped, tags=tags).success
    assert [line.split(" run ")[0] for line in said] == [
        "Waits for the pool gpu, held by",
        "The process of",
    ]
    assert status_of(shipped, holder) is dg.DagsterRunStatus.FAILURE
