"""Everything that can go wrong with a run, and then a run that is left alone.

Whatever happened, the study must end with the very tables of a run that nothing disturbed; no file
that anything rests on may be damaged at any moment; and no call may be paid twice but those that
were under way.

The study has every stage of the demo study, on the tests' planted world: a tiny subject model, and
a fake server as its language models, which counts what it is asked. ``--study`` takes another one.
"""

import os
import random
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from benchmarks.measure import NotMeasured, Result
from rehearsals.faults.daemons import commands, daemon, schedulers
from rehearsals.faults.disks import disk
from rehearsals.faults.kills import kills
from rehearsals.faults.rehearsal import Rehearsal, say
from rehearsals.faults.remote import s3
from rehearsals.faults.studies import LATENCY_S, extend_study, planted_study
from rehearsals.faults.trial import Trial, kill_all
from tests.e2e.planted import answer, build_world

Figures = Iterator[Result | NotMeasured]
KINDS: dict[str, Callable[[Rehearsal], Figures]] = {
    "kills": kills,
    "disk": disk,
    "s3": s3,
    "commands": commands,
    "daemon": daemon,
    "schedulers": schedulers,
}


def run(arguments: list[str]) -> Figures:
    """Figures with bars; what happened besides is said on stderr."""
    chosen = _parsed(arguments)
    os.environ["DAGSTER_DISABLE_TELEMETRY"] = "1"
    with (
        tempfile.TemporaryDirectory(prefix="rehearsal-") as name,
        FakeLLMServer(answer, latency_s=lambda _: LATENCY_S) as server,
        ExitStack() as opened,
    ):
        folder = Path(name)
        if chosen.study is None:
            world = build_world(folder / "world")
            write = partial(planted_study, world, server.base_url)
        else:
            write = partial(extend_study, chosen.study.resolve())
        rng = random.Random(chosen.seed)
        undisturbed = Trial(folder / "undisturbed", write)
        opened.callback(kill_all)
        rehearsal = Rehearsal(undisturbed, server, rng, chosen.kills, chosen.study is None)
        yield from rehearsal.begin()
        for kind in chosen.kinds or KINDS:
            say(f"--- {kind}")
            yield from KINDS[kind](rehearsal)


def _parsed(arguments: list[str]) -> Namespace:
    parser = ArgumentParser("python -m rehearsals faults")
    parser.add_argument("kinds", nargs="*", help=f"some of {', '.join(KINDS)}; all by default")
    parser.add_argument("--kills", type=int, default=30, help="kill -9 so often")
    parser.add_argument("--seed", type=int, default=0, help="of what happens when")
    parser.add_argument("--study", type=Path, help="e.g. studies/demo.yaml; its store is not used")
    chosen = parser.parse_args(arguments)
    unknown = [kind for kind in chosen.kinds if kind not in KINDS]
    if unknown:
        parser.error(f"no {unknown[0]!r}; there are {', '.join(KINDS)}")
    return chosen
