import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from llm_requests import count_of

from autointerp_dagster.adapters.llm.fake.faults import SeededFaults, read_rates
from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer, Fault

KEY = "sk-canary"


def chat(question: str = "question 0", **fields: object) -> dict[str, object]:
    turns = [{"role": "user", "content": question}]
    return {"model": "fake", "messages": turns, "max_tokens": 16, **fields}


def post(server: FakeLLMServer, body: dict, path: str = "/chat/completions") -> requests.Response:
    headers = {"Authorization": f"Bearer {KEY}"}
    return requests.post(server.base_url + path, json=body, headers=headers, timeout=5)


def text_of(response: requests.Response) -> str:
    return response.json()["choices"][0]["message"]["content"]


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    assert holds()


@pytest.fixture
def server() -> Iterator[FakeLLMServer]:
    with FakeLLMServer(count_of) as server:
        yield server


def test_any_get_is_answered_and_an_unknown_post_is_not(server):
    assert requests.get(server.base_url + "/models").json()["data"][0]["id"] == "fake"
    assert requests.get(server.base_url.removesuffix("/v1") + "/health").status_code == 200
    assert post(server, chat(), "/embeddings").status_code == 404


def test_requests_are_kept_and_counted_by_what_they_are(server):
    for question in ("question 0", "question 1", "question 0"):
        post(server, chat(question))
    assert [b["messages"][0]["content"] for b in server.requests] == [
        "question 0", "question 1", "question 0",
    ]  # fmt: skip
    assert sorted(server.n_sent.values()) == [1, 2]
    assert (server.n_open, server.max_open) == (0, 1)


def test_requests_wait_side_by_side():
    n = 40
    with FakeLLMServer(count_of, latency_s=lambda i: 0.2) as server:
        with ThreadPoolExecutor(n) as pool:
            list(pool.map(lambda i: post(server, chat(f"question {i}")), range(n)))
        assert server.max_open > 10


@pytest.mark.parametrize(
    ("fault", "status", "starts"),
    [
        ("403", 403, '{"error"'), ("429", 429, '{"error"'), ("500", 500, '{"error"'),
        ("503", 503, '{"error"'), ("error_object", 200, '{"error"'), ("html", 200, "<html>"),
        ("html_502", 502, "<html>"), ("malformed", 200, '{"choices"'),
    ],
)  # fmt: skip
def test_a_broken_response_has_its_status_and_body(fault: Fault, status: int, starts: str):
    with FakeLLMServer(count_of, faults=lambda i: fault) as server:
        response = post(server, chat())
    assert response.status_code == status
    assert response.text.startswith(starts)
    assert ("Retry-After" in response.headers) == (fault == "429")
    assert (KEY in response.text) == response.text.startswith('{"error"')


@pytest.mark.parametrize(("fault", "said"), [("short", "[1]"), ("prose", "I would say")])
def test_an_answer_can_be_in_a_wrong_format(fault: Fault, said: str):
    with FakeLLMServer(count_of, faults=lambda i: fault) as server:
        assert text_of(post(server, chat())).startswith(said)


def test_a_refusal_has_no_text():
    with FakeLLMServer(count_of, faults=lambda i: "refusal") as server:
        message = post(server, chat()).json()["choices"][0]["message"]
    assert (message["content"], bool(message["refusal"])) == (None, True)


@pytest.mark.parametrize(
    ("fault", "error"),
    [("reset", requests.ConnectionError), ("truncated", requests.exceptions.ChunkedEncodingError)],
)
def test_a_connection_can_break(fault: Fault, error: type[Exception]):
    with FakeLLMServer(count_of, faults=lambda i: fault) as server, pytest.raises(error):
        post(server, chat())


def test_a_request_can_hang_and_ends_with_the_server():
    with FakeLLMServer(count_of, faults=lambda i: "hang") as server:
        with pytest.raises(requests.ReadTimeout):
            requests.post(server.base_url + "/chat/completions", json=chat(), timeout=0.2)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(post, server, chat())
            wait_for(lambda: len(server.requests) == 2)
            server.__exit__()
            assert isinstance(future.exception(), requests.ConnectionError)


def test_seeded_faults_come_at_their_rate_and_pass_when_the_request_is_repeated():
    seeded = SeededFaults({"500": 0.2, "429": 0.1}, seed=3)
    bodies = [chat(f"question {i}") for i in range(300)]
    with FakeLLMServer(count_of, seeded=seeded) as server, requests.Session() as client:

        def statuses() -> list[int]:
            url = server.base_url + "/chat/completions"
            return [client.post(url, json=body).status_code for body in bodies]

        first, second = statuses(), statuses()
    assert 30 <= first.count(500) <= 90
    assert 12 <= first.count(429) <= 55
    again = [then for now, then in zip(first, second, strict=True) if now != 200]
    assert again.count(200) > 0.5 * len(again)
    with FakeLLMServer(count_of, seeded=seeded) as server, requests.Session() as client:
        assert statuses() == first


def test_a_chosen_request_can_fail_for_good():
    unlucky = SeededFaults(permanent=lambda body: "500" if "seed" in body else None)
    with FakeLLMServer(count_of, seeded=unlucky) as server:
        assert {post(server, chat(seed=1)).status_code for _ in range(5)} == {500}
        assert post(server, chat()).status_code == 200
        assert server.n_faults == {"500": 5}


def test_rates_are_read_from_a_command_line_and_unknown_kinds_are_named():
    assert read_rates("429:0.05,reset:0.01") == {"429": 0.05, "reset": 0.01}
    assert read_rates("") == {}
    with pytest.raises(ValueError, match="'rest'"):
        read_rates("rest:0.1")
    with pytest.raises(ValueError, match="more than 1"):
        SeededFaults({"500": 0.7, "429": 0.7})


def test_fields_are_rejected_or_have_no_effect():
    with FakeLLMServer(count_of, rejects=("seed",), ignores=("logprobs",)) as server:
        refused = post(server, chat(seed=1))
        answered = post(server, chat(logprobs=True, top_logprobs=5))
    assert refused.status_code == 400
    assert "seed" in refused.json()["error"]["message"]
    assert "logprobs" not in answered.json()["choices"][0]


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"json_schema": {"schema": {"enum": ["yes", "no"]}}}},
        {"guided_choice": ["yes", "no"]},
        {"structured_outputs": {"choice": ["yes", "no"]}},
    ],
)
def test_an_allowed_option_is_said_whatever_the_answer_is(fields):
    with FakeLLMServer(lambda messages: messages[0]["content"]) as server:
        assert text_of(post(server, chat("no", **fields))).strip('"') == "no"
        assert text_of(post(server, chat("perhaps", **fields))).strip('"') in ("yes", "no")


def test_usage_counts_words_and_the_blocks_that_a_prefix_cache_had():
    shared = "question 0 " + " ".join(f"word{i}" for i in range(38))
    with FakeLLMServer(count_of, caches_prefixes=True) as server:
        usages = [post(server, chat(f"{shared} {end}")).json()["usage"] for end in ("a", "b c")]
    assert [usage["prompt_tokens"] for usage in usages] == [41, 42]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached == [0, 32]  # whole blocks of 16
    with FakeLLMServer(count_of, has_usage=False) as server:
        assert "usage" not in post(server, chat()).json()


def test_a_prompt_is_continued():
    with FakeLLMServer(count_of, continuation=lambda prompt: f" after{prompt}") as server:
        body = {"model": "fake", "prompt": " a b", "max_tokens": 2}
        choice = post(server, body, "/completions").json()["choices"][0]
    assert choice["text"] == " after a"
    assert "logprobs" not in choice


def test_an_echoed_prompt_has_log_probabilities_that_depend_on_what_comes_before(server):
    def logprobs(prompt: str) -> dict[str, list]:
        body = {"model": "fake", "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 0}
        return post(server, body, "/completions").json()["choices"][0]["logprobs"]

    long, short, other = (logprobs(text) for text in ("one two  three", "one two", "uno two"))
    assert long["tokens"] == ["one", " two", "  three"]
    assert long["text_offset"] == [0, 3, 7]
    assert long["token_logprobs"][0] is None
    assert all(-12 <= value <= 0 for value in long["token_logprobs"][1:])
    assert long["token_logprobs"][:2] == short["token_logprobs"] != other["token_logprobs"]


def test_the_module_serves_until_it_is_terminated_and_writes_a_log(tmp_path):
    log = tmp_path / "log.jsonl"
    command = [sys.executable, "-m", "autointerp_dagster.adapters.llm.fake.server", "--port", "0"]
    command += ["--latency-ms", "1", "--faults", "500:1.0", "--log", str(log)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        base_url = process.stderr.readline().split()[-1]
        assert requests.post(base_url + "/chat/completions", json=chat()).status_code == 500
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    (line,) = map(json.loads, log.read_text().splitlines())
    assert (line["number"], line["fault"], line["n_open"]) == (0, "500", 1)
