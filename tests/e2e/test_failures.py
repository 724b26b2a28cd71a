"""A study that is cut off or answered badly: it goes on where it stopped, and nothing vanishes."""

import _thread
import hashlib
import json
import os
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
from planted import ChatMessages, answer

from autointerp_dagster.adapters.llm.fake_server import FakeLLMServer
from autointerp_dagster.core.errors import LLMError
from autointerp_dagster.core.schemas import VERDICTS
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
    small: Bench, instance: dg.DagsterInstance, server: FakeLLMServer, script: Script, tmp_path: Path
) -> None:
    bench = fresh(small, tmp_path, instance)
    n_asked = len(server.requests)
    script.latency_s = interrupt_at(n_asked + 20)
    with pytest.raises((KeyboardInterrupt, dg.DagsterExecutionInterruptedError)):
        bench.run()
    script.reset()
    done = finished(bench)
    assert {"activation_cache", "latent_records"} <= {asset for asset, _ in done}
    assert ("study_metrics", "all") not in done

    bench.run()
    assert bench.contents() == small.contents()
    after = finished(bench)
    assert {name: after[name] for name in done} == done
    sent = server.requests[n_asked:]
    assert distinct(sent) <= len(sent) <= distinct(sent) + MAX_IN_FLIGHT
    assert bench.stale() == set()


def test_cells_finished_before_an_interruption_are_shown_as_materialized(
    small: Bench, instance: dg.DagsterInstance, server: FakeLLMServer, script: Script, tmp_path: Path
) -> None:
    """The events of a step that was cut off name exactly the cells that were committed."""
    bench = fresh(small, tmp_path, instance)
    script.latency_s = interrupt_at(len(server.requests) + 40)
    with pytest.raises((KeyboardInterrupt, dg.DagsterExecutionInterruptedError)):
        bench.run()
    done = {place for asset, place in finished(bench) if asset == "score_detection"}
    assert 0 < len(done) < len(bench.study.cells)
    shown = {place for (asset, place), status in bench.statuses().items()
             if asset == "score_detection" and status == "FRESH"}  # fmt: skip
    assert shown == done


def test_a_model_that_cannot_be_reached_ends_the_run_and_loses_nothing(
    small: Bench, instance: dg.DagsterInstance, script: Script, tmp_path: Path
) -> None:
    bench = fresh(small, tmp_path, instance)
    script.fault = lambda number: "reset"
    with pytest.raises(LLMError):
        bench.run()
    script.reset()
    done = finished(bench)
    assert {asset for asset, _ in done} >= {"token_dataset", "activation_cache", "latent_records"}
    bench.run()
    assert bench.contents() == small.contents()
    assert {name: finished(bench)[name] for name in done} == done


def is_unlucky(messages: ChatMessages) -> bool:
    """Whether this question is one of the tenth that are never answered in the right format."""
    questions = [m["content"] for m in messages if m["role"] == "user"]
    asked = next(q for q in reversed(questions) if not q.startswith("That answer"))
    return hashlib.blake2b(asked.encode(), digest_size=1).digest()[0] < 26


def mostly_right(messages: ChatMessages) -> str:
    return PROSE if is_unlucky(messages) else answer(messages)


def test_answers_in_prose_become_failed_rows_and_no_row_vanishes(
    whole: Bench, instance: dg.DagsterInstance, server: FakeLLMServer, script: Script, tmp_path: Path
) -> None:
    """Defects 7 and 8: a failed request vanished; an unparsable explanation was scored."""
    script.answer = mostly_right
    bench = Bench(tmp_path, whole.world, whole.base_url, instance)
    bench.run(until="latent_metrics")
    explained = bench.table("explanations", "explanations").filter(explainer="default")
    unread = explained.filter(status="failed")
    assert 0 < unread.height < 8
    assert set(unread["reason"]) == {"unparsable"}
    assert unread["text"].null_count() == unread.height
    assert unread["call_id"].null_count() == 0

    verdicts = bench.table("score_detection", "verdicts")
    assert _own_windows(verdicts) == _own_windows(
        whole.table("score_detection", "verdicts").join(
            unread.select("hookpoint", "latent", "explainer"),
            on=["hookpoint", "latent", "explainer"],
            how="anti",
        )
    )
    failed = verdicts.filter(status="failed")
    assert 0.03 < failed.height / verdicts.height < 0.2
    assert set(failed["reason"]) == {"unparsable"}
    assert failed.select("prediction", "probability", "score").null_count().row(0) == (
        failed.height,
    ) * 3
    heads = bench.heads()
    counted = sum(
        head.summary["n_failed"]
        for (asset, _), head in heads.items()
        if asset == "score_detection" and head.status == "ok"
    )
    assert counted == failed.height


def _own_windows(verdicts: pl.DataFrame) -> set[tuple]:
    own = verdicts.filter(subject="own")
    return set(own.select(name for name in VERDICTS.key).iter_rows())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
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
    assert len(sent) <= distinct(sent) + 3 * MAX_IN_FLIGHT
    assert not list((bench.folder / "store").rglob("*.tmp"))
    assert set(STAGES) >= {asset for asset, _ in after}


def _kill_at(bench: Bench, server: FakeLLMServer, n_requests: int) -> None:
    """Runs the study in a process of its own and kills it once so many requests have come."""
    home = bench.folder / "dagster_home"
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
