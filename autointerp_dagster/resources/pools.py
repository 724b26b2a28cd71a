"""Dagster's pools of a run that was killed, and of one that waits for another.

Dagster frees the slot of a step in the process that took it. Killed, that process leaves the slot
taken and its run going on for ever, and every later run waits for it. Nothing else frees it:
Dagster looks after runs that Kubernetes, Docker or Ray started, not after those of commands.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

from autointerp_dagster.study.stages import STAGES

PROCESS_TAG = "autointerp/process"
"""The process that a run goes on in: host, what its pid counts in, pid, and when it began."""
_EVERY_S = 2.0
_POOLS = sorted({stage.pool for stage in STAGES.values() if stage.pool})
_ENDED = {dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED}
_UNDER_WAY = [status for status in dg.DagsterRunStatus if status not in _ENDED]
_logger = logging.getLogger(__name__)


def this_process() -> str:
    """The value of ``PROCESS_TAG`` for runs of this process."""
    return f"{_place()}/{os.getpid()}/{_began(os.getpid())}"


def is_gone(process: str) -> bool:
    """Whether a process of this host has ended; false of others, which cannot be looked at.

    A container is a host of its own, also where it has the name of its host.

    Args:
        process: A value of ``PROCESS_TAG``.
    """
    place, pid, began = process.rsplit("/", 2)
    if place != _place():
        return False
    now = _began(int(pid))
    return now is None or ("" not in (now, began) and now != began)


def end_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Frees the slots of runs whose process is gone, and reports those under way as failed.

    Returns:
        A line for each.
    """
    events = instance.event_log_storage
    runs = {run.run_id: run for run in instance.get_runs(dg.RunsFilter(statuses=_UNDER_WAY))}
    for run_id in events.get_concurrency_run_ids() - runs.keys():
        run = instance.get_run_by_id(run_id)
        if run is not None:
            runs[run_id] = run
    lines: list[str] = []
    for run_id, found in runs.items():
        if PROCESS_TAG not in found.tags or not is_gone(found.tags[PROCESS_TAG]):
            continue
        events.free_concurrency_slots_for_run(run_id)  # first: killed here, the next look goes on
        run = instance.get_run_by_id(run_id)  # it may have ended before its process did
        if run is not None and not run.is_finished:
            instance.report_run_failed(run, "Its process is gone, killed or out of memory.")
        lines.append(f"The process of run {run_id[:8]} is gone: it counts as failed.")
    return lines


def waiting_for(instance: dg.DagsterInstance) -> list[str]:
    """What the runs of this process wait for: a line for each pool that others hold."""
    lines: list[str] = []
    for pool, info in instance.event_log_storage.get_concurrency_infos(_POOLS).items():
        if any(_process_of(instance, run_id) == this_process() for run_id in info.pending_run_ids):
            holders = sorted(info.active_run_ids)
            held = " and ".join(f"run {one[:8]} {_told(instance, one)}" for one in holders)
            lines.append(f"Waits for the pool {pool}, held by {held or 'nobody'}.")
    return lines


@contextmanager
def watched_pools(
    instance: dg.DagsterInstance, say: Callable[[str], None] = _logger.info
) -> Iterator[None]:
    """Dead runs are ended now and while the block goes on, and waiting is told.

    Args:
        instance: Where the runs are kept.
        say: Takes each line, in whatever thread; the package's log by default.
    """
    if not instance.event_log_storage.supports_global_concurrency_limits:
        yield
        return
    for line in end_dead_runs(instance):
        say(line)
    stop = threading.Event()

    def watch() -> None:
        told: list[str] = []
        while not stop.wait(_EVERY_S):
            try:
                waiting = waiting_for(instance)
                for line in end_dead_runs(instance) if waiting else []:
                    say(line)
            except Exception as error:  # noqa: BLE001 - the run itself meets it, and tells it
                _logger.debug("the pools cannot be looked at: %s", error)
                continue
            for line in waiting:
                if line not in told:
                    say(line)
            told = waiting

    watcher = threading.Thread(target=watch, name="pools", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def _process_of(instance: dg.DagsterInstance, run_id: str) -> str | None:
    """Null if it is no run of a command."""
    run = instance.get_run_by_id(run_id)
    return None if run is None else run.tags.get(PROCESS_TAG)


def _told(instance: dg.DagsterInstance, run_id: str) -> str:
    """Where a run goes on."""
    process = _process_of(instance, run_id)
    if process is None:
        return "of the UI or daemon (if that is gone: docs/operate.md, Free a pool)"
    host, _, pid, _ = process.rsplit("/", 3)
    return f"(process {pid} on {host})"


def _place() -> str:
    """Host and namespace of pids."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        namespace = ""
    return f"{socket.gethostname()}/{namespace}"


def _began(pid: int) -> str | None:
    """When a process of this host began, in ticks; null if it is gone, empty if nobody says.

    A pid is used again after a while, together with a beginning it is not.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # somebody else's
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # no Linux, or others' processes are hidden
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in ("Z", "X") else fields[18]
