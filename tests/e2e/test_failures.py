"""A study that is cut off or answered badly: it goes on where it stopped, and nothing vanishes."""

import _thread
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from bench import Bench, Name, Script, in_flight
from planted import answer

from autointerp_dagster.adapters.llm.fake.rule_judge import ChatMessages
from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from autointerp_dagster.core.errors import LLMError
from autointerp_dagster.core.prompts import DESCRIPTION_LABEL, asked_for
from autointerp_dagster.core.schemas import VERDICTS
from autointerp_dagster.resources.versions import CHECKOUT
from autointerp_dagster.study.stages import STAGES

PROSE = "I would rather talk about something else."
MAX_IN_FLIGHT = 4


def fresh(small: Bench, folder: Path, instance: dg.DagsterInstance, **overrides: object) -> Bench:
    """The small study with nothing in its store yet."""
    kept = {**small.overrides, "models": in_flight(MAX_IN_FLIGHT), **overrides}
    return Bench(folder, small.world, small.base_url, instance, kept)


def finished(bench: Bench) -> dict[Name, str]:
    """The manifest of every place that is done."""
    return {name: str(head.path) for name, head in bench.heads().items() if head.complete}


def distinct(bodies: list[dict]) -> int:
    """How many different questions there were, repeats not counted."""
    return len({json.dumps([b["messages"][:8], b["max_tokens"]]) for b in bodies})


def interrupt_at(number: int) -> Callable[[int], float]:
    """Ctrl-C when this request arrives; answers that are under way come a little later."""

    def latency_s(arrived: int) -> float:
        if arrived == number:
            _thread.interrupt_main()
        return 0.2 if arrived >= number else 0.0

    return latency_s


def test_an_interrupted_run_goes_on_where_it_stopped(
    small: Bench,
    instance: dg.DagsterInstance,
    server: FakeLLMServer,
    script: Script,
    tmp_path: Path,
) -> None:
    bench = fresh(small, tmp_path, instance)
    n_asked = len(server.requests)
    script.latency_s = interrupt_at(n_asked + 26)  # 4 explanations, then detection: 16 per layer
    with pytest.raises(dg.DagsterExecutionInterruptedError):
        bench.run()
    script.reset()
    done = finished(bench)
    judged = {place for asset, place in done if asset == "score_detection"}
    assert 0 < len(judged) < len(bench.study.cells)
    assert "score_fuzzing" not in {asset for asset, _ in done}
    # Dagster shows what is in the store, cells of the step that was cut off too, and no more.
    assert {name for name, status in bench.statuses().items() if status == "FRESH"} == done.keys()

    bench.run()
    assert bench.contents() == small.contents()
    after = finished(bench)
    assert {name: after[name] for name in done} == done
    sent = server.requests[n_asked:]
    assert distinct(sent) <= len(sent) <= distinct(sent) + MAX_IN_FLIGHT
    assert bench.stale() == set()


def test_calls_that_failed_are_made_again_by_the_next_run(
    small: Bench,
    instance: dg.DagsterInstance,
    server: FakeLLMServer,
    script: Script,
    tmp_path: Path,
) -> None:
    """Credit runs out in the middle of a step: its cells are committed, but never taken as done."""
    bench = fresh(small, tmp_path, instance, models=in_flight(1))
    no_credit_from = len(server.requests) + 3
    script.fault = lambda number: "403" if number >= no_credit_from else None
    with pytest.raises(LLMError, match="403"):
        bench.run()
    heads = bench.heads()
    explained = {place: head for (asset, place), head in heads.items() if asset == "explanations"}
    reasons = bench.table("explanations", "explanations")["reason"].drop_nulls().to_list()
    assert reasons.count("call_failed") == 1  # of four
    assert sum(not head.complete for head in explained.values()) == 1

    script.reset()
    bench = fresh(small, tmp_path, instance)
    bench.run()
    assert bench.contents() == small.contents()
    assert all(head.complete for head in bench.heads().values())


def is_unlucky(messages: ChatMessages) -> bool:
    """Whether this question is one of those that never get an answer in the right format."""
    if asked_for(messages[0]["content"]) == "explanation":
        return answer(messages).endswith("names of cities")
    questions = [m["content"] for m in messages if m["content"].startswith(DESCRIPTION_LABEL)]
    return hashlib.blake2b(questions[-1].encode(), digest_size=1).digest()[0] < 26


def mostly_right(messages: ChatMessages) -> str:
    return PROSE if is_unlucky(messages) else answer(messages)


def test_answers_in_prose_become_failed_rows_and_no_row_vanishes(
    small: Bench,
    instance: dg.DagsterInstance,
    server: FakeLLMServer,
    script: Script,
    tmp_path: Path,
) -> None:
    """Defects 7 and 8: a failed request vanished; an unparsable explanation was scored."""
    script.answer = mostly_right
    n_asked = len(server.requests)
    bench = fresh(small, tmp_path, instance)
    bench.run()
    explained = bench.table("explanations", "explanations").filter(pl.col("status") != "skipped")
    assert {(row["latent"], row["status"], row["reason"], row["text"] is None)
            for row in explained.to_dicts()} == {
        (0, "failed", "unparsable", True),
        (1, "ok", None, False), (7, "ok", None, False), (9, "ok", None, False),
    }  # fmt: skip
    verdicts, all_right = (b.table("score_detection", "verdicts") for b in (bench, small))
    own = pl.col("subject") == "own"
    expected = all_right.filter(own & ~((pl.col("hookpoint") == "h.1") & (pl.col("latent") == 0)))
    key = list(VERDICTS.key)
    assert verdicts.filter(own).select(key).equals(expected.select(key))

    unlucky = {
        body["messages"][-1]["content"]
        for body in server.requests[n_asked:]
        if body["messages"][-1]["content"].startswith(DESCRIPTION_LABEL)
        and is_unlucky(body["messages"])
    }
    both = pl.concat([verdicts, bench.table("score_fuzzing", "verdicts")])
    failed = both.filter(status="failed")
    assert failed["call_id"].n_unique() == len(unlucky) > 0
    assert set(failed["reason"]) == {"unparsable"}
    assert failed.select("prediction", "probability", "score").null_count().row(0) == (
        (failed.height,) * 3
    )
    scores = [head for (asset, _), head in bench.heads().items() if asset.startswith("score_")]
    assert sum(head.summary.get("n_failed", 0) for head in scores) == failed.height
    metrics = bench.table("latent_metrics", "latent_metrics").filter(variant="all", subject="own")
    told = metrics.filter(latent=0, hookpoint="h.1")
    assert set(told["status"]) == {"no_explanation"}
    assert metrics.filter(metric="balanced_accuracy", status="ok")["n_failed"].sum() == (
        failed.filter(own).height
    )
    assert all(head.complete for head in scores)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_killed_process_leaves_nothing_that_a_rerun_does_not_mend(
    seed: int,
    small: Bench,
    instance: dg.DagsterInstance,
    server: FakeLLMServer,
    script: Script,
    tmp_path: Path,
) -> None:
    """kill -9 at three moments of one study, then a run that is left alone."""
    bench = fresh(small, tmp_path, instance)
    script.latency_s = lambda number: 0.03
    n_asked, done = len(server.requests), {}
    for moment in (3, 25, 60):
        _kill_at(bench, server, n_asked + moment + 7 * seed)
        now = finished(bench)
        assert {name: now[name] for name in done} == done
        done = now
    bench.run()
    after = finished(bench)
    assert {name: after[name] for name in done} == done
    assert bench.contents() == small.contents()
    sent = server.requests[n_asked:]
    # Lost with each kill: what was in flight, or answered and not yet journalled.
    assert len(sent) <= distinct(sent) + 3 * 2 * MAX_IN_FLIGHT
    assert not list((bench.folder / "store").rglob("*.tmp"))
    assert set(STAGES) >= {asset for asset, _ in after}


def _kill_at(bench: Bench, server: FakeLLMServer, n_requests: int) -> None:
    """Runs the study in a process of its own and kills it once so many requests have come."""
    home = bench.folder / "dagster_home"
    home.mkdir(exist_ok=True)
    shutil.copy(CHECKOUT / "dagster_home" / "dagster.yaml", home)  # with pools, which kills hold
    environment = {**os.environ, "DAGSTER_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "autointerp_dagster.cli.main", "run", str(bench.path)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    end = time.monotonic() + 120
    while len(server.requests) < n_requests and time.monotonic() < end:
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
