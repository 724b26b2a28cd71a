import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from llm_requests import BLOCK, FAST, ask, count_of, questions, remote
from upath import UPath

from autointerp_dagster.adapters.llm.backend import FULL_LINE, CallError, Reply
from autointerp_dagster.adapters.llm.client import Backoff, JournaledLLM
from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from autointerp_dagster.adapters.llm.journal.journal import Journal
from autointerp_dagster.adapters.llm.ledger import Cost, Ledger
from autointerp_dagster.adapters.llm.loop import LoopThread
from autointerp_dagster.adapters.llm.questions import Question, known_call
from autointerp_dagster.adapters.llm.remote.backend import OpenAIBackend
from autointerp_dagster.core.errors import LLMError, StoreError
from autointerp_dagster.core.llm import (
    Completion,
    Continuation,
    FreeText,
    JournalBlock,
    Request,
    Usage,
)
from autointerp_dagster.study import BudgetConfig


@pytest.fixture
def journal(tmp_path) -> Iterator[Journal]:
    with Journal(UPath(tmp_path / "store")) as journal:
        yield journal


def llm_at(server: FakeLLMServer, journal: Journal, limits=None, **changes) -> JournaledLLM:
    backend = OpenAIBackend(remote(server.base_url, **changes))
    return JournaledLLM(backend, journal, **{"backoff": FAST, **(limits or {})})


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def answers(llm: JournaledLLM, requests: Iterable[Request]) -> dict[str, Completion]:
    """Completions by question; every request exactly once."""
    pairs = [(r.messages[-1].content, c) for r, c in llm.answer(requests)]
    by_question = dict(pairs)
    assert len(by_question) == len(pairs)
    return by_question


def reasons(completed: dict[str, Completion]) -> list[str | None]:
    """By question, whichever came first."""
    return [completed[question].reason for question in sorted(completed)]


def is_right(question: str, completion: Completion) -> bool:
    return completion.reason is None and completion.text == (
        "[1, 0]" if int(question.split()[1]) % 2 == 0 else "[0, 1]"
    )


def test_every_request_comes_back_with_text_probabilities_and_usage(journal):
    with FakeLLMServer(count_of) as server, llm_at(server, journal) as llm:
        ((request, completion),) = llm.answer([ask("question 0", top_logprobs=5)])
        assert completion.reason is None
        readings = request.answer.read(completion.text, completion.tokens)
        assert [r.prediction for r in readings] == [True, False]
        assert [r.probability for r in readings] == pytest.approx([0.9, 0.1])
        # "Count." and "question 0" are 3 words; "[", "1", ", ", "0", "]" are 5 tokens.
        assert completion.usage == llm.usage == Usage(3, 0, 5, 0.0)
        assert completion.call_id == request.call_id(llm.identity)


@pytest.mark.parametrize(
    "fault", ["429", "500", "reset", "malformed", "html", "prose", "short", "hang"]
)
def test_no_request_is_lost_to_a_fault_that_passes(journal, fault):
    n = 6 if fault == "hang" else 24
    # Only early calls fail, so no request can meet the fault more often than it is repeated.
    server = FakeLLMServer(count_of, faults=lambda i: fault if i < n // 3 else None)
    with server, llm_at(server, journal, timeout_s=0.5 if fault == "hang" else 10) as llm:
        completed = answers(llm, questions(n))
    assert len(completed) == n
    assert all(is_right(question, completion) for question, completion in completed.items())


def test_no_request_is_lost_to_mixed_faults(journal):
    faults = ["429", None, None, "reset", None, "prose", None, None, "500", None, None, "short"]
    faults += ["html", None, None, None, "malformed", None, None]
    server = FakeLLMServer(count_of, faults=lambda i: faults[i % len(faults)])
    with server, llm_at(server, journal) as llm:
        completed = answers(llm, questions(100))
    assert len(completed) == 100
    assert {c.reason for c in completed.values()} <= {None, "call_failed", "unparsable"}
    assert sum(is_right(*item) for item in completed.items()) >= 98


def test_a_call_that_never_succeeds_is_a_row_with_its_reason_after_five_tries(journal):
    def faults(number):
        return "500" if number > 0 else None

    with FakeLLMServer(count_of, faults=faults) as server, llm_at(server, journal) as llm:
        answers(llm, [ask("question 0")])
        (completion,) = answers(llm, [ask("question 1")]).values()
        assert (completion.text, completion.reason) == (None, "call_failed")
        assert len(server.requests) == 1 + 5


def test_a_refusal_is_a_row_and_is_not_asked_again(journal):
    with FakeLLMServer(count_of, faults=lambda i: "refusal") as server:
        with llm_at(server, journal) as llm:
            (completion,) = answers(llm, [ask("question 0")]).values()
        assert (completion.text, completion.reason) == (None, "refused")
        assert len(server.requests) == 1


def test_a_faulty_answer_is_asked_again_with_its_fault_and_each_attempt_is_journalled(journal):
    with FakeLLMServer(count_of, faults=lambda i: "short" if i == 0 else None) as server:
        with llm_at(server, journal) as llm:
            ((request, completion),) = llm.answer([ask("question 0")])
        repeated = server.requests[1]["messages"]
    assert [turn["role"] for turn in repeated] == ["system", "user", "assistant", "user"]
    assert repeated[2]["content"] == "[1]"
    assert "the list had 1 entries instead of 2" in repeated[3]["content"]
    assert (completion.text, completion.reason, completion.n_calls) == ("[1, 0]", None, 2)
    assert completion.call_id != request.call_id(llm.identity)
    first = journal.lookup(BLOCK, request.call_id(llm.identity))
    decided = journal.find(completion.call_id)
    assert first is not None
    assert first.text == "[1]"
    assert decided is not None
    assert [m.content for m in decided.messages] == [turn["content"] for turn in repeated]


def test_after_three_repeats_an_answer_is_unparsable_and_not_an_explanation(journal):
    request = replace(ask("question 0"), answer=FreeText())
    with FakeLLMServer(lambda messages: "words for rain") as server:
        with llm_at(server, journal) as llm:
            (completion,) = answers(llm, [request]).values()
        assert (completion.reason, completion.n_calls) == ("unparsable", 4)
        assert len(server.requests) == 4
        # A repeat quotes one fault, however many there were.
        assert [len(body["messages"]) for body in server.requests] == [2, 4, 4, 4]


def test_a_description_that_was_cut_off_is_asked_for_again_but_a_full_line_is_not():
    request = replace(ask("question 0"), answer=FreeText())
    cut = Question(request, "model")
    cut.settle(known_call(Reply("[EXPLANATION]: words for ra", "length")))
    assert cut.completion is None
    assert "cut off before its end; be shorter" in cut.asked.messages[-1].content
    cut.settle(known_call(Reply("[EXPLANATION]: rain", "stop")))
    assert cut.completion is not None
    assert (cut.completion.text, cut.completion.n_calls) == ("[EXPLANATION]: rain", 2)
    for answer, reply in (
        (FreeText(), Reply("[EXPLANATION]: words for ra", FULL_LINE)),
        (Continuation(), Reply("words for ra", "length")),
        (request.answer, Reply("[EXPLANATION]: rain", "stop")),
    ):
        taken = Question(replace(request, answer=answer), "model")
        taken.settle(known_call(reply))
        assert taken.completion is not None
        assert taken.completion.reason is None


def test_a_description_that_is_always_cut_off_is_unparsable():
    question = Question(replace(ask("question 0"), answer=FreeText()), "model")
    for _ in range(4):
        assert question.completion is None
        question.settle(known_call(Reply("[EXPLANATION]: words for ra", "length")))
    assert question.completion is not None
    assert question.completion.reason == "unparsable"


def test_a_second_run_pays_nothing_and_gets_the_same(journal, tmp_path):
    faults = ["prose", None, "refusal"]
    server = FakeLLMServer(count_of, faults=lambda i: faults[i % 3])
    with server:
        with llm_at(server, journal) as llm:
            first = answers(llm, questions(20))
        journal.close()
        n_paid = len(server.requests)
        with Journal(UPath(tmp_path / "store")) as reopened, llm_at(server, reopened) as llm:
            second = answers(llm, questions(20))
            assert llm.usage == Usage()
        assert len(server.requests) == n_paid
    assert all(completion.from_journal for completion in second.values())
    assert not any(completion.from_journal for completion in first.values())
    assert {q: replace(c, from_journal=True, usage=Usage()) for q, c in first.items()} == second


def test_a_journal_answers_without_server_and_without_key(journal, monkeypatch):
    with FakeLLMServer(count_of) as server:
        config = remote(server.base_url)
        with llm_at(server, journal) as llm:
            list(llm.answer(questions(3)))
    with JournaledLLM(OpenAIBackend(config), journal) as llm:
        assert all(c.from_journal for _, c in llm.answer(questions(3)))


def test_what_failed_in_transport_is_asked_again_by_the_next_run(journal):
    server = FakeLLMServer(count_of, faults=lambda i: "500" if 0 < i <= 5 else None)
    with server, llm_at(server, journal, max_in_flight=1) as llm:
        first = answers(llm, questions(2))
        second = answers(llm, questions(2))
    assert reasons(first) == [None, "call_failed"]
    assert reasons(second) == [None, None]


def test_the_same_call_in_flight_is_sent_once_and_paid_once(journal):
    server = FakeLLMServer(count_of, latency_s=lambda i: 0.1)
    with server, llm_at(server, journal) as llm:
        completions = [c for _, c in llm.answer([ask("question 0")] * 8)]
        assert len(server.requests) == 1
        assert sum((c.usage for c in completions), start=Usage()) == llm.usage
    assert [c.text for c in completions] == ["[1, 0]"] * 8
    assert sum(not c.from_journal for c in completions) == 1


@pytest.mark.parametrize("is_known", [False, True])
def test_a_call_that_two_blocks_need_at_once_is_paid_once_and_kept_in_both(journal, is_known):
    first = ask("question 0")
    second = replace(first, block=JournalBlock("score_detection", "other", 7))
    backend = EchoBackend(4)
    with JournaledLLM(backend, journal) as llm:
        if is_known:
            list(llm.answer([first]))
            journal.load(second.block)
        came = [c for _, c in llm.answer([first, second])]
    assert len(backend.asked) == 1 + is_known
    assert [c.text for c in came] == ["[1, 0]"] * 2
    with JournaledLLM(backend, journal, mode="replay") as llm:
        assert [c.reason for _, c in llm.answer([first, second])] == [None, None]


def test_an_empty_answer_is_asked_again_without_an_empty_turn(journal):
    said = iter(["", " \n", "[1, 0]"])
    with FakeLLMServer(lambda messages: next(said)) as server, llm_at(server, journal) as llm:
        (completion,) = answers(llm, questions(1)).values()
        assert [[turn["role"] for turn in body["messages"]] for body in server.requests] == [
            ["system", "user"]
        ] * 3
        second, third = (body["messages"][1]["content"] for body in server.requests[1:])
    assert (
        second
        == third
        == ("question 0\n\nAn earlier answer to this was empty. Answer in the format.")
    )
    assert (completion.text, completion.n_calls) == ("[1, 0]", 3)


def test_what_is_ready_is_sent_while_the_next_request_is_being_made(journal):
    backend = EchoBackend(16)

    def slowly() -> Iterator[Request]:
        yield from (ask(f"question {1000 + i}") for i in range(10))
        wait_until(lambda: len(backend.asked) == 10)
        raise ValueError("all are under way")

    with JournaledLLM(backend, journal) as llm, pytest.raises(ValueError, match="under way"):
        list(llm.answer(slowly()))


def test_samples_of_one_question_are_separate_calls(journal):
    requests = [ask("question 0", temperature=0.7, sample=i) for i in range(3)]
    with FakeLLMServer(count_of) as server, llm_at(server, journal) as llm:
        assert len({c.call_id for _, c in llm.answer(requests)}) == 3
        assert len(server.requests) == 3


def test_requests_in_flight_reach_the_limit_and_never_exceed_it(journal):
    server = FakeLLMServer(count_of, latency_s=lambda i: 0.03)
    with server, llm_at(server, journal, max_in_flight=7) as llm:
        assert len(answers(llm, questions(60))) == 60
        assert server.max_open == 7


def test_all_that_one_latent_has_ready_is_in_flight_together(journal):
    server = FakeLLMServer(count_of, latency_s=lambda i: 0.2)
    with server, llm_at(server, journal) as llm:
        answers(llm, questions(1))  # tells what the server can do
        answers(llm, questions(21))
        assert server.max_open == 20


def test_the_same_call_in_two_threads_is_sent_once_and_paid_once(journal):
    server = FakeLLMServer(count_of, latency_s=lambda i: 0.2)
    with server, llm_at(server, journal) as llm:
        completions: list[Completion] = []
        callers = [
            threading.Thread(target=lambda: completions.extend(answers(llm, questions(3)).values()))
            for _ in range(4)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert len(server.requests) == 3
    assert len(completions) == 12
    assert sum((c.usage for c in completions), start=Usage()) == llm.usage
    assert llm.usage.completion_tokens == 15


def test_two_callers_of_one_llm_share_its_limit(journal):
    server = FakeLLMServer(count_of, latency_s=lambda i: 0.02)
    with server, llm_at(server, journal, max_in_flight=4) as llm:
        callers = [
            threading.Thread(target=lambda part=part: list(llm.answer(part)))
            for part in (questions(40)[:20], questions(40)[20:])
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert len(server.requests) == 40
        assert server.max_open == 4


def test_requests_are_drawn_lazily(journal):
    n_drawn = 0

    def endless() -> Iterator[Request]:
        nonlocal n_drawn
        while True:
            n_drawn += 1
            yield ask(f"question {n_drawn}")

    with FakeLLMServer(count_of) as server, llm_at(server, journal, max_in_flight=4) as llm:
        stream = llm.answer(endless())
        for n_yielded, _ in enumerate(stream, start=1):
            assert n_drawn - n_yielded <= 2 * 4
            if n_yielded == 50:
                break
        stream.close()
        assert len(server.requests) <= n_drawn


def test_the_order_in_which_requests_end_changes_no_result(journal, tmp_path):
    def run(latency_s, folder) -> dict[str, Completion]:
        faults = {"question 3": "short"}
        server = FakeLLMServer(
            lambda messages: "[1]" if messages[-1]["content"] in faults else count_of(messages),
            latency_s=latency_s,
        )
        with server, Journal(UPath(tmp_path / folder)) as journal:
            backend = OpenAIBackend(remote(server.base_url))
            backend.identity = "the same model"
            with JournaledLLM(backend, journal, backoff=FAST) as llm:
                return answers(llm, questions(12))

    forwards = run(lambda i: 0.01 * i, "forwards")
    backwards = run(lambda i: max(0.0, 0.12 - 0.01 * i), "backwards")
    assert forwards == backwards
    assert forwards["question 3"].n_calls == 2


def test_sampling_parameters_travel_with_each_request(journal):
    requests = [ask("question 0", max_tokens=1, temperature=0.7, seed=3), ask("question 2")]
    with FakeLLMServer(count_of) as server:
        with llm_at(server, journal, max_in_flight=1, structured_outputs=False) as llm:
            answers(llm, requests[:1])
            n_before = len(server.requests)
            (completion,) = answers(llm, requests[1:]).values()
        first, second = server.requests[0], server.requests[n_before]
    assert (first["max_tokens"], first["temperature"], first["seed"]) == (1, 0.7, 3)
    assert (second["max_tokens"], second["temperature"]) == (64, 0.0)
    assert "seed" not in second
    assert "logprobs" not in second
    assert completion.text == "[1, 0]"


# A call for one of these questions costs 3 prompt and 5 completion tokens; it is feared to cost
# 23 prompt tokens (5 estimated, times 1.3, and 8 for each of 2 messages) and 64 for the answer.


def test_a_budget_in_tokens_stops_calling_but_the_journal_still_answers(journal, caplog):
    with FakeLLMServer(count_of) as server:
        # 2 calls done are 16 tokens: 16 + 87 = 103 is allowed, 24 + 87 = 111 is not.
        account = Ledger(BudgetConfig(tokens=103)).account(remote(server.base_url))
        with llm_at(server, journal, {"account": account}) as llm:
            first = answers(llm, questions(6))
            again = answers(llm, questions(6))
            assert llm.usage.n_tokens == 24
        assert len(server.requests) == 3
    assert sorted(map(str, reasons(first))) == ["None"] * 3 + ["budget"] * 3
    assert reasons(first) == reasons(again)
    assert [c.text for c in first.values() if c.reason == "budget"] == [None] * 3
    assert len([m for m in caplog.messages if "budget.tokens: 103 tokens would be" in m]) == 1


def test_a_budget_in_dollars_holds_for_two_models_together(journal):
    prices = {"usd_per_1m_prompt": 1.0, "usd_per_1m_completion": 2.0}
    with FakeLLMServer(count_of) as server:
        # 3 + 2 * 5 = 13e-6 $ a call, feared to be 23 + 2 * 64 = 151e-6 $: 26e-6 + 151e-6 is
        # allowed, 39e-6 + 151e-6 is not.
        ledger = Ledger(BudgetConfig(usd=180e-6))
        for alias, n_answered in [("explainer", 2), ("judge", 1)]:
            config = remote(server.base_url, alias=alias, **prices)
            limits = {"account": ledger.account(config)}
            with llm_at(server, journal, limits, alias=alias, **prices) as llm:
                n = 2 if alias == "explainer" else 4
                completed = answers(llm, questions(n))
            assert sum(c.reason is None for c in completed.values()) == n_answered
        assert ledger.usage.usd == pytest.approx(39e-6)
        assert len(server.requests) == 3


def test_many_calls_in_flight_never_exceed_a_budget(journal):
    server = FakeLLMServer(count_of, latency_s=lambda i: 0.01)
    with server:
        ledger = Ledger(BudgetConfig(tokens=400))
        with llm_at(server, journal, {"account": ledger.account(remote(server.base_url))}) as llm:
            completed = answers(llm, questions(100))
    # Calls that cost less than feared make room for others: 39 are 312 tokens, 312 + 87 = 399.
    assert ledger.usage.n_tokens == 8 * 40
    assert sum(c.reason is None for c in completed.values()) == 40


class DeniedBackend:
    """Denies calls for question 1000 and more, as if the key were wrong."""

    identity = "denied"
    capabilities = None
    max_in_flight = 4

    def __init__(self, wrong: str | None = None) -> None:
        self.wrong = wrong
        self.n_asked = self.n_checks = 0

    def groups(self, requests: Iterable[Request]) -> Iterator[list[Request]]:
        return ([request] for request in requests)

    async def ask(self, group: Sequence[Request]) -> list[Reply]:
        self.n_asked += 1
        if int(group[0].messages[1].content.split()[1]) >= 1000:
            raise CallError("denied.", retriable=False, endpoint=True, usage=Usage())
        return [Reply("[1, 0]", "stop")]

    async def check(self) -> None:
        self.n_checks += 1
        await asyncio.sleep(0.01)
        if self.wrong is not None:
            raise LLMError(self.wrong)

    async def close(self) -> None:
        pass


class FailingBackend(DeniedBackend):
    """Raises what ``failure`` makes at every call, the first few of them all at once."""

    identity = "failing"

    def __init__(self, failure: Callable[[], Exception], n_at_once: int = 1) -> None:
        super().__init__()
        self.failure = failure
        self._n_at_once, self._are_there = n_at_once, asyncio.Event()

    async def ask(self, group: Sequence[Request]) -> list[Reply]:
        self.n_asked += 1
        if self.n_asked >= self._n_at_once:
            self._are_there.set()
        await self._are_there.wait()
        await asyncio.sleep(0)
        raise self.failure()


@pytest.mark.parametrize(
    ("usage", "n_sent", "booked"),
    [(None, 5, 5 * 87), (Usage(50, 0, 10), 7, 7 * 60), (Usage(), 20 * 5, 0)],
)
def test_calls_that_come_back_late_or_unreadable_count_against_the_budget(
    journal, usage, n_sent, booked
):
    backend = FailingBackend(lambda: CallError("odd.", retriable=True, usage=usage))
    ledger = Ledger(BudgetConfig(tokens=500))
    account = ledger.account(remote("http://host/v1"))
    with JournaledLLM(backend, journal, account=account, backoff=FAST) as llm:
        completed = answers(llm, questions(20))
    assert (backend.n_asked, ledger.usage.n_tokens) == (n_sent, booked)
    assert ledger.usage == llm.usage
    assert ledger.usage.estimated_tokens == (booked if usage is None else 0)
    assert ledger.is_exhausted == (booked > 0)
    assert set(reasons(completed)) <= {"budget", "call_failed"}


def test_cancelled_calls_are_booked_as_estimated(journal):
    ledger = Ledger(BudgetConfig(tokens=10_000))
    account = ledger.account(remote("http://host/v1"))
    feared = account.estimate([ask("question 1000")])
    backend = EchoBackend(4)
    with JournaledLLM(backend, journal, account=account) as llm:
        stream = llm.answer([ask("question 0"), ask("question 1000")])
        next(stream)
        wait_until(lambda: len(backend.asked) == 2)
        stream.close()
        wait_until(lambda: ledger.usage.n_tokens == 8 + feared.tokens)
    assert ledger.usage.estimated_tokens == feared.tokens


@pytest.mark.parametrize("failure", [LLMError("no credit"), TypeError("a mistake")])
def test_an_error_of_a_backend_leaves_no_reservation_to_others(journal, failure):
    ledger = Ledger(BudgetConfig(tokens=1000))
    account = ledger.account(remote("http://host/v1"))
    backend = FailingBackend(lambda: failure, n_at_once=4)  # else some are cancelled: may be paid
    with JournaledLLM(backend, journal, account=account) as llm, pytest.raises(type(failure)):
        answers(llm, questions(4))
    left = 1000 - ledger.usage.n_tokens
    assert left == (1000 if isinstance(failure, LLMError) else 1000 - 4 * 87)
    assert ledger.reserve(Cost(0.0, left)) == "granted"


def test_a_deadline_that_has_passed_sends_nothing_but_the_journal_answers(journal):
    with FakeLLMServer(count_of) as server:
        with llm_at(server, journal) as llm:
            answers(llm, questions(2))
        with llm_at(server, journal, {"deadline": timedelta()}) as llm:
            late = answers(llm, questions(4))
        assert len(server.requests) == 2
    assert reasons(late) == [None, None, "deadline", "deadline"]


def test_calls_under_way_at_the_deadline_end_and_no_other_is_sent(journal):
    server = FakeLLMServer(count_of, latency_s=lambda i: 0.1)
    limits = {"deadline": time.monotonic() + 0.35}
    with server, llm_at(server, journal, limits, max_in_flight=2) as llm:
        completed = answers(llm, questions(50))
        n_sent = len(server.requests)
    n_answered = sum(c.reason is None for c in completed.values())
    assert set(reasons(completed)) == {None, "deadline"}
    assert (len(completed), n_answered) == (50, n_sent)


def test_a_call_that_waits_for_another_try_gives_up_at_the_deadline(journal):
    limits = {"deadline": timedelta(seconds=0.3)}
    with FakeLLMServer(count_of, faults=lambda i: "500") as server:
        backend = OpenAIBackend(remote(server.base_url))
        slow = Backoff(first_s=1e6, longest_s=1e6)
        with JournaledLLM(backend, journal, backoff=slow, **limits) as llm:
            completed = answers(llm, questions(3))
    assert reasons(completed) == ["deadline"] * 3


def test_a_completion_tells_what_it_cost_whoever_paid(journal):
    faults = ["short", None, None, None]
    server = FakeLLMServer(count_of, faults=lambda i: faults[i])
    with server, llm_at(server, journal, max_in_flight=1) as llm:
        (first,) = answers(llm, questions(1)).values()
        (again,) = answers(llm, questions(1)).values()
        (twin, other) = (c for _, c in llm.answer([ask("question 2")] * 2))
    # "[1]" is 3 tokens after 3 words, "[1, 0]" 5 after these, the answer and the complaint.
    assert first.cost == first.usage
    assert (first.n_calls, first.cost.completion_tokens) == (2, 3 + 5)
    assert (again.cost, again.usage) == (first.cost, Usage())
    assert {twin.usage, other.usage} == {Usage(3, 0, 5), Usage()}
    assert twin.cost == other.cost == Usage(3, 0, 5)


def test_nobody_listening_is_an_error_that_says_how_to_start_a_server(journal):
    with FakeLLMServer(count_of) as server:
        config = remote(server.base_url)
    with (
        JournaledLLM(OpenAIBackend(config), journal, backoff=FAST) as llm,
        pytest.raises(LLMError, match="vllm serve fake --port 8000") as caught,
    ):
        list(llm.answer(questions(100)))
    assert config.base_url in str(caught.value)


def test_a_server_that_goes_away_for_good_stops_the_run_and_loses_nothing(journal):
    limits = {"backoff": replace(FAST, silent_s=0.3)}
    with FakeLLMServer(count_of) as server, llm_at(server, journal, limits) as llm:
        stream = llm.answer(questions(1000))
        first = [next(stream) for _ in range(10)]
        server.__exit__()
        with pytest.raises(LLMError, match="nothing is paid twice") as caught:
            first += list(stream)
        assert "vllm serve fake" in str(caught.value)
        with pytest.raises(LLMError, match="in the journal"):
            answers(llm, [ask("question 5000")])
        kept = answers(llm, [request for request, _ in first])  # which needs no server
    assert all(c.from_journal and c.reason is None for c in kept.values())


def test_a_server_that_comes_back_is_asked_on(journal):
    port = free_port()
    served = FakeLLMServer(count_of, port=port)
    with served, llm_at(served, journal, {"backoff": Backoff(first_s=0.05)}) as llm:
        stream = llm.answer(questions(200))
        completed = [next(stream)]
        served.__exit__()
        restart = threading.Timer(0.2, lambda: again.__enter__())
        again = FakeLLMServer(count_of, port=port)
        restart.start()
        completed += list(stream)
        restart.join()
        again.__exit__()
    assert len(completed) == 200
    assert {c.reason for _, c in completed} == {None}


def test_calls_that_are_denied_without_end_stop_the_run_and_lose_nothing(journal):
    server = FakeLLMServer(count_of, faults=lambda i: "403" if i >= 10 else None)
    with server:
        with (
            llm_at(server, journal, max_in_flight=1) as llm,
            pytest.raises(LLMError, match="10 answers are in the journal"),
        ):
            list(llm.answer(questions(1000)))
        assert len(server.requests) == 10 + 50
        server.requests.clear()
    with FakeLLMServer(count_of) as server:
        backend = OpenAIBackend(remote(server.base_url))
        backend.identity = llm.identity
        with JournaledLLM(backend, journal) as llm:
            completed = answers(llm, questions(20))
        assert len(server.requests) == 10
    assert {c.reason for c in completed.values()} == {None}


@pytest.mark.parametrize("n_good", [0, 8])
def test_a_call_that_is_denied_though_the_key_is_good_is_a_row_and_others_go_on(journal, n_good):
    asked = [ask(f"question {i}") for i in (1000, *range(n_good), 1001, 1002)]
    backend = DeniedBackend()
    with JournaledLLM(backend, journal) as llm:
        completed = answers(llm, asked)
    assert [c.reason for c in completed.values()].count("call_failed") == 3
    assert [c.reason for c in completed.values()].count(None) == n_good
    assert 1 <= backend.n_checks <= 3


def test_a_denial_ends_the_run_at_once_if_the_key_is_wrong(journal):
    backend = DeniedBackend("The key is wrong.")
    asked = [*questions(8), *(ask(f"question {1000 + i}") for i in range(2))]
    with JournaledLLM(backend, journal) as llm, pytest.raises(LLMError, match="The key is wrong"):
        answers(llm, asked)
    assert backend.n_checks == 1


def test_of_calls_given_up_the_first_few_are_logged_and_the_rest_counted(journal, caplog):
    with JournaledLLM(DeniedBackend(), journal) as llm:
        mixed = [i + 1000 * (i % 2) for i in range(24)]
        answers(llm, [ask(f"question {i}") for i in mixed])
    assert len([m for m in caplog.messages if "gave up after" in m]) == 5
    assert len([m for m in caplog.messages if "gave up 12 calls in all" in m]) == 1


def test_an_error_reaches_every_caller(journal):
    with FakeLLMServer(count_of) as server:
        config = remote(server.base_url)
    errors: list[LLMError] = []

    def call(part: list[Request]) -> None:
        with pytest.raises(LLMError) as caught:
            list(llm.answer(part))
        errors.append(caught.value)

    with JournaledLLM(OpenAIBackend(config), journal, backoff=FAST) as llm:
        callers = [threading.Thread(target=call, args=[questions(40)[i::4]]) for i in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert len(errors) == 4


def test_a_missing_key_variable_is_named(journal, monkeypatch):
    monkeypatch.delenv("CANARY_KEY", raising=False)
    with FakeLLMServer(count_of) as server:
        with (
            llm_at(server, journal, api_key_env="CANARY_KEY") as llm,
            pytest.raises(LLMError, match="CANARY_KEY is not set"),
        ):
            list(llm.answer(questions(1)))
        assert server.requests == []


def test_the_key_is_sent_and_appears_nowhere_else(journal, tmp_path, monkeypatch, caplog):
    canary = "sk-canary-5f2c"
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("CANARY_KEY", canary)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    with FakeLLMServer(count_of, api_key=canary) as server:
        backend = OpenAIBackend(remote(server.base_url, api_key_env="CANARY_KEY"))
        with JournaledLLM(backend, journal, backoff=FAST) as llm:
            (completion,) = answers(llm, questions(1)).values()
            seen = [repr(llm), repr(backend), repr(completion), backend.identity]
    assert completion.reason is None
    # This server wants another key, and repeats the one it gets.
    with FakeLLMServer(count_of, api_key="another") as server:
        with (
            llm_at(server, journal, api_key_env="CANARY_KEY") as llm,
            pytest.raises(LLMError, match="Check the key in CANARY_KEY") as caught,
        ):
            list(llm.answer([ask("question 7")]))
        assert len(server.requests) == 1
    chained = [caught.value, caught.value.__cause__, caught.value.__context__]
    seen += [repr(error) + str(error) for error in chained]
    journal.close()
    seen += [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    assert not [text for text in seen if canary in text]
    assert canary not in caplog.text
    assert "sk-of-somebody-else" not in str(server.requests)


def test_credentials_in_the_address_are_refused():
    with pytest.raises(ValueError, match="api_key_env") as caught:
        remote("https://user:secret@host/v1")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("rejected", [("logprobs",), ("response_format",), ("seed",)])
def test_a_feature_that_the_server_rejects_is_left_away_from_then_on(journal, rejected):
    with FakeLLMServer(count_of, rejects=rejected) as server:
        with llm_at(server, journal, max_in_flight=1) as llm:
            requests = [ask(f"question {i}", top_logprobs=5, seed=1) for i in range(4)]
            completed = answers(llm, requests)
        assert all(is_right(*item) for item in completed.items())
        assert len(server.requests) == 4 + 1
        sent = server.requests[-1]
    features = {"logprobs", "response_format", "seed"}
    assert features & sent.keys() == features - set(rejected)


def test_a_server_that_rejects_several_features_still_answers(journal):
    rejects = ("logprobs", "response_format")
    with FakeLLMServer(count_of, rejects=rejects) as server, llm_at(server, journal) as llm:
        completed = answers(llm, [ask(f"question {i}", top_logprobs=5) for i in range(4)])
    assert all(is_right(*item) for item in completed.items())


def test_structured_outputs_ask_for_the_list_as_a_schema(journal):
    with FakeLLMServer(count_of) as server, llm_at(server, journal) as llm:
        answers(llm, questions(1))
        schema = server.requests[0]["response_format"]["json_schema"]["schema"]
    assert (schema["type"], schema["minItems"], schema["maxItems"]) == ("array", 2, 2)


class UnitBackend:
    """Asks a unit as a whole, like a local model; the last of each unit is out of format once."""

    identity = "units"
    capabilities = None
    max_in_flight = 1

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def groups(self, requests: Iterable[Request]) -> Iterator[list[Request]]:
        requests = list(requests)
        return iter([[r for r in requests if r.unit == u] for u in ("a", "b")])

    async def check(self) -> None:
        pass

    async def ask(self, group: Sequence[Request]) -> list[Reply]:
        await asyncio.sleep(0)
        self.asked.append([request.messages[1].content for request in group])
        return [
            Reply("prose" if r.attempt == 0 and r.messages[1].content == "q1" else "[1, 1]", "stop")
            for r in group
        ]

    async def close(self) -> None:
        pass


def test_units_are_asked_as_units_and_only_faulty_answers_again(journal):
    requests = [replace(ask(f"q{i}"), unit="ab"[i // 2]) for i in range(4)]
    backend = UnitBackend()
    with JournaledLLM(backend, journal) as llm:
        completed = answers(llm, requests)
    assert backend.asked == [["q0", "q1"], ["q1"], ["q2", "q3"]] or backend.asked == [
        ["q0", "q1"],
        ["q2", "q3"],
        ["q1"],
    ]
    assert {c.reason for c in completed.values()} == {None}
    assert completed["q1"].n_calls == 2


def test_a_unit_that_is_half_in_the_journal_is_run_whole_and_keeps_what_was_used(journal):
    requests = [replace(ask(f"q{i}"), unit="b") for i in (2, 3)]
    backend = UnitBackend()
    with JournaledLLM(backend, journal) as llm:
        answers(llm, requests[:1])
        completed = answers(llm, requests)
    assert backend.asked == [["q2"], ["q2", "q3"]]
    assert [c.from_journal for c in completed.values()] == [True, False]


def test_a_journal_that_cannot_be_written_ends_the_run(tmp_path):
    (tmp_path / "journal-wal").write_text("a file in the way")
    with (
        FakeLLMServer(count_of) as server,
        llm_at(server, Journal(UPath(tmp_path))) as llm,
        pytest.raises(StoreError, match="cannot be written"),
    ):
        list(llm.answer(questions(3)))


class EchoBackend:
    """Answers at once, in this process; the tests below look at what it is asked, and when."""

    identity = "echo"
    capabilities = None

    def __init__(self, max_in_flight: int) -> None:
        self.max_in_flight = max_in_flight
        self.asked: list[str] = []
        self.cancelled: list[str] = []
        self.held = asyncio.Event()
        """Calls for question 1000 and more wait for it, for ever."""

    def groups(self, requests: Iterable[Request]) -> Iterator[list[Request]]:
        return ([request] for request in requests)

    async def ask(self, group: Sequence[Request]) -> list[Reply]:
        (question,) = [request.messages[1].content for request in group]
        self.asked.append(question)
        if int(question.split()[1]) >= 1000:
            try:
                await self.held.wait()
            except asyncio.CancelledError:
                self.cancelled.append(question)
                raise
        return [Reply("[1, 0]", "stop", usage=Usage(3, 0, 5))]

    async def check(self) -> None:
        pass

    async def close(self) -> None:
        pass


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_in_flight_grows_to_the_limit_where_latency_holds(journal):
    class Slow(EchoBackend):
        async def ask(self, group: Sequence[Request]) -> list[Reply]:
            await asyncio.sleep(0.05)
            return await super().ask(group)

    backend = Slow(max_in_flight=64)
    held = [ask(f"question {1000 + i}") for i in range(200)]
    with JournaledLLM(backend, journal) as llm:
        stream = llm.answer([*questions(100), *held])
        came = [next(stream) for _ in range(100)]
        wait_until(lambda: len(backend.asked) == 100 + 64)
        stream.close()
        wait_until(lambda: len(backend.cancelled) == 64)
    assert len(came) == 100
    assert len(backend.asked) == 100 + 64


class SlowJournal(Journal):
    """Keeps calls as any journal does; says so a little later."""

    n_durable = 0

    def record(self, block, entry) -> Future[None]:
        later: Future[None] = Future()
        written = super().record(block, entry)

        def acknowledge() -> None:
            written.result()
            self.n_durable += 1
            later.set_result(None)

        threading.Timer(0.005, acknowledge).start()
        return later


def test_no_more_calls_than_the_limit_are_paid_and_not_yet_durable(tmp_path):
    class Watched(EchoBackend):
        n_lost_if_killed = 0

        async def ask(self, group: Sequence[Request]) -> list[Reply]:
            replies = await super().ask(group)
            n_lost = len(self.asked) - journal.n_durable
            self.n_lost_if_killed = max(self.n_lost_if_killed, n_lost)
            return replies

    backend = Watched(max_in_flight=4)
    with SlowJournal(UPath(tmp_path)) as journal, JournaledLLM(backend, journal) as llm:
        assert len(answers(llm, questions(60))) == 60
    assert backend.n_lost_if_killed == 4


def test_a_caller_that_stops_early_cancels_its_calls_and_keeps_what_was_answered(journal):
    backend = EchoBackend(max_in_flight=8)
    with JournaledLLM(backend, journal) as llm:
        stream = llm.answer([*questions(2), *(ask(f"question {1000 + i}") for i in range(4))])
        came = [next(stream), next(stream)]
        wait_until(lambda: len(backend.asked) == 6)
        stream.close()
        wait_until(lambda: len(backend.cancelled) == 4)
        assert len(answers(llm, questions(4))) == 4  # and others go on
    assert all(journal.lookup(BLOCK, completion.call_id) for _, completion in came)
    assert sorted(backend.asked) == sorted({*backend.asked})


def test_a_call_that_somebody_else_waits_for_is_not_cancelled(journal):
    server = FakeLLMServer(count_of, latency_s=lambda i: 0.2)
    with server, llm_at(server, journal) as llm:
        leaves = llm.answer([ask("question 4"), *questions(1)])
        stays: list[Completion] = []
        caller = threading.Thread(target=lambda: stays.extend(answers(llm, questions(1)).values()))
        first = threading.Thread(target=lambda: next(leaves))
        first.start()
        caller.start()
        first.join()
        leaves.close()
        caller.join()
        assert len(server.requests) == 2
    assert stays[0].text == "[1, 0]"


def llm_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "llm"]


def test_closing_ends_the_thread_even_if_the_backend_cannot_be_closed(journal):
    class Unclosable(EchoBackend):
        async def close(self) -> None:
            raise OSError("the connection is odd")

    llm = JournaledLLM(Unclosable(2), journal)
    answers(llm, questions(2))
    with pytest.raises(OSError, match="is odd"):
        llm.close()
    assert llm_threads() == []


def test_closing_does_not_wait_for_ever(caplog):
    async def hang() -> None:
        await asyncio.Event().wait()

    loop = LoopThread("llm", patience_s=0.05)
    loop.submit(hang())
    loop.close(hang())
    assert "llm: not closed within 0.05 s" in caplog.text
    assert llm_threads() == []


def test_a_closed_model_asks_nothing_but_the_journal_answers(journal):
    llm = JournaledLLM(EchoBackend(2), journal)
    answers(llm, questions(2))
    llm.close()
    assert reasons(answers(llm, questions(2))) == [None, None]
    with pytest.raises(LLMError, match="was closed"):
        answers(llm, questions(3))
    assert llm_threads() == []


def test_closing_ends_the_wait_of_other_threads_with_an_error(journal):
    backend = EchoBackend(max_in_flight=2)
    llm = JournaledLLM(backend, journal)
    errors: list[LLMError] = []

    def wait() -> None:
        with pytest.raises(LLMError, match="was closed") as caught:
            list(llm.answer([ask("question 1000")]))
        errors.append(caught.value)

    caller = threading.Thread(target=wait)
    caller.start()
    wait_until(lambda: bool(backend.asked))
    llm.close()
    caller.join()
    assert len(errors) == 1
    assert backend.cancelled == ["question 1000"]


def test_an_error_of_the_caller_who_makes_the_requests_reaches_the_caller(journal):
    def broken() -> Iterator[Request]:
        yield from questions(3)
        raise ValueError("no more windows")

    with (
        JournaledLLM(EchoBackend(2), journal) as llm,
        pytest.raises(ValueError, match="no more windows"),
    ):
        list(llm.answer(broken()))


def test_a_mistake_in_a_backend_ends_the_wait(journal):
    class Mistaken(EchoBackend):
        async def ask(self, group: Sequence[Request]) -> list[Reply]:
            raise TypeError("a mistake")

    with (
        JournaledLLM(Mistaken(2), journal) as llm,
        pytest.raises(TypeError, match="a mistake"),
    ):
        list(llm.answer(questions(5)))


def test_a_replay_sends_nothing_and_tells_of_each_call_that_is_missing(journal):
    backend = EchoBackend(max_in_flight=2)
    with JournaledLLM(backend, journal) as llm:
        answers(llm, questions(2))
    missing: list[tuple[str, str]] = []

    def note(request: Request, call_id: str) -> None:
        missing.append((request.messages[1].content, call_id))

    with JournaledLLM(backend, journal, mode="replay", on_missing=note) as llm:
        replayed = answers(llm, questions(4))
    assert reasons(replayed) == [None, None, "not_recorded", "not_recorded"]
    wanted = [(f"question {i}", ask(f"question {i}").call_id("echo")) for i in (2, 3)]
    assert missing == wanted
    assert len(backend.asked) == 2


def test_whatever_else_decides_an_answer_is_in_the_models_identity():
    url = "http://host/v1"
    asked = [{}, {"structured_outputs": False}, {"extra_body": {"a": 1}}, {"alias": "ours"}]
    assert len({OpenAIBackend(remote(url, **more)).identity for more in asked}) == len(asked)
    faster = OpenAIBackend(remote(url, max_in_flight=2, timeout_s=1))
    assert faster.identity == OpenAIBackend(remote(url)).identity


ASKS = """
import sys
sys.path.insert(0, sys.argv[1])
from llm_requests import questions, remote
from upath import UPath
from autointerp_dagster.adapters.llm.client import JournaledLLM
from autointerp_dagster.adapters.llm.journal.journal import Journal
from autointerp_dagster.adapters.llm.remote.backend import OpenAIBackend
journal = Journal(UPath(sys.argv[3]))
with JournaledLLM(OpenAIBackend(remote(sys.argv[2], max_in_flight=16)), journal) as llm:
    for _ in llm.answer(questions(10_000)):
        pass
"""


def test_a_killed_process_pays_twice_for_no_more_than_was_in_flight(tmp_path):
    here = str(Path(__file__).parent)
    with FakeLLMServer(count_of, latency_s=lambda i: 0.02) as server:
        for n_paid in (100, 300, 500):
            asking = [sys.executable, "-c", ASKS, here, server.base_url, str(tmp_path)]
            process = subprocess.Popen(asking)
            wait_until(lambda n_paid=n_paid: len(server.requests) >= n_paid)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        with Journal(UPath(tmp_path)) as journal, llm_at(server, journal) as llm:
            completed = answers(llm, questions(700))
        asked = [body["messages"][1]["content"] for body in server.requests]
    assert all(is_right(*item) for item in completed.items())
    assert len(completed) == 700
    assert len(asked) - len(set(asked)) <= 3 * 16
