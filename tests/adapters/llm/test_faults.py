"""A server that fails now and then, through the real scorer: nothing is lost, little is repeated.

Defects 6, 7 and 9 of the reference have their tests here too.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
from llm_judging import jobs, judged, said
from llm_requests import FAST, ask, count_of, questions, remote
from upath import UPath

from autointerp_dagster.adapters.llm.client import JournaledLLM
from autointerp_dagster.adapters.llm.fake.faults import SeededFaults
from autointerp_dagster.adapters.llm.fake.rule_judge import word_judge
from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer, Fault
from autointerp_dagster.adapters.llm.journal.journal import Journal
from autointerp_dagster.adapters.llm.remote.backend import OpenAIBackend
from autointerp_dagster.core.scorers import verdicts_frame

RATES: dict[str, dict[Fault, float]] = {
    "429": {"429": 0.1},
    "500": {"500": 0.1},
    "503": {"503": 0.1},
    "reset": {"reset": 0.1},
    "malformed": {"malformed": 0.1},
    "short": {"short": 0.1},
    "prose": {"prose": 0.1},
    "html": {"html": 0.1},
    "html_502": {"html_502": 0.1},
    "truncated": {"truncated": 0.1},
    "error_object": {"error_object": 0.1},
    "hang": {"hang": 0.02},
    "mix": {
        "429": 0.02, "500": 0.01, "503": 0.01, "reset": 0.01, "malformed": 0.01, "short": 0.01,
        "html": 0.01, "html_502": 0.005, "truncated": 0.01, "hang": 0.005,
    },
}  # fmt: skip
N_LATENTS, N_WINDOWS = 12, 10
N_PROMPTS = N_LATENTS * N_WINDOWS  # of two windows each, of both classes
MOST_REQUESTS = 1.25 * N_PROMPTS


@pytest.fixture
def journal(tmp_path) -> Iterator[Journal]:
    with Journal(UPath(tmp_path / "store")) as journal:
        yield journal


def llm_at(server: FakeLLMServer, journal: Journal, **changes) -> JournaledLLM:
    return JournaledLLM(OpenAIBackend(remote(server.base_url, **changes)), journal, backoff=FAST)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> list[tuple]:
    """What a server without faults says."""
    folder = tmp_path_factory.mktemp("store")
    with FakeLLMServer(word_judge(0)) as server, Journal(UPath(folder)) as journal:
        with llm_at(server, journal) as llm:
            verdicts = judged(llm, jobs(N_LATENTS, N_WINDOWS, N_WINDOWS))
        assert len(server.n_sent) == N_PROMPTS
    assert len({verdict.prediction for verdict in verdicts}) == 2
    return said(verdicts)


@pytest.mark.parametrize("name", RATES)
def test_no_example_is_lost_and_few_requests_are_repeated(name, journal, expected):
    timeout_s = 1.0 if "hang" in RATES[name] else 20.0
    server = FakeLLMServer(word_judge(0), seeded=SeededFaults(RATES[name], seed=1))
    with server, llm_at(server, journal, timeout_s=timeout_s) as llm:
        verdicts = judged(llm, jobs(N_LATENTS, N_WINDOWS, N_WINDOWS))
    assert said(verdicts) == expected
    assert server.n_faults.total() > 0
    assert server.n_faults.keys() <= RATES[name].keys()
    assert len(server.requests) <= MOST_REQUESTS


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", "call_failed"), ("429", "call_failed"), ("reset", "call_failed"),
        ("html", "call_failed"), ("truncated", "call_failed"), ("error_object", "call_failed"),
        ("malformed", "call_failed"), ("403", "call_failed"), ("hang", "call_failed"),
        ("short", "unparsable"), ("prose", "unparsable"), ("refusal", "refused"),
    ],
)  # fmt: skip
def test_a_request_that_always_fails_is_one_failed_row(fault: Fault, reason: str, journal):
    unlucky = "rain rain rain"

    def permanent(body) -> Fault | None:
        return fault if any(unlucky in turn["content"] for turn in body["messages"]) else None

    asked = jobs(4, 5, 5)
    asked[1].record.windows[3].tokens[:3] = 0  # "rain" thrice
    seeded = SeededFaults(permanent=permanent)
    timeout_s = 0.5 if fault == "hang" else 20.0
    with FakeLLMServer(word_judge(0), seeded=seeded) as server:
        with llm_at(server, journal, timeout_s=timeout_s) as llm:
            verdicts = judged(llm, asked, windows_per_prompt=1)
        assert set(server.n_faults) == {fault}
    assert len(verdicts) == 4 * 10
    (failed,) = (verdict for verdict in verdicts if verdict.status == "failed")
    assert (failed.latent.index, failed.window_id, failed.reason) == (1, 3 << 16, reason)
    assert (failed.prediction, failed.probability) == (None, None)


def test_parameters_of_concurrent_requests_arrive_as_they_were_sent(journal):
    """Defect 6: after one scorer's calls all others ran with its max_tokens."""
    single, list_ = [
        [ask(f"question {i}", max_tokens=n, temperature=t, top_logprobs=k) for i in range(60)]
        for n, t, k in ((1, 0.0, 5), (64, 0.7, 0))
    ]
    got: list[tuple[int, str | None]] = []

    def caller(asked, max_tokens):
        got.extend((max_tokens, done.text) for _, done in llm.answer(asked))

    server = FakeLLMServer(count_of, latency_s=lambda i: 0.005 * (i % 3), ignores=("max_tokens",))
    with server, llm_at(server, journal) as llm:
        threads = [
            threading.Thread(target=caller, args=(part, n))
            for part, n in ((single, 1), (list_, 64))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    sent = Counter(
        (b["messages"][1]["content"], b["max_tokens"], b["temperature"], b.get("top_logprobs"))
        for b in server.requests
    )
    wanted = {(f"question {i}", 1, 0.0, 5) for i in range(60)}
    wanted |= {(f"question {i}", 64, 0.7, None) for i in range(60)}
    assert sent == dict.fromkeys(wanted, 1)
    assert len(got) == 120
    kinds = [b["max_tokens"] for b in server.requests]
    assert sum(a != b for a, b in pairwise(kinds)) > 1  # they were interleaved


def test_the_shorter_last_group_is_kept_and_a_failed_one_is_counted(journal):
    """Defect 7: the last examples were thrown away, and failures were never counted."""
    unlucky = SeededFaults(permanent=lambda body: "500" if _n_windows(body) == 1 else None)
    with FakeLLMServer(word_judge(0), seeded=unlucky) as server, llm_at(server, journal) as llm:
        verdicts = judged(llm, jobs(3, 4, 3), windows_per_prompt=3)  # groups of 3, 3 and 1
    assert len(verdicts) == 3 * 7
    frame = verdicts_frame(verdicts)
    failed = frame.filter(status="failed")
    assert failed["reason"].to_list() == ["call_failed"] * 3
    assert failed["latent"].to_list() == [0, 1, 2]
    with FakeLLMServer(word_judge(0)) as server, llm_at(server, journal) as llm:
        mended = judged(llm, jobs(3, 4, 3), windows_per_prompt=3)
    assert {verdict.status for verdict in mended} == {"ok"}


def _n_windows(body) -> int:
    return body["response_format"]["json_schema"]["schema"]["maxItems"]


def test_one_failed_request_ends_no_run_and_a_rerun_asks_only_for_it(tmp_path):
    """Defect 9: one failed request ended the run, and nothing could be resumed."""
    unlucky = SeededFaults(permanent=lambda body: "500" if is_seven(body) else None)

    def is_seven(body) -> bool:
        return body["messages"][1]["content"] == "question 7"

    def reasons(server: FakeLLMServer) -> dict[str, str | None]:
        with Journal(UPath(tmp_path)) as journal:
            backend = OpenAIBackend(remote(server.base_url, alias="ours"))
            with JournaledLLM(backend, journal, backoff=FAST) as llm:
                return {r.messages[1].content: c.reason for r, c in llm.answer(questions(30))}

    with FakeLLMServer(count_of, seeded=unlucky) as server:
        first = reasons(server)
    assert {q: r for q, r in first.items() if r is not None} == {"question 7": "call_failed"}
    with FakeLLMServer(count_of) as server:
        second = reasons(server)
        assert [is_seven(body) for body in server.requests] == [True]
    assert second == dict.fromkeys(first)


def test_a_latent_without_negatives_ends_no_run(journal):
    """Defect 9: one latent whose windows are all of one class ended the run."""
    asked = jobs(2, 4, 4)
    lonely = replace(asked[0].record, windows=asked[0].record.activating("test"))
    silent = replace(asked[1].record, windows=())
    asked = [asked[0]._replace(record=lonely), asked[1]._replace(record=silent), *jobs(3, 4, 4)[2:]]
    with FakeLLMServer(word_judge(0)) as server, llm_at(server, journal) as llm:
        verdicts = judged(llm, asked)
    assert Counter(verdict.latent.index for verdict in verdicts) == {0: 4, 2: 8}
    assert {verdict.status for verdict in verdicts} == {"ok"}
