"""A key that is found nowhere in what a run wrote, however badly the run went."""

import base64
import gzip
import hashlib
import json
import math
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import yaml
from bench import Bench
from planted import answer

from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer, SeededFaults
from autointerp_dagster.core.llm import FreeText

KEY = "sk-canary-8d1f0b7c5e"
VARIABLE = "AUTOINTERP_TEST_CANARY"
NO_CREDIT_FROM = 14
"""Of the first run's requests: in the middle of detection. None is left until the run has ended."""
STUDY: dict[str, Any] = {
    "layers": ["h.0"],
    "latents": [0, 1, 9, 20],
    "explainers": {"top_tokens": None},
    "metrics": {"n_bootstrap": 100},
    "floors": {"sample": 2},
}
FORMS = [KEY.encode(), base64.b64encode(KEY.encode()), KEY.encode("utf-16-le")]

HOME = {
    "telemetry": {"enabled": False},
    "python_logs": {
        "managed_python_loggers": [
            "autointerp_dagster",
            "openai",
            "httpx2",
            "httpcore2",
            "aiohttp",
        ],
        "python_log_level": "DEBUG",
    },
}
"""Dagster keeps whatever these libraries log."""


def permanent(body: Any) -> str | None:
    """One question in sixteen never gets an answer."""
    asked = json.dumps(body["messages"][:8]).encode()
    is_unlucky = hashlib.blake2b(asked, digest_size=1).digest()[0] < 16
    return "500" if is_unlucky and not explains(body) else None


def explains(body: Any) -> bool:
    return FreeText().marker in body["messages"][0]["content"]


def run(bench: Bench, home: Path) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, VARIABLE: KEY, "DAGSTER_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "autointerp_dagster.cli.main", "run", str(bench.path)]
    return subprocess.run(command, env=environment, capture_output=True, timeout=300)


def contents(path: Path) -> Iterator[bytes]:
    """The bytes of a file and, where it packs something, what is packed."""
    packed = path.read_bytes()
    yield packed
    if packed.startswith(b"PAR1"):
        yield str(pq.read_table(path).to_pydict()).encode()
        yield str(pq.read_metadata(path).metadata).encode()
    elif packed.startswith(b"SQLite format 3"):
        with sqlite3.connect(path) as database:
            yield "\n".join(database.iterdump()).encode()
    elif packed.startswith(b"\x1f\x8b"):
        yield gzip.decompress(packed)


def is_leaked(text: bytes) -> bool:
    return any(form in text for form in FORMS)


def test_the_key_is_found_nowhere_in_what_a_run_wrote(
    world: Path, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    """Every error of this server repeats the key."""
    model = {"api_key_env": VARIABLE, "max_in_flight": 4}
    overrides = {**STUDY, "models": {"explainer": model, "judge": model}}
    home = tmp_path / "dagster_home"
    home.mkdir()
    (home / "dagster.yaml").write_text(yaml.safe_dump(HOME))
    rates = {"429": 0.05, "500": 0.05, "html_502": 0.03, "error_object": 0.05, "malformed": 0.03}
    no_credit_from: float = NO_CREDIT_FROM
    server = FakeLLMServer(
        answer,
        api_key=KEY,
        seeded=SeededFaults(rates, permanent=permanent),
        faults=lambda number: "403" if number >= no_credit_from else None,
    )
    with server:
        bench = Bench(tmp_path, world, server.base_url, instance, overrides)
        failed = run(bench, home)
        no_credit_from = math.inf
        finished = run(bench, home)
    assert finished.returncode == 0, finished.stderr
    assert b"403" in failed.stderr + failed.stdout
    assert failed.returncode != 0
    assert set(server.n_faults) >= {"403", "500"}
    judged = bench.table("score_detection", "verdicts")
    assert set(judged["reason"].drop_nulls()) == {"call_failed"}

    said = [failed.stdout, failed.stderr, finished.stdout, finished.stderr]
    assert not [text for text in said if is_leaked(text)]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"journal", "heads", "dagster_home"} <= {part for p in files for part in p.parts}
    assert not [path for path in files if any(is_leaked(text) for text in contents(path))]
    # The search would have found it: the name of the variable is written down.
    assert [p for p in files if any(VARIABLE.encode() in text for text in contents(p))]
