"""A store on S3 that is slow, fails now and then, and is away for a while."""

import os
import time
from collections.abc import Iterator

from benchmarks.measure import NotMeasured, Result
from rehearsals.faults.flaky_s3 import FlakyS3, Weather, missing_packages
from rehearsals.faults.rehearsal import Rehearsal, none, say
from rehearsals.faults.trial import Trial, kill, n_differing

P_FAULT, DELAY_S = 0.03, 0.2
N_OUTAGES, N_RERUNS = 3, 10
_ENDING_S = 300.0

Figures = Iterator[Result | NotMeasured]


def s3(rehearsal: Rehearsal) -> Figures:
    """Three stores, each with a weather of its own."""
    missing = missing_packages()
    if missing:
        yield NotMeasured("S3", f"wants the packages {', '.join(missing)}")
        return
    with FlakyS3(rehearsal.rng) as service:
        os.environ.update(service.environment)  # this process looks at the stores, too
        for name, begin in (("errors", _errors), ("slow", _slow), ("outages", _outages)):
            trial = rehearsal.trial(
                f"s3-{name}", environment=service.environment, root=service.bucket(name)
            )
            service.n_requests, service.n_faults = 0, service.n_faults.__class__()
            started = time.monotonic()
            n_ended, n_plain = begin(rehearsal, trial, service)
            took = time.monotonic() - started
            say(
                f"S3, {name}: {took:.0f} s, {service.n_requests} requests, "
                f"{dict(service.n_faults)}; {n_ended} runs ended by it"
            )
            if name == "errors":
                n_faults = service.n_faults.total()
                yield Result("S3, errors: requests that failed", n_faults, 10, "requests")
            if name == "outages":
                yield Result("S3, outages: runs that they ended", n_ended, 1, "runs")
            service.weather = Weather()
            trial.run()
            n_wrong = n_differing(trial.contents(), rehearsal.contents)
            yield none(f"S3, {name}: runs ended without a plain error", n_ended - n_plain, "runs")
            yield none(f"S3, {name}: places that differ in the end", n_wrong, "places")
            faults = trial.faults()
            yield none(f"S3, {name}: damaged files", len(faults), "files")


def _errors(_: Rehearsal, trial: Trial, service: FlakyS3) -> tuple[int, int]:
    """Runs until one ends well while requests fail; how many did not, how many said so plainly."""
    service.weather = Weather(p_fault=P_FAULT)
    n_ended = n_plain = 0
    for _run in range(N_RERUNS):
        process = trial.start()
        process.join()
        if process.exitcode == 0:
            break
        n_ended += 1
        n_plain += _is_plain(trial)
    return n_ended, n_plain


def _slow(_: Rehearsal, trial: Trial, service: FlakyS3) -> tuple[int, int]:
    service.weather = Weather(delay_s=DELAY_S)
    process = trial.start()
    process.join()
    is_ended = process.exitcode != 0
    return int(is_ended), int(is_ended and _is_plain(trial))


def _outages(rehearsal: Rehearsal, trial: Trial, service: FlakyS3) -> tuple[int, int]:
    """The service goes away in the middle of a run, and comes back for the next one."""
    n_ended = n_plain = 0
    for part in range(N_OUTAGES):
        service.weather = Weather()
        process = trial.start()
        process.join((part + rehearsal.rng.random()) / N_OUTAGES * rehearsal.seconds)
        service.weather = Weather(p_fault=1.0)
        process.join(_ENDING_S)
        if process.exitcode is None:
            say(f"S3 away: the run did not end within {_ENDING_S:.0f} s")
            kill(process)
        if process.exitcode != 0:
            n_ended += 1
            n_plain += _is_plain(trial)
    return n_ended, n_plain


def _is_plain(trial: Trial) -> bool:
    """Whether a run that failed said so in one line, which names the store."""
    is_plain = not trial.has_traceback() and trial.root in trial.error()
    say(trial.error() if is_plain else trial.output.read_text()[-3000:])
    return is_plain
