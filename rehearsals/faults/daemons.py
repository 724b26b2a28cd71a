"""Dagster's daemon dies and comes back, and two schedulers work on the same study."""

import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import dagster as dg

from autointerp_dagster.partitions import partition_key
from autointerp_dagster.resources.pools import PROCESS_TAG
from autointerp_dagster.study.stages import stages_of
from benchmarks.measure import NotMeasured, Result
from rehearsals.faults.rehearsal import Rehearsal, none, say
from rehearsals.faults.stack import Stack, end, wait_for
from rehearsals.faults.trial import Trial, make_home, n_differing
from tests.e2e.planted import LATENTS, save_coder

_WHOLE_S = 1200
_MAX_KILLS, _BETWEEN_S = 6, (3, 15)
_ENDED = ("SUCCESS", "FAILURE", "CANCELED")
_OVERLAP_S = 5
_LAYER_TAG = "autointerp/new_layers"

Figures = Iterator[Result | NotMeasured]


def daemon(rehearsal: Rehearsal) -> Figures:
    """A backfill of every cell while the daemon is killed and started over and over.

    Layer and study metrics follow by themselves, so the daemon has to see all of it through.
    """
    trial, rng, n_kills = rehearsal.trial("daemon"), rehearsal.rng, 0
    study = trial.study
    (*_, last) = [
        stage.name
        for stage in stages_of(study)
        if stage.scope == "study" and not (stage.is_external or stage.follows)
    ]
    layer, block = str(study.layer_keys[0]), str(study.ranges[0])
    trial.run("--layers", layer, "--ranges", block, "--until", last)
    assets = [stage.name for stage in stages_of(study) if stage.scope == "cell"]
    with Stack(trial) as stack:
        process = stack.daemon()
        backfill = stack.backfill(assets, [str(partition_key(cell)) for cell in study.cells])
        status = partial(stack.backfill_status, backfill)
        while n_kills < _MAX_KILLS and not wait_for(
            lambda: _is_over(status()), rng.uniform(*_BETWEEN_S)
        ):
            end(process)
            n_kills += 1
            process = stack.daemon()
        wait_for(lambda: _is_over(status()), _WHOLE_S)
        is_whole = _is_whole(rehearsal, trial, stack)
        told = status()
        runs = Counter(f"{run['status']}" for run in stack.runs())
    say(f"daemon: killed {n_kills} times, backfill {told}, runs {dict(runs)}, whole: {is_whole}")
    yield Result("daemon: kills of it while the backfill went on", n_kills, 3, "kills")
    yield none("daemon: backfills that did not succeed", told != "COMPLETED_SUCCESS", "")
    yield none("daemon: runs that did not succeed", runs.total() - runs["SUCCESS"], "runs")
    yield from _ended(rehearsal, trial, "daemon")


def schedulers(rehearsal: Rehearsal) -> Figures:
    """Two daemons on one DAGSTER_HOME, with the sensor of new coders on, while coders turn up."""
    if not rehearsal.counts_calls:
        yield NotMeasured("two daemons", "coders are dropped in the planted world only")
        return
    coders = rehearsal.undisturbed.folder.parent / "coders"
    over = {
        "layers": "discover",
        "discovery": {"settle_s": 1, "every_s": 3},
        "coders": {"sae": {"path": str(coders)}},
    }
    trial = Trial(rehearsal.undisturbed.folder.parent / "schedulers", _with(rehearsal, over))
    n_before = len(rehearsal.server.requests)
    with Stack(trial) as stack:
        daemons = [stack.daemon("daemon_a"), stack.daemon("daemon_b")]
        stack.switch_on(f"{trial.study.name}_new_coders")
        for hookpoint in LATENTS:
            save_coder(coders / hookpoint, hookpoint)
            time.sleep(rehearsal.rng.uniform(*_BETWEEN_S))
        is_whole = _is_whole(rehearsal, trial, stack)
        runs = [run for run in stack.runs() if _LAYER_TAG in run["tags"]]
        n_alive = sum(process.poll() is None for process in daemons)
    layers = Counter(run["tags"][_LAYER_TAG] for run in runs)
    n_calls = len(rehearsal.server.requests) - n_before
    told = f"{n_alive} still alive, {n_calls} calls"
    say(f"two daemons: runs by layer {dict(layers)}, whole: {is_whole}, {told}")
    n_bad = sum(run["status"] != "SUCCESS" for run in runs)
    yield Result("two daemons: alive in the end", n_alive, 2, "daemons")
    yield none("two daemons: layers not launched exactly once", _not_once(layers), "layers")
    yield none("two daemons: launched runs that did not succeed", n_bad, "runs")
    yield from _ended(rehearsal, trial, "two daemons")


def commands(rehearsal: Rehearsal) -> Figures:
    """Two ``autointerp run`` of one study at once, with one Dagster home and with two."""
    for name, other in (("one home", None), ("two homes", "other")):
        trial = rehearsal.trial(f"commands-{name.split()[0]}")
        n_before = len(rehearsal.server.requests)
        home = None if other is None else str(trial.folder / other)
        for folder in {trial.environment["DAGSTER_HOME"], home or ""} - {""}:
            _dagster_runs(folder)  # two processes that make SQLite's files at once spoil them
        processes = [trial.start(), trial.start(home=home)]
        for process in processes:
            process.join()
        n_failed = sum(process.exitcode != 0 for process in processes)
        if n_failed:
            say(f"two commands, {name}: {trial.output.read_text()[-2000:]}")
        n_calls = len(rehearsal.server.requests) - n_before
        say(f"two commands, {name}: {n_calls} calls by both")
        both_s = _both_s(trial.environment["DAGSTER_HOME"], home)
        yield Result(f"two commands, {name}: both under way", both_s, _OVERLAP_S, "s")
        yield none(f"two commands, {name}: that failed", n_failed, "runs")
        yield from _ended(rehearsal, trial, f"two commands, {name}")


def _dagster_runs(home: str) -> list[dg.RunRecord]:
    """All that are recorded there; makes the records if there are none."""
    make_home(Path(home))
    with dg.DagsterInstance.from_config(home) as instance:
        return list(instance.get_run_records())


def _both_s(home: str, other: str | None) -> float:
    """For how long runs of both commands were under way."""
    spans: dict[str, list[float]] = {}
    for record in [*_dagster_runs(home), *(_dagster_runs(other) if other else [])]:
        process = record.dagster_run.tags[PROCESS_TAG]
        spans.setdefault(process, []).extend(
            moment for moment in (record.start_time, record.end_time) if moment is not None
        )
    if len(spans) != 2:
        return 0.0
    return min(max(span) for span in spans.values()) - max(min(span) for span in spans.values())


def _with(rehearsal: Rehearsal, over: dict[str, object]) -> partial[Path]:
    return partial(rehearsal.undisturbed.write, **over)  # type: ignore[call-arg]


def _is_over(status: str) -> bool:
    return status.startswith(("COMPLETED", "FAILED", "CANCELED"))


def _is_whole(rehearsal: Rehearsal, trial: Trial, stack: Stack) -> bool:
    """Waits until every place is as it should be and no run goes on; false if it takes too long."""

    def is_quiet() -> bool:
        is_done = n_differing(trial.contents(), rehearsal.contents) == 0
        return is_done and all(run["status"] in _ENDED for run in stack.runs())

    return wait_for(is_quiet, _WHOLE_S)


def _not_once(layers: Counter[str]) -> int:
    return sum(n != 1 for n in layers.values()) + abs(len(layers) - len(LATENTS))


def _ended(rehearsal: Rehearsal, trial: Trial, what: str) -> Iterator[Result]:
    """What must hold of the store in the end."""
    faults, n = trial.faults(), n_differing(trial.contents(), rehearsal.contents)
    if faults:
        say(f"{what}: {faults[:3]}")
    yield none(f"{what}: places that differ in the end", n, "places")
    yield none(f"{what}: damaged files", len(faults), "files")
