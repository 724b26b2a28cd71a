"""A study of 32 layers with 32 ranges each through everything that is done per cell.

What is measured is the cost of order itself: Dagster's events, manifests and heads, fingerprints.
Cells hold next to nothing, so that it is not lost in real work; the bar is its share of a real
stage's time, for which the latent records stand (the cheapest stage that reads a cell's
activations: 1.5 ms a latent is the bar of ``python -m benchmarks records``, 4,096 latents a cell).

One run takes the whole rectangle of cells, as ``autointerp run`` does.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import dagster as dg
from rich.console import Console

import autointerp_dagster.cli.run
from autointerp_dagster.adapters.llm.fake.rule_judge import word_judge
from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from autointerp_dagster.cli.run import Selection, materialize
from autointerp_dagster.cli.status import print_status
from autointerp_dagster.resources.staleness import out_of_date
from autointerp_dagster.resources.store import StageRun, StoreResource
from autointerp_dagster.study import Study, load_study
from autointerp_dagster.study.stages import stages_of
from benchmarks.measure import Result
from rehearsals.stopwatch import Stopwatch
from rehearsals.world import build_world, write_study

STAGE_MS = 1.5 * 4096
"""Of a cell of ``latent_records``."""
MAX_SHARE = 5.0
"""Percent of that."""

_LOAD = """
import resource, time
started = time.perf_counter()
from autointerp_dagster.definitions import defs
imported = time.perf_counter()
repository = defs().get_repository_def()
repository.get_all_jobs()
loaded = time.perf_counter()
n_assets = len(repository.asset_graph.get_all_asset_keys())
print(n_assets, imported - started, loaded - imported,
      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def run(arguments: list[str]) -> Iterator[Result]:
    """Prints what takes how long; yields the figures that have bars."""
    chosen = _parsed(arguments)
    n_latents = chosen.ranges * chosen.range_size
    with (
        tempfile.TemporaryDirectory(prefix="rehearsal-") as name,
        FakeLLMServer(word_judge(0)) as server,
    ):
        folder = Path(name)
        os.environ["AUTOINTERP_SPOOL"] = str(folder / "spool")
        os.environ["DAGSTER_DISABLE_TELEMETRY"] = "1"
        world = build_world(folder / "world", chosen.layers, n_latents)
        shape = (chosen.layers, n_latents, chosen.range_size)
        path = write_study(folder, world, server.base_url, *shape)
        study = load_study(path)
        say(f"{len(study.layer_keys)} layers x {len(study.ranges)} ranges of {chosen.range_size}")
        yield from _definitions(path)
        with _instance(folder / "dagster_home") as instance:
            yield from _backfill(study, instance)
            yield from _looks(study)
            yield from _rerun(study, instance)
            events = folder / "dagster_home"
            n_bytes = sum(f.stat().st_size for f in events.rglob("*") if f.is_file())
            say(f"Dagster's records: {n_bytes / 1e6:.1f} MB")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        yield Result("peak memory of the process", peak, 4096, "MB", is_cost=True)


def say(line: str) -> None:
    """A line for people, beside the figures."""
    print(line, file=sys.stderr, flush=True)


def _parsed(arguments: list[str]) -> Namespace:
    parser = ArgumentParser("python -m rehearsals scale")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--ranges", type=int, default=32)
    parser.add_argument("--range-size", type=int, default=128, help="4096 is the real one")
    return parser.parse_args(arguments)


@contextmanager
def _instance(home: Path) -> Iterator[dg.DagsterInstance]:
    """With SQLite on disk, as on a workstation."""
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    os.environ["DAGSTER_HOME"] = str(home)
    with dg.DagsterInstance.get() as instance:
        yield instance


def _definitions(path: Path) -> Iterator[Result]:
    """In a process of their own, as a code location is loaded."""
    environment = {**os.environ, "AUTOINTERP_STUDIES": str(path.parent)}
    done = subprocess.run(
        [sys.executable, "-c", _LOAD], env=environment, capture_output=True, text=True, check=True
    )
    n_assets, imported, loaded, peak = map(float, done.stdout.split())
    times = f"import {imported:.1f} s, build {loaded:.2f} s"
    say(f"definitions of {n_assets:.0f} assets: {times}, {peak:.0f} MB")
    yield Result("definitions, imports not counted", loaded, 5.0, "s", is_cost=True)


def _backfill(study: Study, instance: dg.DagsterInstance) -> Iterator[Result]:
    yield from _materialized("backfill", study, instance, Selection.of(study, None, None, None))


def _rerun(study: Study, instance: dg.DagsterInstance) -> Iterator[Result]:
    """Of a quarter of the layers: everything is there, and all that is left is order."""
    layers = [str(layer) for layer in study.layer_keys]
    chosen = Selection.of(study, layers[: max(1, len(layers) // 4)], None, None)
    yield from _materialized("identical rerun", study, instance, chosen)


def _materialized(
    name: str, study: Study, instance: dg.DagsterInstance, selection: Selection
) -> Iterator[Result]:
    """What it costs to materialize a selection, beside the work itself."""
    watch = Stopwatch()
    with watch.watching(*_WATCHED), _watching_work(watch), watch.timing("whole"):
        materialize(study, selection, instance)
    seconds = watch.seconds
    n_stages = sum(stage.scope == "cell" for stage in selection.stages)
    n = n_stages * len(selection.cells)
    work = {key: value for key, value in seconds.items() if key.startswith("work: ")}
    told = {**work, **{key: seconds[key] for key in ("whole", "checks", "manifests", "events")}}
    say(f"{name}: " + ", ".join(f"{key} {value:.1f} s" for key, value in told.items()))
    order = seconds["whole"] - seconds["checks"] - sum(work.values())
    ours = {"manifests": seconds["manifests"], "our events": seconds["events"]}
    parts = {**ours, "Dagster's own": order - sum(ours.values())}
    say(
        f"{name}, ms a cell of a stage ({n} of them): "
        + ", ".join(f"{part} {1000 * value / n:.1f}" for part, value in parts.items())
    )
    share = 100 * 1000 * order / n / STAGE_MS
    what = f"{name}: order, share of a stage of {STAGE_MS:.0f} ms a cell"
    yield Result(what, share, MAX_SHARE, "%", is_cost=True)


def _looks(study: Study) -> Iterator[Result]:
    store, n = StoreResource().of(study), _n_places(study, "cell")
    shown = Console(file=StringIO(), width=200)
    status = _seconds(lambda: print_status(study, store, shown))
    yield Result("status", 1000 * status / n, 5.0, "ms a cell of a stage", is_cost=True)
    found: list[Any] = []
    stale = _seconds(lambda: found.extend(out_of_date(study, store)))
    yield Result("stale", 1000 * stale / n, 5.0, "ms a cell of a stage", is_cost=True)
    if found:
        raise AssertionError(f"out of date right after the run: {found[:3]}")


_WATCHED = (
    (StageRun, "pending", "manifests"),
    (StageRun, "commit", "manifests"),
    (StageRun, "_log_events", "events"),
    (autointerp_dagster.cli.run, "check_study", "checks"),
)


@contextmanager
def _watching_work(watch: Stopwatch) -> Iterator[None]:
    """Counts what stages do between entering and reporting, manifests left out, by stage."""
    enter, report = StageRun.__enter__, StageRun.report
    entered: dict[str, tuple[float, float]] = {}

    def timed_enter(stage: StageRun) -> StageRun:
        entered[stage.stage.name] = time.perf_counter(), watch.seconds["manifests"]
        return enter(stage)

    def timed_report(stage: StageRun) -> Iterator[dg.MaterializeResult]:
        started, manifests = entered[stage.stage.name]
        taken = time.perf_counter() - started - (watch.seconds["manifests"] - manifests)
        watch.seconds[f"work: {stage.stage.name}"] += taken
        return report(stage)

    StageRun.__enter__, StageRun.report = timed_enter, timed_report
    try:
        yield
    finally:
        StageRun.__enter__, StageRun.report = enter, report


def _n_places(study: Study, scope: str) -> int:
    stages = [stage for stage in stages_of(study) if stage.scope == scope and stage.version]
    return len(stages) * len(study.cells)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
