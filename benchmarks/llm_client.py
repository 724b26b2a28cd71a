"""What a call costs the client: CPU per request, and requests per second with 64 in flight.

Detection prompts of the package's own scorer go to a fake server that answers after 50 ms. Server
and client are processes of their own. A client's figures are those of its whole run: prompts built,
sent, read, written to a journal on disk, sealed; not: start of Python, made-up records, verdicts.
The plain version keeps 64 calls of the ``openai`` package in flight and nothing else: no journal,
no retries, no limits. Both must have the same answers.

Requests per second need a core for each process: with fewer, the figure is that of the machine,
which the name of the result then says. CPU time holds all the same.
"""

import argparse
import asyncio
import hashlib
import importlib
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from upath import UPath

from autointerp_dagster.adapters.llm.factory import open_journal, open_llm
from autointerp_dagster.adapters.llm.fake.rule_judge import word_judge
from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from autointerp_dagster.core.config.models import RemoteLLMConfig
from autointerp_dagster.core.llm import LabelList, Request
from autointerp_dagster.core.scorers import detection
from autointerp_dagster.core.scorers.planning import Job
from benchmarks.llm_jobs import BLOCK, CONFIG, Words, jobs
from benchmarks.measure import Result

LATENCY_S = 0.05
IN_FLIGHT = 64
N_LATENTS, N_WINDOWS = 300, 50
"""At 5 windows per prompt: 6,000 requests, so that starting weighs little."""
REPEATS = 3
BARS = {"httpx": (1.8, 500.0), "aiohttp": (1.3, 750.0)}
"""By transport: CPU milliseconds per request at most, requests per second at least."""

Answers = dict[str, str]
"""By question."""


def run() -> list[Result]:
    """Two bars per transport."""
    results = []
    for transport, (bar_ms, bar_rate) in BARS.items():
        if importlib.util.find_spec("aiohttp") is None and transport == "aiohttp":
            sys.stderr.write("llm_client: aiohttp is not installed, its bars are skipped\n")
            continue
        ours = [_measured("ours", transport) for _ in range(REPEATS)]
        plain = [_measured("plain", transport) for _ in range(REPEATS)]
        assert len({line["digest"] for line in [*ours, *plain]}) == 1, "the answers differ"
        cpu_ms, plain_ms = (statistics.median(line["cpu_ms"] for line in s) for s in (ours, plain))
        rate, plain_rate = (statistics.median(line["rate"] for line in s) for s in (ours, plain))
        versus = f"{transport}; plain: {plain_ms:.2f} ms, {plain_rate:.0f}/s"
        results += [
            Result(f"LLM client, {versus}", cpu_ms, bar_ms, "ms CPU/request", is_cost=True),
            Result(f"LLM client, {versus}{_crowded(ours)}", rate, bar_rate, "requests/s"),
        ]
    return results


def _crowded(lines: list[dict[str, float]]) -> str:
    """A remark on others who used the cores meanwhile; empty if there were none."""
    load = statistics.median(line["load"] for line in lines)
    cores = os.cpu_count() or 1
    # The two processes of the benchmark are busy themselves.
    return f"; load {load:.1f} on {cores} cores, not meaningful" if load > cores else ""


def _measured(version: str, transport: str) -> dict[str, float]:
    """What the client's process says of itself."""
    server = FakeLLMServer(word_judge(0), latency_s=lambda _: LATENCY_S)
    with server, tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.llm_client", version, transport]
        command += [server.base_url, folder]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert server.max_open <= IN_FLIGHT
    return json.loads(said.splitlines()[-1])


def requests(made: Iterable[Job]) -> Iterator[Request]:
    """Built as they are drawn."""
    for job in made:
        for prompt in detection.prompts_of(job.record, job.tasks[0], CONFIG, Words(), BLOCK):
            yield prompt.request


def ours(asked: Iterator[Request], base_url: str, folder: Path) -> Answers:
    """Through the package's client, with its journal."""
    config = RemoteLLMConfig(base_url=base_url, model="fake", max_in_flight=IN_FLIGHT)
    with open_journal(UPath(folder)) as journal, open_llm(config, journal=journal) as llm:
        return {_question(request): str(done.text) for request, done in llm.answer(asked)}


def plain(asked: Iterator[Request], base_url: str, _: Path) -> Answers:
    """Through the ``openai`` package alone."""
    return asyncio.run(_plain(asked, base_url))


async def _plain(asked: Iterator[Request], base_url: str) -> Answers:
    openai = importlib.import_module("openai")
    transport = {"http_client": openai.DefaultAioHttpClient()} if _has_aiohttp() else {}
    client = openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, **transport)
    answers: Answers = {}

    async def work() -> None:
        for request in asked:
            reply = await client.chat.completions.create(**_body(request))
            answers[_question(request)] = reply.choices[0].message.content or ""

    async with client:
        await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))
    return answers


def _body(request: Request) -> dict[str, Any]:
    assert isinstance(request.answer, LabelList)
    schema = {"name": "labels", "strict": True, "schema": request.answer.json_schema}
    return {
        "model": "fake",
        "messages": [{"role": m.role, "content": m.content} for m in request.messages],
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
        "logprobs": True,
        "top_logprobs": request.top_logprobs,
        "response_format": {"type": "json_schema", "json_schema": schema},
    }


def _question(request: Request) -> str:
    return request.messages[-1].content


def _has_aiohttp() -> bool:
    return sys.modules.get("aiohttp", "absent") is not None


def _client(arguments: list[str]) -> None:
    """The client's process: one run, and its figures as a JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("version", choices=["ours", "plain"])
    parser.add_argument("transport", choices=list(BARS))
    parser.add_argument("base_url")
    parser.add_argument("folder", type=Path)
    wanted = parser.parse_args(arguments)
    if wanted.transport == "httpx":
        sys.modules["aiohttp"] = None  # pyright: ignore  # as if it were not installed
    importlib.import_module("autointerp_dagster.adapters.llm.remote.backend")
    version: Callable[..., Answers] = {"ours": ours, "plain": plain}[wanted.version]
    asked = requests(list(jobs(N_LATENTS, N_WINDOWS)))
    cpu_before, started = _cpu_s(), time.monotonic()
    answers = version(asked, wanted.base_url, wanted.folder)
    cpu_s, wall_s = _cpu_s() - cpu_before, time.monotonic() - started
    digest = hashlib.blake2b(json.dumps(sorted(answers.items())).encode()).hexdigest()
    line = {"cpu_ms": 1000 * cpu_s / len(answers), "rate": len(answers) / wall_s}
    print(json.dumps({**line, "digest": digest, "load": os.getloadavg()[0]}))


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    _client(sys.argv[1:])
