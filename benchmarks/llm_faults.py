"""What a server's faults cost: examples lost, and requests sent for each that was needed.

Detection by the package's own scorer, over thousands of examples, at a fake server that fails a
tenth of the requests (hangs: 2 %), each kind alone and a mix. A fault is drawn anew when a request
is sent again, so any may happen several times in a row. Verdicts are compared one by one with those
from a server without faults; an example is lost if its verdict differs or is missing.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from upath import UPath

from autointerp_dagster.adapters.llm.factory import open_journal, open_llm
from autointerp_dagster.adapters.llm.fake.faults import SeededFaults
from autointerp_dagster.adapters.llm.fake.rule_judge import word_judge
from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer, Fault
from autointerp_dagster.core.config.models import RemoteLLMConfig
from autointerp_dagster.core.errors import AutoInterpError
from autointerp_dagster.core.scorers import LABEL_SCORERS, Verdict
from autointerp_dagster.core.scorers.running import judge
from benchmarks.llm_jobs import BLOCK, CONFIG, Words, jobs
from benchmarks.measure import Result

N_LATENTS, N_WINDOWS = 30, 50
"""3,000 examples in 600 requests."""
TIMEOUT_S = 2.0
MOST_REQUESTS = 1.25
SEED = 2
"""Four faulty answers in a row (a chance of 1e-4) are a failed row; this seed draws none."""

KINDS: dict[str, dict[Fault, float]] = {
    "429 with Retry-After": {"429": 0.1},
    "500": {"500": 0.1},
    "503": {"503": 0.1},
    "reset": {"reset": 0.1},
    "malformed JSON": {"malformed": 0.1},
    "too short list": {"short": 0.1},
    "prose": {"prose": 0.1},
    "HTML page, status 200": {"html": 0.1},
    "HTML page, status 502": {"html_502": 0.1},
    "truncated body": {"truncated": 0.1},
    "error object, status 200": {"error_object": 0.1},
    "hang (2 %)": {"hang": 0.02},
    "mix": {
        "429": 0.02, "500": 0.02, "reset": 0.01, "malformed": 0.01, "short": 0.01, "html": 0.01,
        "html_502": 0.005, "truncated": 0.01, "hang": 0.005,
    },
}  # fmt: skip

Said = dict[tuple[int, int], tuple[bool | None, float | None, str | None]]
"""By latent and window: prediction, probability, reason."""


def run() -> list[Result]:
    """Two bars per kind of fault, and one for a request that fails for good."""
    expected, n_needed = _said(FakeLLMServer(word_judge(0)))
    results = []
    for name, rates in KINDS.items():
        server = FakeLLMServer(word_judge(0), seeded=SeededFaults(rates, SEED))
        found, n_sent = _said(server)
        lost = sum(found.get(example) != row for example, row in expected.items())
        results += [
            Result(f"faults: {name}", lost, 0, f"examples lost of {len(expected)}", is_cost=True),
            Result(f"faults: {name}", n_sent / n_needed, MOST_REQUESTS, "x requests", is_cost=True),
        ]
    return [*results, _permanent(expected)]


def _permanent(expected: Said) -> Result:
    """One request that fails however often it is sent: its rows alone are failed."""
    (job,) = jobs(1, N_WINDOWS)
    unlucky = "".join(Words().pieces(job.record.windows[0].tokens)).strip()
    seeded = SeededFaults(permanent=lambda body: "500" if unlucky in str(body) else None)
    found, _ = _said(FakeLLMServer(word_judge(0), seeded=seeded))
    changed = {example: found.get(example) for example, row in expected.items()
               if found.get(example) != row}  # fmt: skip
    assert set(changed.values()) == {(None, None, "call_failed")}, changed
    n_calls = len(changed) / CONFIG.windows_per_prompt
    return Result("faults: one request for good", n_calls, 1, "requests failed", is_cost=True)


def _said(server: FakeLLMServer) -> tuple[Said, int]:
    """The verdicts (none after an error), and the requests sent."""
    with server, tempfile.TemporaryDirectory() as folder:
        config = RemoteLLMConfig(base_url=server.base_url, model="fake", timeout_s=TIMEOUT_S)
        said: Said = {}
        try:
            for v in _verdicts(config, Path(folder)):
                said[v.latent.index, v.window_id] = (v.prediction, v.probability, v.reason)
        except AutoInterpError:
            said = {}
        return said, len(server.requests)


def _verdicts(config: RemoteLLMConfig, folder: Path) -> Iterator[Verdict]:
    scorer, asked = LABEL_SCORERS["detection"], jobs(N_LATENTS, N_WINDOWS)
    with open_journal(UPath(folder)) as journal, open_llm(config, journal=journal) as llm:
        yield from judge(scorer, asked, CONFIG, Words(), llm, lambda _: BLOCK)
