"""What every kind of fault is rehearsed with: the run that nothing disturbed, and the dice."""

import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autointerp_dagster.adapters.heads import Name, read_heads
from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from benchmarks.measure import Result
from rehearsals.faults.trial import Trial, n_differing


@dataclass
class Rehearsal:
    """The run that nothing disturbed, and whatever trials need."""

    undisturbed: Trial
    server: FakeLLMServer
    rng: random.Random
    n_kills: int
    counts_calls: bool
    """Whether the study asks ``server``."""
    contents: dict[Name, str] = field(default_factory=dict)
    """Of the undisturbed run, by place."""
    seconds: float = 0.0
    """Of the undisturbed run."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """Of the undisturbed run: how long after the stage before each was done, in that order."""
    n_bytes: int = 0
    """Of its store."""

    def begin(self) -> Iterator[Result]:
        """Runs the study, and then once more, which must change and ask nothing."""
        trial = self.undisturbed
        trial.run("--dry-run")  # loads what all processes share
        started = time.time()
        self.seconds = trial.run()
        self.contents = trial.contents()
        self.stage_seconds = _stage_seconds(trial, started)
        files = [path for path in Path(trial.root).rglob("*") if path.is_file()]
        self.n_bytes = sum(path.stat().st_size for path in files)
        n_asked = len(self.server.requests)
        told = ", ".join(f"{name} {s:.1f}" for name, s in self.stage_seconds.items())
        say(
            f"undisturbed: {self.seconds:.1f} s, {len(self.contents)} places, {n_asked} calls, "
            f"{len(files)} files, {self.n_bytes / 1e6:.1f} MB; seconds by stage: {told}"
        )
        again = trial.run()
        n_again = len(self.server.requests) - n_asked
        say(f"run again: {again:.1f} s, {n_again} calls, {trial.prune()} files pruned")
        n_wrong = n_differing(trial.contents(), self.contents) + n_again
        n_wrong += len(trial.faults()) + len(trial.stale()) + trial.n_spooled()
        yield none("undisturbed: places or calls of a second run that differ", n_wrong, "")

    def trial(self, name: str, **options: Any) -> Trial:
        """A trial with nothing in its store."""
        return Trial(self.undisturbed.folder.parent / name, self.undisturbed.write, **options)


def _stage_seconds(trial: Trial, started: float) -> dict[str, float]:
    """From the times at which the last head of each stage was written."""
    heads = Path(trial.root) / "heads" / trial.path.stem
    ended: dict[str, float] = {}
    for asset, cell in read_heads(trial.store, trial.path.stem).manifests:
        written = (heads / asset / cell).stat().st_mtime
        ended[asset] = max(written, ended.get(asset, 0.0))
    ordered = sorted(ended.items(), key=lambda item: item[1])
    began = [started, *(end for _, end in ordered[:-1])]
    return {name: end - start for (name, end), start in zip(ordered, began, strict=True)}


def repeated(earlier: list[dict[str, Any]], later: list[dict[str, Any]]) -> set[str]:
    """Those of some requests that were sent again."""
    sent = {json.dumps(body, sort_keys=True) for body in earlier}
    return sent & {json.dumps(body, sort_keys=True) for body in later}


def none(what: str, n: int, unit: str) -> Result:
    """A figure that must be 0."""
    return Result(what, n, 0, unit, is_cost=True)


def say(line: str) -> None:
    """A line for people, beside the figures."""
    print(line, file=sys.stderr, flush=True)
