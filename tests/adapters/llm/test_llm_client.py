import asyncio
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import pytest
from llm_requests import BLOCK, FAST, ask, count_of, questions, remote
from upath import UPath

from autointerp_dagster.adapters.llm.backend import Reply
from autointerp_dagster.adapters.llm.client import Backoff, JournaledLLM
from autointerp_dagster.adapters.llm.fake_server import FakeLLMServer
from autointerp_dagster.adapters.llm.journal import Journal
from autointerp_dagster.adapters.llm.openai_backend import OpenAIBackend
from autointerp_dagster.core.errors import LLMError, StoreError
from autointerp_dagster.core.llm import Completion, FreeText, Request, Usage


@pytest.fixture
def journal(tmp_path) -> Iterator[Journal]:
    with Journal(UPath(tmp_path / "store")) as journal:
        yield journal


def llm_at(server: FakeLLMServer, journal: Journal, limits=None, **changes) -> JournaledLLM:
    backend = OpenAIBackend(remote(server.base_url, **changes))
    return JournaledLLM(backend, journal, backoff=FAST, **(limits or {}))


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


def test_a_budget_in_tokens_stops_calling_but_the_journal_still_answers(journal):
    # Every call costs 3 prompt and 5 completion tokens: the third one passes 20.
    with FakeLLMServer(count_of) as server:
        limits = {"budget_tokens": 20}
        with llm_at(server, journal, limits, max_in_flight=1) as llm:
            first = answers(llm, questions(6))
            again = answers(llm, questions(6))
        assert len(server.requests) == 3
    assert reasons(first) == reasons(again) == [None] * 3 + ["budget"] * 3
    assert [c.text for c in first.values() if c.reason == "budget"] == [None] * 3


def test_a_budget_in_dollars_stops_calling(journal):
    # 3 prompt tokens at 1 $ and 5 completion tokens at 2 $ a million: 13e-6 $ a call.
    prices = {"usd_per_1m_prompt": 1.0, "usd_per_1m_completion": 2.0}
    with FakeLLMServer(count_of) as server:
        limits = {"budget_usd": 20e-6}
        with llm_at(server, journal, limits, max_in_flight=1, **prices) as llm:
            completed = answers(llm, questions(4))
            assert llm.usage.usd == pytest.approx(26e-6)
    assert reasons(completed) == [None, None, "budget", "budget"]


def test_nobody_listening_is_an_error_that_says_how_to_start_a_server(journal):
    with FakeLLMServer(count_of) as server:
        config = remote(server.base_url)
    with (
        JournaledLLM(OpenAIBackend(config), journal, backoff=FAST) as llm,
        pytest.raises(LLMError, match="vllm serve fake --port 8000") as caught,
    ):
        list(llm.answer(questions(100)))
    assert config.base_url in str(caught.value)


def test_a_server_that_goes_away_later_gives_rows_not_an_error(journal):
    with FakeLLMServer(count_of) as server:
        llm = llm_at(server, journal)
        answers(llm, questions(1))
    completed = answers(llm, [ask("question 1")])
    llm.close()
    assert [c.reason for c in completed.values()] == ["call_failed"]


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
    with pytest.raises(LLMError, match="api_key_env"):
        OpenAIBackend(remote("https://user:secret@host/v1"))


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


def test_waits_honour_what_the_server_asked_for_and_are_bounded():
    backoff = Backoff(first_s=1.0, longest_s=4.0)
    # 1, 2, 4 doubled, then cut at 4 seconds; Retry-After comes on top of the jitter.
    assert [backoff.wait_s(n, None, 1.0) for n in (1, 2, 3, 4)] == [1.0, 2.0, 4.0, 4.0]
    assert backoff.wait_s(1, 7.0, 0.0) == 7.0


class UnitBackend:
    """Asks a unit as a whole, like a local model; the last of each unit is out of format once."""

    identity = "units"
    max_in_flight = 1

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def groups(self, requests: Iterable[Request]) -> Iterator[list[Request]]:
        requests = list(requests)
        return iter([[r for r in requests if r.unit == u] for u in ("a", "b")])

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


def test_whatever_else_decides_an_answer_is_in_the_models_identity():
    url = "http://host/v1"
    asked = [{}, {"structured_outputs": False}, {"extra_body": {"a": 1}}, {"alias": "ours"}]
    assert len({OpenAIBackend(remote(url, **more)).identity for more in asked}) == len(asked)
    faster = OpenAIBackend(remote(url, max_in_flight=2, timeout_s=1))
    assert faster.identity == OpenAIBackend(remote(url)).identity
