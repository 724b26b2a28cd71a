"""``kill -9`` at every stage; each run goes on with what the last one left.

A study is run until the kill, run again until the next one, and so on through all its stages, so
that a kill late in the study costs no more than an early one. The instant within a stage is drawn.
Every fourth kill hits while the run is still looking at what its predecessors made.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from benchmarks.measure import NotMeasured, Result
from rehearsals.faults.rehearsal import Rehearsal, none, repeated, say
from rehearsals.faults.studies import IN_FLIGHT
from rehearsals.faults.trial import Trial, kill, n_differing, ticks

_P_EARLY, _P_TWICE = 0.15, 0.25
_EARLY_S = 3.0
_SHARE = 0.8
"""Of a stage's time, in which kills fall: later ones hit the next stage."""
_MAX_STUDIES = 6
"""Beside one for each round of kills: more are needed where kills miss."""
_SETTLING_S = 0.5
_WAITING_S = 1800.0


@dataclass
class _Tally:
    """What has been seen so far."""

    hit: Counter[str] = field(default_factory=Counter)
    n_early: int = 0
    n_studies: int = 0
    n_damaged: int = 0
    n_differ: int = 0
    n_stale: int = 0
    n_spooled: int = 0
    n_pruned: int = 0
    repeated: list[int] = field(default_factory=list)
    """Calls that were paid again, by kill."""
    n_calls: int = 0


def kills(rehearsal: Rehearsal) -> Iterator[Result | NotMeasured]:
    """Kills until there were enough and every stage was hit, whole studies at a time."""
    tally = _Tally()
    while chosen := _stages_to_kill(rehearsal, tally):
        tally.n_studies += 1
        _one_study(rehearsal, rehearsal.trial(f"kills{tally.n_studies}"), chosen, tally)
    n = tally.hit.total()
    say(f"kill -9: {n} in {tally.n_studies} studies, {tally.n_early} of them while going on")
    say(f"kill -9, by stage under way: {dict(tally.hit)}; gc took {tally.n_pruned} files")
    say(f"kill -9: {tally.n_spooled} files left in spools")
    stages = [name for name in rehearsal.stage_seconds if not tally.hit[name]]
    yield Result("kill -9: runs killed", n, rehearsal.n_kills, "runs")
    if n >= len(rehearsal.stage_seconds):
        yield none("kill -9: stages that were never hit", len(stages), "stages")
    yield none("kill -9: places that differ in the end", tally.n_differ, "places")
    yield none("kill -9: damaged files after any kill", tally.n_damaged, "files")
    yield none("kill -9: places out of date in the end", tally.n_stale, "places")
    what = "kill -9: calls paid again after one kill, at most"
    if rehearsal.counts_calls:
        paid = sum(tally.repeated)
        say(f"kill -9: {paid} of {tally.n_calls} calls were paid again: {tally.repeated}")
        unit = f"calls; {IN_FLIGHT} in flight, and a check of what the server can do"
        yield Result(what, max(tally.repeated), IN_FLIGHT + 1, unit, is_cost=True)
    else:
        yield NotMeasured(what, "this study's models are not the rehearsal's server")


def _stages_to_kill(rehearsal: Rehearsal, tally: _Tally) -> list[str]:
    """For one study: each stage once or twice, some if few kills are left, or those never hit."""
    stages, rng = list(rehearsal.stage_seconds), rehearsal.rng
    if tally.n_studies >= _MAX_STUDIES + rehearsal.n_kills // len(stages):
        return []
    n_left = rehearsal.n_kills - tally.hit.total()
    if n_left >= len(stages):
        return [stage for stage in stages for _ in range(1 + (rng.random() < _P_TWICE))]
    if n_left > 0:
        return [stages[i] for i in sorted(rng.sample(range(len(stages)), n_left))]
    if rehearsal.n_kills < len(stages):
        return []
    return [stage for stage in stages if not tally.hit[stage]]


def _one_study(rehearsal: Rehearsal, trial: Trial, chosen: list[str], tally: _Tally) -> None:
    """Kills a study in some of its stages, then lets it end."""
    rng, requests = rehearsal.rng, rehearsal.server.requests
    before = dict(pairwise([*reversed(rehearsal.stage_seconds), None]))
    marks = [len(requests)]
    for stage in chosen:
        is_early = rng.random() < _P_EARLY
        seconds = _EARLY_S if is_early else _SHARE * rehearsal.stage_seconds[stage]
        wait_for = None if is_early else before[stage]
        if _killed(rehearsal, trial, wait_for, rng.uniform(0, seconds)):
            tally.hit[_under_way(rehearsal, trial)] += 1
            tally.n_early += is_early
            time.sleep(_SETTLING_S)  # what the dead had sent arrives late on a busy machine
            marks.append(len(requests))
            _look(trial, tally)
    trial.run()
    marks.append(len(requests))
    runs = [requests[start:stop] for start, stop in pairwise(marks)]
    later = requests[marks[0] :]
    for run in runs[:-1]:
        later = later[len(run) :]
        again = repeated(run, later)
        tally.repeated.append(len(again))
    tally.n_calls += marks[-1] - marks[0]
    _look(trial, tally)
    tally.n_differ += n_differing(trial.contents(), rehearsal.contents)
    tally.n_stale += len(trial.stale())
    tally.n_spooled += trial.n_spooled()
    tally.n_pruned += trial.prune()
    _look(trial, tally)


def _killed(rehearsal: Rehearsal, trial: Trial, before: str | None, seconds: float) -> bool:
    """Starts a run and kills it some time after a stage was done; false if it ended before."""
    process = trial.start()
    if before is not None:
        n_wanted = sum(asset == before for asset, _ in rehearsal.contents)
        for _ in ticks(_WAITING_S):
            if process.exitcode is not None or trial.n_made()[before] >= n_wanted:
                break
    process.join(seconds)
    return kill(process)


def _under_way(rehearsal: Rehearsal, trial: Trial) -> str:
    """The first stage that is not made everywhere, in the order in which they are made."""
    made, wanted = trial.n_made(), Counter(asset for asset, _ in rehearsal.contents)
    return next((name for name in rehearsal.stage_seconds if made[name] < wanted[name]), "the end")


def _look(trial: Trial, tally: _Tally) -> None:
    """Nothing that is there may be damaged."""
    faults = trial.faults()
    if faults:
        say(f"{trial.folder.name}: {faults[:3]}")
    tally.n_damaged += len(faults)
