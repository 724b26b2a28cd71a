import json
from datetime import UTC, datetime

import pytest
from llm_requests import ask, remote

from autointerp_dagster.adapters.llm.remote.body import body_of
from autointerp_dagster.adapters.llm.remote.errors import (
    RefusedError,
    declined,
    retry_after_s,
    to_drop,
)

CONFIG = remote("http://host/v1")
CORPUS = "The context length, the 'seed' and the \"schema\" of logprobs were flagged. café"
NOW = datetime(2025, 11, 2, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "1500", "retry-after": "7"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7.0),
        ({"retry-after": "Sun, 02 Nov 2025 12:00:09 GMT"}, 9.0),
        ({"retry-after": "Sun, 02 Nov 2025 12:00:09 -0000"}, 9.0),
        ({"retry-after": "Sun, 02 Nov 2025 11:00:00 GMT"}, 0.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "86400"}, 300.0),
        ({"retry-after": "inf"}, 300.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "tomorrow"}, None),
        ({}, None),
    ],
)
def test_a_servers_wish_to_wait_is_read_in_all_its_forms(headers, wait_s):
    assert retry_after_s(headers, NOW) == wait_s


def refused(status, body, config=CONFIG):
    return RefusedError(status, body, ask(CORPUS), config)


def echoes():
    """Complaints that repeat the request, as servers write them."""
    sent = body_of(ask(CORPUS), CONFIG)[1]
    problem = {"type": "missing", "loc": ["body", "x"], "msg": "Field required", "input": sent}
    python = str([problem | {"loc": ("body", "x")}])
    return {
        "FastAPI": {"detail": [problem]},
        "vLLM": {"object": "error", "message": python, "type": "Bad Request", "code": 400},
        "as text": json.dumps(sent),
        "in words": {"error": {"message": f"cannot answer: {CORPUS}"}},
        "within JSON": {"error": {"metadata": {"raw": json.dumps({"detail": [problem]})}}},
        "cut": {"message": f"1 error [type=missing, input_value={CORPUS[:40]}..., input_type=str]"},
        "no known field": {"input": sent},
    }


@pytest.mark.parametrize("name", echoes())
@pytest.mark.parametrize("status", [400, 403, 422])
def test_what_a_server_repeats_of_a_request_decides_nothing(name, status):
    refusal = refused(status, echoes()[name])
    assert declined(refusal) is None
    assert "flagged" not in refusal.words
    sent = body_of(ask(CORPUS, seed=1, top_logprobs=2), CONFIG)[1]
    taken = {"response_format", "seed", "logprobs"}
    if name not in ("as text", "no known field"):  # which repeat the body's own field names
        assert to_drop(refusal, sent, taken) == frozenset()


def test_a_models_name_decides_nothing():
    model = CONFIG.model_copy(update={"model": "bytedance/seed-36b"})
    refusal = refused(400, {"message": "bytedance/seed-36b is not available"}, model)
    sent = body_of(ask("q", seed=1), model)[1]
    assert to_drop(refusal, sent, {"response_format", "seed"}) == frozenset()


@pytest.mark.parametrize(
    ("body", "feature"),
    [
        ({"detail": [{"loc": ["body", "seed"], "msg": "not permitted", "input": 1}]}, "seed"),
        ({"error": {"message": "Unsupported parameter.", "param": "seed"}}, "seed"),
        ({"message": "[{'loc': ('body', 'seed'), 'msg': 'no', 'input': 1}]"}, "seed"),
        (
            {"error": {"message": "Provider error", "metadata": {"raw": '{"msg":"no seed"}'}}},
            "seed",
        ),
        ("logprobs are not supported", "logprobs"),
    ],
)
def test_a_feature_that_a_server_names_is_dropped_even_if_it_took_it_before(body, feature):
    sent = body_of(ask(CORPUS, seed=1, top_logprobs=2), CONFIG)[1]
    assert to_drop(refused(400, body), sent, {"response_format", "seed", "logprobs"}) == {feature}


@pytest.mark.parametrize(
    ("status", "message", "reason"),
    [
        (403, "Your chosen model requires moderation and your input was flagged", "refused"),
        (403, "flagged", "refused"),
        (403, "Input failed moderation", "refused"),
        (400, "Your prompt was flagged as potentially violating our usage policy.", "refused"),
        (403, "Your account was flagged. Contact support.", None),
        (403, "This API key may not use the moderation model", None),
        (403, "Forbidden", None),
        (400, "Unrecognized request argument: moderation", None),
        (401, "flagged", None),
        (403, "the context window is not yours", None),
    ],
)
def test_a_prompt_that_a_filter_flagged_is_an_answer_and_a_refused_key_is_none(
    status, message, reason
):
    reply = declined(refused(status, {"error": {"message": message, "code": status}}))
    assert (reply and reply.reason) == reason


@pytest.mark.parametrize("body", [None, [], {}, 7, "", "{", "[" * 100_000, [[[[[[[[[["x"]]]]]]]]]]])
def test_any_complaint_can_be_read(body):
    assert isinstance(refused(400, body).words, str)
