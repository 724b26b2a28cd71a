import asyncio
import json
import logging
import math
import socket
import threading
from dataclasses import replace

import openai
import pytest
from llm_requests import ask, remote
from odd_server import OddServer, Response, chat, complaint

from autointerp_dagster.adapters.llm.backend import CallError
from autointerp_dagster.adapters.llm.remote import transport as http_transport
from autointerp_dagster.adapters.llm.remote.backend import OpenAIBackend
from autointerp_dagster.core.errors import LLMError
from autointerp_dagster.core.llm import Choice, Continuation, FreeText, PromptScores, Usage

GOOD = chat("[1, 0]", usage={"prompt_tokens": 3, "completion_tokens": 5})
SECRET = "sk-canary-77"


class NotInstalled:
    """What the official client offers in the place of its aiohttp client without the extra."""

    def __init__(self, **settings) -> None:
        raise RuntimeError("To use the aiohttp client you must have installed the extra")


@pytest.fixture(params=["aiohttp", "httpx"])
def transport(request, monkeypatch) -> str:
    if request.param == "aiohttp":
        pytest.importorskip("aiohttp")
    else:
        monkeypatch.setattr(openai, "DefaultAioHttpClient", NotInstalled)
    return request.param


def ask_all(backend, requests, at_once=True):
    """Replies or exceptions, in order."""

    async def run():
        calls = [backend.ask([request]) for request in requests]
        if at_once:
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
        else:
            outcomes = [(await asyncio.gather(call, return_exceptions=True))[0] for call in calls]
        await backend.close()
        return [outcome if isinstance(outcome, Exception) else outcome[0] for outcome in outcomes]

    return asyncio.run(run())


def outcome_at(server, request=None, **changes):
    (outcome,) = ask_all(OpenAIBackend(remote(server.base_url, **changes)), [request or ask("q")])
    return outcome


def error_at(response, **changes) -> CallError:
    with OddServer(lambda path, body: response) as server:
        outcome = outcome_at(server, **changes)
        assert isinstance(outcome, CallError)
        assert server.base_url in str(outcome)
    return outcome


def test_both_transports_give_the_same_reply(transport):
    with OddServer(lambda path, body: GOOD) as server:
        reply = outcome_at(server)
        assert (reply.text, reply.usage.n_tokens) == ("[1, 0]", 8)
        assert server.seen[0][0] == "/chat/completions"


@pytest.mark.parametrize(
    "response",
    [
        Response(reset=True),
        Response("", n_missing=10),
        Response('{"choices": [', n_missing=100),
        Response('{"choices": [{"message": {"content": "[1'),
        Response("<html>Bad gateway</html>", headers={"Content-Type": "text/html"}),
        Response("<html>Bad gateway</html>", 502, {"Content-Type": "text/html"}),
        Response([1, 2]),
        Response("null"),
        Response({"choices": []}),
        Response({"choices": [{"message": {"content": [{"type": "text"}]}}]}),
        Response({"error": {"message": "upstream", "code": 502}}),
        Response({"choices": [{"text": "", "finish_reason": "error", "error": {"code": 502}}]}),
        Response({"choices": [{"text": "half of", "finish_reason": "abort"}]}),
        Response("[" * 200_000),
        Response(b"\xff\xfe\x00"),
        Response(b"not gzip", headers={"Content-Encoding": "gzip"}),
        complaint("slow down", 429, **{"Retry-After": "2"}),
        complaint("overloaded", 529),
        complaint("something broke", 500),
    ],
    ids=lambda response: str(response.status) + str(response.body)[:12],
)
def test_every_passing_failure_is_a_failed_call_that_may_be_asked_again(transport, response):
    error = error_at(response)
    assert error.retriable
    assert not error.endpoint


def test_a_failure_in_transport_is_named_by_its_cause_and_shows_no_key(transport, monkeypatch):
    monkeypatch.setenv("CANARY_KEY", SECRET)
    reset = error_at(Response(reset=True), api_key_env="CANARY_KEY")
    cut = error_at(Response('{"choices": [', n_missing=100), api_key_env="CANARY_KEY")
    names = {
        "aiohttp": ("ClientOSError|ServerDisconnectedError", "ClientPayloadError"),
        "httpx": ("ReadError|RemoteProtocolError", "RemoteProtocolError"),
    }[transport]
    for error, name in zip((reset, cut), names, strict=True):
        assert [word for word in name.split("|") if f"({word})" in str(error)]
        assert SECRET not in repr(error) + str(error)
        assert error.__cause__ is None


def test_half_a_character_does_not_spoil_an_answer():
    content = b'{"choices": [{"message": {"content": "caf\\ud83d"}, "finish_reason": "stop"}]}'
    with OddServer(lambda path, body: Response(content)) as server:
        assert outcome_at(server, replace(ask("q"), answer=FreeText())).text == "caf?"


def test_a_hanging_server_is_given_up_in_time_by_both_transports(transport):
    error = error_at(Response(GOOD.body, after_s=1.0), timeout_s=0.2)
    assert error.retriable
    assert error.timed_out
    assert error.usage is None
    assert "within 0.2 s" in str(error)


PAID = {"prompt_tokens": 100, "completion_tokens": 10}


@pytest.mark.parametrize(
    ("response", "usage"),
    [
        (complaint("slow down", 429), Usage()),
        (complaint("broken", 500), Usage()),
        (complaint("no such model", 404), Usage()),
        (Response({"error": {"code": 429, "message": "slow down"}}), Usage()),
        (Response({"error": {"code": 502, "message": "upstream"}}), None),
        (Response({"error": {"code": 502}, "usage": PAID}), Usage(100, 0, 10)),
        (Response({"choices": [{"message": 3}], "usage": PAID}), Usage(100, 0, 10)),
        (Response({"choices": [{"message": 3}]}), None),
        (Response('{"choices": [', n_missing=100), None),
        (Response("<html>"), None),
        (Response(reset=True), None),
    ],
    ids=lambda value: str(getattr(value, "body", value))[:30],
)
def test_a_failed_call_says_what_it_cost_as_far_as_that_can_be_known(response, usage):
    assert error_at(response).usage == usage


def test_nobody_listening_is_told_apart_from_a_broken_exchange(transport):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    (error,) = ask_all(OpenAIBackend(remote(url)), [ask("q")])
    assert isinstance(error, CallError)
    assert error.endpoint
    assert error.usage == Usage()
    assert "nothing answers (C" in str(error)


def test_a_body_without_end_is_not_read_to_its_end(transport, monkeypatch):
    monkeypatch.setattr(http_transport, "MAX_BODY_BYTES", 10_000)
    for status in (200, 500):
        error = error_at(Response(b"x" * 200_000, status))
        assert error.retriable
        assert "BodyTooLongError" in str(error)


def test_the_environments_proxy_is_used_by_both_transports(transport, monkeypatch):
    with OddServer(lambda path, body: GOOD) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.base_url.removesuffix("/v1"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        (reply,) = ask_all(OpenAIBackend(remote("http://nowhere.invalid/v1")), [ask("q")])
        assert reply.text == "[1, 0]"
        assert proxy.seen[0][0] == "http://nowhere.invalid/v1/chat/completions"
        with OddServer(
            lambda path, body: chat("[0, 1]")
        ) as server:  # loopback is no proxy's matter
            assert outcome_at(server).text == "[0, 1]"
        assert len(proxy.seen) == 1


def test_there_are_as_many_connections_as_requests_in_flight(transport):
    everybody = threading.Barrier(120, timeout=20)  # breaks unless 120 requests meet

    def answer(path, body):
        everybody.wait()
        return GOOD

    with OddServer(answer) as server:
        backend = OpenAIBackend(remote(server.base_url, max_in_flight=120))
        prose = [replace(ask(f"q{i}"), answer=FreeText()) for i in range(120)]
        assert {reply.text for reply in ask_all(backend, prose)} == {"[1, 0]"}


def test_what_a_status_means_for_the_flow_of_requests():
    busy = error_at(complaint("slow down", 429, **{"Retry-After-Ms": "2500"}))
    assert (busy.busy, busy.retry_after_s) == (True, 2.5)
    assert error_at(complaint("busy", 503)).busy
    assert not error_at(complaint("broken", 500)).busy
    assert error_at(complaint("late", 504)).timed_out
    assert error_at(Response({"error": {"code": 429, "message": "slow down"}})).busy
    assert error_at(Response({"choices": [{"text": "", "error": {"code": 503}}]})).busy
    wrong = error_at(complaint("no such model", 404, "model_not_found"))
    assert (wrong.retriable, wrong.endpoint) == (False, True)


@pytest.mark.parametrize(
    "response",
    [
        complaint("You exceeded your current quota", 429, "insufficient_quota"),
        complaint("Insufficient Balance", 402),
        Response({"error": {"code": 402, "message": "Insufficient credits"}}),
    ],
)
def test_an_account_without_credit_ends_the_run(response):
    with OddServer(lambda path, body: response) as server:
        error = outcome_at(server)
    assert isinstance(error, LLMError)
    assert "no credit left. Add some and run again" in str(error)


@pytest.mark.parametrize(
    "response",
    [
        complaint("This model's maximum context length is 10 tokens"),
        complaint("the request exceeds the available context size", 400),
        complaint("too many", 400, "context_length_exceeded"),
    ],
)
def test_a_prompt_that_does_not_fit_is_an_answer_not_a_failure(response):
    with OddServer(lambda path, body: response) as server:
        assert outcome_at(server).reason == "too_long"


def test_a_prompt_that_was_flagged_is_an_answer_not_the_end():
    flagged = complaint("Your chosen model requires moderation and your input was flagged", 403)
    with OddServer(lambda path, body: flagged) as server:
        assert outcome_at(server).reason == "refused"


def test_nothing_is_known_of_a_server_before_it_was_asked():
    assert OpenAIBackend(remote("http://host/v1")).capabilities is None


def test_what_a_server_does_well_is_recorded():
    logprobs = {"content": [{"token": "1", "logprob": -0.1, "top_logprobs": []}]}
    good = chat("[1, 0]", logprobs=logprobs)
    with OddServer(lambda path, body: good) as server:
        backend = OpenAIBackend(remote(server.base_url))
        ask_all(backend, [ask("q", top_logprobs=5, seed=1)])
    assert backend.capabilities == {
        "structured_outputs": True,
        "log_probabilities": True,
        "seed": True,
    }


def test_what_a_server_takes_and_ignores_is_recorded_and_warned_of_once(caplog):
    with OddServer(lambda path, body: chat("Sure! [1, 0]")) as server:
        backend = OpenAIBackend(remote(server.base_url))
        replies = ask_all(backend, [ask(f"q{i}", top_logprobs=5) for i in range(3)])
        assert {reply.text for reply in replies} == {"Sure! [1, 0]"}
        assert len(server.seen) == 3
    assert backend.capabilities == {"structured_outputs": False, "log_probabilities": False}
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 2


def test_one_good_answer_does_not_make_up_for_one_that_ignored_its_schema():
    replies = iter(["[1, 0]", "no", "[1, 0]"])
    with OddServer(lambda path, body: chat(next(replies))) as server:
        backend = OpenAIBackend(remote(server.base_url))
        ask_all(backend, [ask(f"q{i}") for i in range(3)], at_once=False)
    assert backend.capabilities == {"structured_outputs": False}


def refuses(*fields):
    """A server that knows no such fields, and says so without a word of which."""

    def answer(path, body):
        time_out = Response(GOOD.body, after_s=0.05)
        return complaint("Bad request") if set(fields) & body.keys() else time_out

    return answer


def test_of_many_first_requests_one_finds_out_and_the_others_wait():
    with OddServer(refuses("response_format", "logprobs")) as server:
        backend = OpenAIBackend(remote(server.base_url))
        replies = ask_all(backend, [ask(f"q{i}", top_logprobs=5) for i in range(40)])
        assert all(reply.text == "[1, 0]" for reply in replies)
        # Nothing was named: response_format is left away first, then log-probabilities.
        assert len(server.seen) == 40 + 2
    assert backend.capabilities == {"structured_outputs": False, "log_probabilities": False}


def test_a_first_request_that_hangs_does_not_hold_up_the_others(monkeypatch):
    hanging = iter([1.0])

    def answer(path, body):
        return Response(GOOD.body, after_s=next(hanging, 0.0))

    monkeypatch.setattr("autointerp_dagster.adapters.llm.remote.capabilities.TRIAL_WAIT_S", 0.05)
    with OddServer(answer) as server:
        backend = OpenAIBackend(remote(server.base_url, timeout_s=0.6))
        first, *others = ask_all(backend, [ask(f"q{i}") for i in range(5)])
    assert isinstance(first, CallError)
    assert {reply.text for reply in others} == {"[1, 0]"}


def test_a_feature_lost_later_is_learnt_then():
    answers = iter([GOOD, complaint("seed is not supported"), GOOD, GOOD])
    with OddServer(lambda path, body: next(answers)) as server:
        backend = OpenAIBackend(remote(server.base_url))
        ask_all(backend, [ask(f"q{i}", seed=1) for i in range(3)], at_once=False)
        assert ["seed" in body for _, body in server.seen] == [True, True, False, False]
    assert backend.capabilities == {"structured_outputs": True, "seed": False}


def test_a_refusal_without_a_reason_takes_away_nothing_that_was_taken_before():
    answers = iter([GOOD, complaint("Invalid request"), GOOD])
    with OddServer(lambda path, body: next(answers)) as server:
        backend = OpenAIBackend(remote(server.base_url))
        requests = [ask(f"q{i}", seed=1, top_logprobs=5) for i in range(3)]
        _, failed, _ = ask_all(backend, requests, at_once=False)
        used = [{"seed", "logprobs", "response_format"} & body.keys() for _, body in server.seen]
    assert isinstance(failed, CallError)
    assert not failed.retriable
    assert [len(features) for features in used] == [3, 3, 3]


def test_what_was_taken_in_a_list_may_still_be_refused_in_a_choice():
    def answer(path, body):
        schema = body.get("response_format", {}).get("json_schema", {}).get("name")
        return complaint("Invalid request") if schema == "choice" else GOOD

    choice = replace(ask("q"), answer=Choice(("yes", "no")))
    with OddServer(answer) as server:
        backend = OpenAIBackend(remote(server.base_url))
        replies = ask_all(backend, [ask("q"), choice], at_once=False)
    assert [reply.text for reply in replies] == ["[1, 0]"] * 2


@pytest.mark.parametrize("key", [f"{SECRET}\n", f"  {SECRET}"])
def test_blanks_around_a_key_do_no_harm(monkeypatch, key):
    monkeypatch.setenv("CANARY_KEY", key)
    with OddServer(lambda path, body: GOOD) as server:
        assert outcome_at(server, api_key_env="CANARY_KEY").text == "[1, 0]"
    error = error_at(complaint(f"{SECRET} is no key", 401), api_key_env="CANARY_KEY")
    assert "<key> is no key" in str(error)
    assert SECRET not in str(error)


@pytest.mark.parametrize("key", [f"{SECRET}\u2019", f"{SECRET}\nsecond line", f"{SECRET}\x07"])
def test_a_key_that_no_header_can_carry_is_named_by_its_variable(monkeypatch, key):
    monkeypatch.setenv("CANARY_KEY", key)
    with OddServer(lambda path, body: GOOD) as server:
        error = outcome_at(server, api_key_env="CANARY_KEY")
        assert server.seen == []
    assert isinstance(error, LLMError)
    assert "CANARY_KEY holds characters" in str(error)
    assert SECRET not in repr(error)


def test_a_model_that_reasons_gets_its_tokens_and_temperature_in_its_own_way():
    def answer(path, body):
        if "max_tokens" in body:
            return complaint("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'.")
        if "temperature" in body:
            return complaint("Unsupported value: 'temperature' does not support 0.0")
        return GOOD

    with OddServer(answer) as server:
        assert outcome_at(server).text == "[1, 0]"
        assert server.seen[-1][1]["max_completion_tokens"] == 64


def test_a_schema_in_the_form_of_llama_cpps_server_is_found_behind_its_500():
    def answer(path, body):
        if body["response_format"]["type"] == "json_schema":
            return complaint(
                "1 validation error: response_format: Input should be 'text' or 'json_object'", 500
            )
        return GOOD

    with OddServer(answer) as server:
        backend = OpenAIBackend(remote(server.base_url))
        assert [reply.text for reply in ask_all(backend, [ask("q"), ask("r")])] == ["[1, 0]"] * 2
        assert server.seen[-1][1]["response_format"]["schema"] == ask("q").answer.json_schema
        assert len(server.seen) == 3
    assert backend.capabilities == {"structured_outputs": True}


def test_a_choice_on_a_server_of_vllms_kind_without_response_format():
    def answer(path, body):
        if "response_format" in body or "guided_choice" in body:
            return complaint("extra fields not permitted: response_format, guided_choice")
        return chat(body["structured_outputs"]["choice"][1])

    request = replace(ask("q"), answer=Choice(("yes", "no")))
    with OddServer(answer) as server:
        backend = OpenAIBackend(remote(server.base_url))
        (reply,) = ask_all(backend, [request])
    assert request.answer.read(reply.text) == 1
    assert backend.capabilities == {"structured_outputs": True}


DAYS = "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, Monday, Tuesday, Wednesday"


def echo(path, body, shift=0):
    """A text endpoint whose model knows its text by heart; ``shift`` 1 is llama_cpp's mistake."""
    prompt = body["prompt"]
    texts = [prompt[i : i + 4] for i in range(0, len(prompt), 4)] + [" end"]
    guesses = [*texts[shift:], *["?"] * shift]
    tops = [{guess: -0.1, text: -0.2} for guess, text in zip(guesses, texts, strict=True)]
    logprobs = {
        "tokens": texts,
        "token_logprobs": [None, *(-float(i) for i in range(1, len(texts)))],
        "top_logprobs": [None, *tops[1:]],
    }
    choice = {"text": prompt + " end", "logprobs": logprobs, "finish_reason": "length"}
    return Response({"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 1}})


def scores(prompt, start=1, **parameters):
    return replace(ask("q", **parameters), messages=(), prompt=prompt, answer=PromptScores(start))


def test_prompt_scores_are_probed_once_and_then_read():
    with OddServer(echo) as server:
        backend = OpenAIBackend(remote(server.base_url))
        replies = ask_all(backend, [scores("abcdefghij", 5), scores("abcdefgh", 4)])
        assert [path for path, _ in server.seen] == ["/completions"] * 3
        assert server.seen[0][1]["prompt"] == DAYS
    assert [[(t.text, t.logprob, t.top) for t in reply.tokens] for reply in replies] == [
        [("efgh", -1.0, ()), ("ij", -2.0, ())],
        [("efgh", -1.0, ())],
    ]
    assert backend.capabilities == {"prompt_log_probabilities": True}


def test_scores_of_the_wrong_places_are_refused():
    with OddServer(lambda path, body: echo(path, body, shift=1)) as server:
        backend = OpenAIBackend(remote(server.base_url))
        errors = ask_all(backend, [scores("abcdefghij"), scores("abcdefghijkl")])
    for error in errors:
        assert isinstance(error, LLMError)
        assert "the place after it" in str(error)
    assert backend.capabilities == {"prompt_log_probabilities": False}


def test_a_text_whose_scores_are_seen_to_be_right_is_taken_from_such_a_server_all_the_same():
    def answer(path, body):
        return echo(path, body, shift=0 if body["prompt"].startswith("<s>") else 1)

    with OddServer(answer) as server:
        backend = OpenAIBackend(remote(server.base_url))
        right, wrong = ask_all(backend, [scores("<s>abcdefghij", 4), scores("abcdefghij")])
    assert [token.text for token in right.tokens] == ["bcde", "fghi", "j"]
    assert isinstance(wrong, LLMError)


@pytest.mark.parametrize(
    "response",
    [
        Response({"choices": [{"text": " end"}]}),
        complaint("echo is not supported"),
        complaint("Not Found", 404),
        complaint("Method Not Allowed", 405),
        complaint("logprobs is not supported for models created with logits_all=False", 500),
    ],
)
def test_a_server_without_prompt_scores_ends_the_run_with_what_to_do(response):
    with OddServer(lambda path, body: response) as server:
        backend = OpenAIBackend(remote(server.base_url))
        error, again = ask_all(backend, [scores("abcdefghij"), scores("abc")], at_once=False)
        assert server.base_url in str(error)
    assert {type(error), type(again)} == {LLMError}
    assert "Serve the model with vLLM" in str(error)
    assert backend.capabilities == {"prompt_log_probabilities": False}


def test_a_server_that_gave_prompt_scores_is_not_taken_to_lack_them_after_one_refusal():
    answers = iter([None, None, complaint("Invalid request")])  # the probe's is the first
    with OddServer(lambda path, body: next(answers, None) or echo(path, body)) as server:
        backend = OpenAIBackend(remote(server.base_url))
        good, failed, again = ask_all(backend, [scores("abcdefghij")] * 3, at_once=False)
    assert isinstance(failed, CallError)
    assert good.tokens == again.tokens


@pytest.mark.parametrize("response", [complaint("broken", 500), Response(reset=True)])
def test_a_passing_failure_says_nothing_about_prompt_scores(response):
    answers = iter([response])
    with OddServer(lambda path, body: next(answers, None) or echo(path, body)) as server:
        backend = OpenAIBackend(remote(server.base_url))
        failed, reply = ask_all(backend, [scores("abcdefghij")] * 2, at_once=False)
    assert isinstance(failed, CallError)
    assert len(reply.tokens) == 2
    assert backend.capabilities == {"prompt_log_probabilities": True}


def test_a_wrong_key_is_not_taken_for_a_lack_of_prompt_scores():
    with OddServer(lambda path, body: complaint("Incorrect API key", 401)) as server:
        error = outcome_at(server, scores("abcdefghij"))
    assert isinstance(error, CallError)
    assert error.endpoint


def test_a_key_that_a_call_was_refused_for_is_wrong_though_the_list_of_models_is_open():
    answers = iter([complaint("forbidden", 403), complaint("wrong key", 401), GOOD])

    async def run(backend):
        """What a check says before any call, and after each of three."""
        said = [await asyncio.gather(backend.check(), return_exceptions=True)]
        for _ in range(3):
            await asyncio.gather(backend.ask([ask("q")]), return_exceptions=True)
            said.append(await asyncio.gather(backend.check(), return_exceptions=True))
        await backend.close()
        return [type(outcome) for (outcome,) in said]

    with OddServer(lambda path, body: next(answers)) as server:
        outcomes = asyncio.run(run(OpenAIBackend(remote(server.base_url))))
    assert outcomes == [type(None), type(None), LLMError, type(None)]


def test_a_continuation_comes_back_without_its_stop():
    def answer(path, body):
        assert body["stop"] == ["\n"]
        return Response({"choices": [{"text": " a mat", "finish_reason": "stop"}]})

    request = replace(scores("The cat sat on"), answer=Continuation(("\n",)))
    with OddServer(answer) as server:
        reply = outcome_at(server, request)
        assert json.dumps(server.seen[0][1]).count("logprobs") == 0
    assert (reply.text, reply.tokens) == (" a mat", None)
    assert not math.isnan(reply.usage.n_tokens)
