import math
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llm_requests import ask, remote

from autointerp_dagster.adapters.llm.backend import CallError
from autointerp_dagster.adapters.llm.remote.errors import RefusedError
from autointerp_dagster.adapters.llm.remote.reply import follows_schema, reply_of
from autointerp_dagster.core.errors import LLMError
from autointerp_dagster.core.llm import Choice, Continuation, PromptScores, Token, Usage

CONFIG = remote("http://host/v1")
COUNTS = {"prompt_tokens": 100, "completion_tokens": 10}
PRICES = {"usd_per_1m_prompt": 2.0, "usd_per_1m_cached": 0.5, "usd_per_1m_completion": 8.0}


def said(text, *, usage=COUNTS, finish_reason="stop", **choice):
    message = {"role": "assistant", "content": text}
    return {
        "choices": [{"message": message, "finish_reason": finish_reason, **choice}],
        "usage": usage,
    }


def scored(*tokens, usage=COUNTS):
    texts, scores = [text for text, _ in tokens], [score for _, score in tokens]
    logprobs = {"tokens": texts, "token_logprobs": scores, "top_logprobs": None}
    return {"choices": [{"text": "".join(texts), "logprobs": logprobs}], "usage": usage}


def plain(answer, prompt):
    return replace(ask("q"), messages=(), prompt=prompt, answer=answer)


@pytest.mark.parametrize(
    "cached",
    [{"prompt_tokens_details": {"cached_tokens": 60}}, {"prompt_cache_hit_tokens": 60}],
    ids=["OpenAI, vLLM, SGLang", "DeepSeek"],
)
def test_cached_prompt_tokens_are_read_and_have_their_own_price(cached):
    reply = reply_of(said("[1, 0]", usage=COUNTS | cached), ask("q"), remote("http://h", **PRICES))
    # 40 fresh at 2 $, 60 cached at 0.5 $, 10 written at 8 $ a million.
    assert replace(reply.usage, usd=0.0) == Usage(100, 60, 10)
    assert reply.usage.usd == pytest.approx(190e-6)


@pytest.mark.parametrize("details", [None, {}, {"cached_tokens": None}])
def test_a_server_that_tells_nothing_of_its_cache_had_nothing_cached(details):
    usage = COUNTS | {"prompt_tokens_details": details}
    assert reply_of(said("[1, 0]", usage=usage), ask("q"), CONFIG).usage == Usage(100, 0, 10)


@pytest.mark.parametrize("usage", [None, {}, {"total_tokens": 0, "prompt_tokens": 0}])
def test_without_usage_tokens_are_estimated_and_marked_as_such(usage):
    config = remote("http://h", **PRICES)
    reply = reply_of(said("[1, 0]", usage=usage), ask("question"), config)
    # "Count." has 6 bytes: 2 tokens, "question" 8: 3 tokens, 4 around each; "[1, 0]" 6: 2 tokens.
    assert replace(reply.usage, usd=0.0) == Usage(13, 0, 2, 0.0, 15)
    assert reply.usage.usd == pytest.approx(42e-6)


def test_a_plain_prompt_is_estimated_without_a_chats_frame():
    request = plain(Continuation(), "seven b")
    body = {"choices": [{"text": " and", "finish_reason": "length"}]}
    assert reply_of(body, request, CONFIG).usage == Usage(2, 0, 2, 0.0, 4)


def test_openrouters_own_account_of_the_cost_is_taken_where_the_study_has_no_price():
    body = said("[1, 0]", usage=COUNTS | {"cost": 0.25})
    router = "https://openrouter.ai/api/v1"
    assert reply_of(body, ask("q"), remote(router)).usage.usd == 0.25
    assert reply_of(body, ask("q"), remote(router, **PRICES)).usage.usd == pytest.approx(280e-6)
    assert reply_of(body, ask("q"), CONFIG).usage.usd == 0.0  # another server's unit is unknown


def test_a_choice_that_comes_as_a_json_string_is_the_option():
    request = replace(ask("q"), answer=Choice(("café", "bar")))
    for text in ('"caf\\u00e9"', '"café"', "café"):
        reply = reply_of(said(text), request, CONFIG)
        assert (reply.text, request.answer.read(reply.text)) == ("café", 0)


def test_a_continuation_is_read_with_its_log_probabilities():
    logprobs = {
        "tokens": [" a", " b"],
        "token_logprobs": [-0.5, -1.5],
        "top_logprobs": [{" x": -2.0, " a": -0.5}, {" b": -1.5}],
        "text_offset": [9, 11],
    }
    choice = {"text": " a b", "finish_reason": "length", "logprobs": logprobs}
    reply = reply_of({"choices": [choice], "usage": COUNTS}, plain(Continuation(), "p"), CONFIG)
    assert reply.tokens == (
        Token(" a", -0.5, ((" a", -0.5), (" x", -2.0))),
        Token(" b", -1.5, ((" b", -1.5),)),
    )
    assert (reply.text, reply.finish_reason) == (" a b", "length")


def test_prompt_scores_are_the_prompts_tokens_after_the_start_and_no_text():
    body = scored(("The", None), (" cat", -3.0), (" sat", -2.0), (" on", -0.1))
    reply = reply_of(body, plain(PromptScores(3), "The cat sat"), CONFIG)
    assert (reply.text, reply.finish_reason, reply.reason) == ("", "stop", None)
    assert reply.tokens == (Token(" cat", -3.0), Token(" sat", -2.0))


@pytest.mark.parametrize(
    "choice",
    [
        {"text": "The cat sat on"},
        {"text": " on", "logprobs": None},
        {"text": " on", "logprobs": {"tokens": [" on"], "token_logprobs": [-0.1]}},
        {"text": " on", "logprobs": {"tokens": ["The", " cat"], "token_logprobs": [None, None]}},
        {"text": " on", "logprobs": {"content": [{"token": " on", "logprob": -0.1}]}},
    ],
)
def test_a_server_without_prompt_scores_is_named_and_what_to_do_is_said(choice):
    with pytest.raises(LLMError, match=r"http://host/v1: .* Serve the model with vLLM"):
        reply_of({"choices": [choice]}, plain(PromptScores(3), "The cat"), CONFIG)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ({"code": 429, "message": "rate limited"}, 429),
        ({"code": "402", "message": "no credit"}, 402),
        ({"code": "rate_limit_exceeded"}, 429),
        ({"code": None, "type": "overloaded_error"}, 529),
        ({"code": 200}, 500),
        ({"code": ["odd"]}, 500),
        ("something broke", 500),
    ],
)
def test_an_error_in_the_clothes_of_a_success_is_a_refusal_with_its_status(error, status):
    for body in ({"error": error}, {"choices": [{"text": "", "error": error}]}):
        with pytest.raises(RefusedError) as caught:
            reply_of(body, ask("q"), CONFIG)
        assert caught.value.status == status
        # A server that is at fault may have written, and billed, half an answer before.
        assert caught.value.usage == (Usage() if status < 500 else None)


def test_what_a_broken_off_answer_cost_is_told_where_the_server_told_it():
    for reason in ("error", "abort"):
        with pytest.raises(CallError, match=rf"broke the answer off \({reason}\)") as caught:
            reply_of(said("half of", finish_reason=reason), ask("q"), CONFIG)
        assert (caught.value.retriable, caught.value.usage) == (True, Usage(100, 0, 10))
    error = {"error": {"code": 502}, "usage": COUNTS}
    with pytest.raises(RefusedError) as refused:
        reply_of(error, ask("q"), CONFIG)
    assert refused.value.usage == Usage(100, 0, 10)


@pytest.mark.parametrize("usage", [None, [], {"prompt_tokens": "many"}, {"prompt_tokens": 1e999}])
def test_what_an_unreadable_answer_cost_is_unknown_unless_the_server_told_it(usage):
    for body, cost in (({"usage": usage}, None), ({"usage": COUNTS}, Usage(100, 0, 10))):
        with pytest.raises(CallError, match="not a completion") as caught:
            reply_of(body | {"choices": [{"message": 3}]}, ask("q"), CONFIG)
        assert (caught.value.retriable, caught.value.usage) == (True, cost)


@pytest.mark.parametrize("count", [-1, 2**53, 10**40, 1e30, math.inf, math.nan, "7", [7], {}])
def test_a_count_that_cannot_be_meant_is_none_and_spoils_no_answer(count):
    usage = {name: count for name in ("prompt_tokens", "completion_tokens", "cost")}
    usage |= {"prompt_tokens_details": {"cached_tokens": count}}
    config = remote("https://openrouter.ai/api/v1")
    reply = reply_of(said("[1, 0]", usage=usage), ask("question"), config)
    assert (reply.text, reply.usage) == ("[1, 0]", Usage(13, 0, 2, 0.0, 15))


@pytest.mark.parametrize(
    ("finish_reason", "kept"),
    [(None, "stop"), (7, "7"), ("\ud83d", "?"), ("x" * 10_000, "x" * 64), (["stop"], "['stop']")],
)
def test_a_finish_reason_is_a_short_text_whatever_a_server_sends(finish_reason, kept):
    assert reply_of(said("a", finish_reason=finish_reason), ask("q"), CONFIG).finish_reason == kept


def test_half_a_character_in_a_candidate_can_be_stored():
    tops = {"logprob": -1.0, "token": "caf\ud83d"}
    chat = {"content": [{"token": "caf\ud83d", "logprob": -1.0, "top_logprobs": [tops]}]}
    plain_text = {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"caf\ud83d": -1.0}]}
    for logprobs in (chat, plain_text):
        reply = reply_of(said("a", logprobs=logprobs), ask("q"), CONFIG)
        assert reply.tokens[0].top == (("caf?", -1.0),)
    request = replace(plain(PromptScores(1), "The cat"), top_logprobs=1)
    body = scored(("The", None), (" cat", -3.0))
    body["choices"][0]["logprobs"]["top_logprobs"] = [None, {"caf\ud83d": -1.0}]
    assert reply_of(body, request, CONFIG).tokens[0].top == (("caf?", -1.0),)


@given(
    body=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["choices", "message", "content", "text", "usage", "logprobs",
                                 "error", "code", "prompt_tokens", "finish_reason"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=15,
    )
)  # fmt: skip
def test_any_body_is_a_reply_or_one_of_the_known_failures(body):
    with suppress(CallError, RefusedError):
        reply = reply_of(body, ask("q"), CONFIG)
        assert isinstance(reply.finish_reason, str)


@pytest.mark.parametrize(
    ("text", "finish_reason", "verdict"),
    [
        ("[1, 0]", "stop", True),
        ("[1,0]\n", "stop", True),
        ("[1, 0, 1]", "stop", False),
        ("[1, 2]", "stop", False),
        ("[true, false]", "stop", False),
        ("The labels are [1, 0]", "stop", False),
        ("The labels are [1", "length", False),
        ("[1, ", "length", None),
        ("", "stop", None),
    ],
)
def test_whether_a_list_kept_to_its_schema(text, finish_reason, verdict):
    reply = reply_of(said(text, finish_reason=finish_reason), ask("q"), CONFIG)
    assert follows_schema(reply, ask("q")) is verdict


@pytest.mark.parametrize(
    ("text", "finish_reason", "verdict"),
    [
        ('"yes"', "stop", True),
        ("Yes.", "stop", False),
        ('"y', "length", None),
        ("I", "length", False),
    ],
)
def test_whether_a_choice_kept_to_its_schema(text, finish_reason, verdict):
    request = replace(ask("q"), answer=Choice(("yes", "no")))
    reply = reply_of(said(text, finish_reason=finish_reason), request, CONFIG)
    assert follows_schema(reply, request) is verdict
