"""Everything that can go wrong with a run, and then a run that is left alone.

Whatever happened, the study must end with the very tables of a run that nothing disturbed, no file
that anything rests on may be damaged at any moment, and no call may be paid twice but those that
were under way.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from autointerp_dagster.adapters.heads import Name
from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from benchmarks.measure import NotMeasured, Result
from rehearsals.backfill import backfill_with_restarts
from rehearsals.flaky_s3 import FlakyS3, Weather, missing_packages
from rehearsals.trial import IN_FLIGHT, Trial, differing, kill
from tests.e2e.planted import answer, build_world

LATENCY_S = 0.02
"""Of the fake model's answers: enough for kills to fall between them."""
N_KILLS = 20
DISK_SHARES = (0.1, 0.4, 0.8)
"""Of the room that the whole study takes."""


@dataclass(frozen=True)
class Stage:
    """What every rehearsal needs."""

    folder: Path
    world: Path
    server: FakeLLMServer
    rng: random.Random
    undisturbed: Mapping[Name, str]
    """Contents by place."""
    n_bytes: int
    """Of the undisturbed store."""
    seconds: float
    """Of the undisturbed run."""

    def trial(self, name: str, **options: object) -> Trial:
        """A trial with nothing in its store."""
        return Trial(self.folder / name, self.world, self.server, **options)  # type: ignore[arg-type]


Figures = Iterator[Result | NotMeasured]


def run(arguments: list[str]) -> Figures:
    """Figures with bars; what happened besides is said on stderr."""
    parser = ArgumentParser("python -m rehearsals faults")
    parser.add_argument("kinds", nargs="*", help=f"some of {', '.join(KINDS)}; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=N_KILLS)
    chosen = parser.parse_args(arguments)
    unknown = [kind for kind in chosen.kinds if kind not in KINDS]
    if unknown:
        parser.error(f"no {unknown[0]!r}; there are {', '.join(KINDS)}")
    server = FakeLLMServer(answer, latency_s=lambda _: LATENCY_S)
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as name, server:
        folder = Path(name)
        world = build_world(folder / "world")
        whole = Trial(folder / "undisturbed", world, server)
        whole.run(until="token_dataset")  # starts the server of the processes
        started = time.monotonic()
        whole.run()
        seconds = time.monotonic() - started
        n_bytes = sum(f.stat().st_size for f in (whole.folder / "store").rglob("*") if f.is_file())
        contents = whole.contents()
        say(f"undisturbed: {seconds:.1f} s, {len(contents)} places, {n_bytes / 1e6:.1f} MB")
        rng = random.Random(chosen.seed)
        stage = Stage(folder, world, server, rng, contents, n_bytes, seconds)
        for kind in chosen.kinds or KINDS:
            if kind == "kills":
                yield from kills(stage, chosen.kills)
            else:
                yield from KINDS[kind](stage)


def say(line: str) -> None:
    """A line for people, beside the figures."""
    print(line, file=sys.stderr, flush=True)


def kills(stage: Stage, n_kills: int = N_KILLS) -> Figures:
    """Kill -9 at random moments; each run goes on with what the last one left."""
    hit: Counter[str] = Counter()
    n_damaged = n_differ = n_repeated = n_pruned = n_studies = 0
    while hit.total() < n_kills:
        n_studies += 1
        trial = stage.trial(f"kills{n_studies}")
        is_over = False
        while not is_over:
            process = trial.start()
            process.join(stage.rng.uniform(0.05, 0.45) * stage.seconds)
            if kill(process):
                hit[trial.stage()] += 1
                n_damaged += len(trial.faults())
            else:
                is_over = True
            if hit.total() >= n_kills:
                is_over = True
        trial.run()
        n_pruned += trial.prune()
        n_damaged += len(trial.faults())
        n_differ += differing(trial.contents(), stage.undisturbed)
        n_repeated += trial.n_repeated()
    n = hit.total()
    say(f"kill -9: {n} of {n_studies} studies, at {dict(hit)}; gc took {n_pruned} files")
    yield Result("kill -9: runs killed", n, n_kills, "runs")
    yield _none("kill -9: places that differ in the end", n_differ, "places")
    yield _none("kill -9: damaged files after any kill", n_damaged, "files")
    yield Result("kill -9: calls paid again", n_repeated / n, IN_FLIGHT, "a kill", is_cost=True)


def disk(stage: Stage) -> Figures:
    """A disk that is full in the middle, then has room again."""
    n_failed = n_plain = n_damaged = n_differ = 0
    for share in DISK_SHARES:
        trial = stage.trial(f"disk{share}")
        with _small_disk(trial.folder / "store", int(share * stage.n_bytes)) as make_room:
            limit = None if make_room else int(share * 100_000)
            process = trial.start(max_file_bytes=limit)
            process.join()
            n_failed += process.exitcode != 0
            error = trial.error()
            say(f"full at {share:.0%}: {error.get('type')}: {error.get('text', '')[:160]}")
            n_plain += error.get("type") == "StoreError"
            n_damaged += len(trial.faults())
            if make_room:
                make_room()
            trial.run()
            n_damaged += len(trial.faults())
            n_differ += differing(trial.contents(), stage.undisturbed)
    n = len(DISK_SHARES)
    yield Result("full disk: runs that failed with a StoreError", min(n_failed, n_plain), n, "runs")
    yield _none("full disk: places that differ in the end", n_differ, "places")
    yield _none("full disk: damaged files", n_damaged, "files")


@contextmanager
def _small_disk(folder: Path, n_bytes: int) -> Iterator[Callable[[], None] | None]:
    """A file system of that size; gives what makes it larger, or null where none can be mounted."""
    folder.mkdir(parents=True)
    size = f"size={max(n_bytes, 64_000)}"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        say("no file system can be mounted here: files are limited in size instead")
        yield None
        return

    def make_room() -> None:
        larger = ["mount", "-o", "remount,size=1g", str(folder)]
        subprocess.run(larger, check=True, capture_output=True)

    try:
        yield make_room
    finally:
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)


def s3(stage: Stage) -> Figures:
    """A store on S3 that is slow, loses connections, and is not there at all for a while."""
    missing = missing_packages()
    if missing:
        yield NotMeasured("S3", f"wants the packages {', '.join(missing)}")
        return
    n_differ = n_damaged = n_outages = 0
    with FlakyS3(stage.rng) as service:
        for name in ("slow", "flaky", "outages"):
            service.weather = Weather()
            os.environ.update(service.environment)
            trial = stage.trial(
                f"s3{name}", environment=service.environment, store_root=service.bucket(name)
            )
            started = time.monotonic()
            if name == "outages":
                n_outages = _outages(trial, service, stage)
            else:
                is_slow = name == "slow"
                service.weather = Weather(delay_s=0.05) if is_slow else Weather(p_fault=0.05)
            trial.run()
            took = time.monotonic() - started
            counts = f"{service.n_requests} requests, {service.n_faults} faults"
            service.weather = Weather()
            say(f"S3, {name}: {took:.1f} s; by now {counts}; gc took {trial.prune()} files")
            n_damaged += len(trial.faults())
            n_differ += differing(trial.contents(), stage.undisturbed)
    yield Result("S3: runs that an outage ended", n_outages, 1, "runs")
    yield _none("S3: places that differ in the end", n_differ, "places")
    yield _none("S3: damaged files", n_damaged, "files")


def _outages(trial: Trial, service: FlakyS3, stage: Stage) -> int:
    """The service goes away for good in the middle of a run, three times; runs that failed."""
    n_failed = 0
    for part in (0.3, 0.5, 0.7):
        service.weather = Weather()
        process = trial.start()
        process.join(part * stage.seconds)
        service.weather = Weather(p_fault=1.0)
        process.join(300)
        if process.is_alive():
            kill(process)
        n_failed += process.exitcode != 0
        say(f"S3 away: {trial.error().get('type')}: {trial.error().get('text', '')[:160]}")
    service.weather = Weather()
    return n_failed


def daemon(stage: Stage) -> Figures:
    """Dagster's daemon is killed and started again while a backfill runs."""
    trial = stage.trial("daemon")
    told = backfill_with_restarts(trial, stage.rng, stage.undisturbed)
    say(f"daemon: {told.n_restarts} restarts, backfill {told.status}, {told.seconds:.0f} s")
    yield Result("daemon: restarts in the backfill", told.n_restarts, 3, "restarts")
    yield _none("daemon: backfills that did not succeed", told.status != "COMPLETED_SUCCESS", "")
    n_differ = differing(trial.contents(), stage.undisturbed)
    yield _none("daemon: places that differ in the end", n_differ, "places")
    yield _none("daemon: damaged files", len(trial.faults()), "files")


def schedulers(stage: Stage) -> Figures:
    """Two processes run the same cells at the same time, with one Dagster home and with two."""
    n_failed = n_differ = n_damaged = n_repeated = 0
    for name, homes in (("one", ("home", "home")), ("two", ("home", "other"))):
        trial = stage.trial(f"schedulers-{name}")
        processes = [trial.start(home) for home in homes]
        for process in processes:
            process.join()
            n_failed += process.exitcode != 0
        if n_failed:
            say(f"schedulers: {trial.error()}")
        n_damaged += len(trial.faults())
        n_differ += differing(trial.contents(), stage.undisturbed)
        n_repeated += trial.n_repeated()
    say(f"schedulers: {n_repeated} calls sent by both processes of a pair")
    yield _none("two schedulers: runs that failed", n_failed, "runs")
    yield _none("two schedulers: places that differ in the end", n_differ, "places")
    yield _none("two schedulers: damaged files", n_damaged, "files")


def _none(what: str, n: int, unit: str) -> Result:
    """A figure that must be 0."""
    return Result(what, n, 0, unit, is_cost=True)


KINDS: dict[str, Callable[[Stage], Figures]] = {
    "kills": kills,
    "disk": disk,
    "s3": s3,
    "daemon": daemon,
    "schedulers": schedulers,
}
