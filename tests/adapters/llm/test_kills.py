"""kill -9 while calls are under way: a rerun ends with the same, and little is paid twice."""

import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import kill_script
import pytest
from llm_requests import count_of

from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer

LATENCY_S = 0.02
SEED = 8


def script(server: FakeLLMServer, n: int, folder: Path) -> subprocess.Popen:
    arguments = [server.base_url, str(folder / "store"), str(n), str(folder / "out.json")]
    return subprocess.Popen([sys.executable, kill_script.__file__, *arguments])


def finished(server: FakeLLMServer, n: int, folder: Path) -> str:
    """The outcome of all calls, by a process that is left alone."""
    assert script(server, n, folder).wait(timeout=120) == 0
    return (folder / "out.json").read_text()


def killed_after(
    process: subprocess.Popen, n_calls: int, delay_s: float, server: FakeLLMServer
) -> None:
    """Kills a process a little after so many different calls have come."""
    with process:
        end = time.monotonic() + 60
        while len(server.n_sent) < n_calls and time.monotonic() < end:
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(delay_s)
        process.kill()


def paid_twice(phases: list[Counter[str]]) -> list[int]:
    """By kill, the calls sent before it (since when not again) that were sent after it too.

    Args:
        phases: How often each call was sent between two kills.
    """
    lost = [0] * len(phases)
    last_sent: dict[str, int] = {}
    for number, phase in enumerate(phases):
        for call in phase:
            if call in last_sent:
                lost[last_sent[call]] += 1
            last_sent[call] = number
    return lost


def check(moments: list[tuple[int, float]], n: int, folder: Path) -> list[int]:
    """Kills the script at these moments (calls, seconds after), then lets it end."""
    (folder / "uninterrupted").mkdir()
    with FakeLLMServer(count_of, latency_s=lambda i: LATENCY_S) as server:
        uninterrupted = finished(server, n, folder / "uninterrupted")
        assert len(server.requests) == n
    phases: list[Counter[str]] = []
    with FakeLLMServer(count_of, latency_s=lambda i: LATENCY_S) as server:
        sent: Counter[str] = Counter()
        for n_calls, delay_s in moments:
            killed_after(script(server, n, folder), n_calls, delay_s, server)
            phases.append(server.n_sent - sent)
            sent = server.n_sent.copy()
        assert finished(server, n, folder) == uninterrupted
        phases.append(server.n_sent - sent)
        assert len(server.n_sent) == n
        assert server.max_open <= kill_script.MAX_IN_FLIGHT
    assert sum(paid_twice(phases)) == server.n_sent.total() - n
    return paid_twice(phases)


def test_what_three_kills_cost_is_no_more_than_was_in_flight(tmp_path):
    lost = check([(60, 0.0), (150, 0.01), (240, 0.03)], 300, tmp_path)
    assert max(lost) <= kill_script.MAX_IN_FLIGHT


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_what_a_kill_at_any_moment_costs_is_no_more_than_was_in_flight(number, tmp_path):
    lots = random.Random(SEED + number)
    # The last few while the journal is closed.
    n_calls = lots.randint(1, 980) if number < 16 else 1000
    lost = check([(n_calls, lots.uniform(0, 0.1))], 1000, tmp_path)
    assert max(lost) <= kill_script.MAX_IN_FLIGHT
