from dataclasses import replace

import pytest
from llm_requests import ask, remote

from autointerp_dagster.adapters.llm.remote.body import body_of, features_in
from autointerp_dagster.core.llm import Choice, Continuation, FreeText, PromptScores

CONFIG = remote("http://host/v1")
YES_NO = Choice(("yes", "no"))


def plain(answer, prompt="Once upon", **parameters):
    return replace(ask("q", **parameters), messages=(), prompt=prompt, answer=answer)


def test_a_chat_goes_to_the_chat_endpoint_with_its_own_parameters():
    path, body = body_of(ask("q", top_logprobs=5, seed=3, max_tokens=7, temperature=0.5), CONFIG)
    assert path == "/chat/completions"
    assert body["messages"] == [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "q"},
    ]
    wanted = {"model": "fake", "temperature": 0.5, "max_tokens": 7, "seed": 3}
    assert wanted.items() <= body.items()
    assert (body["logprobs"], body["top_logprobs"]) == (True, 5)
    assert body["response_format"]["json_schema"]["schema"] == ask("q").answer.json_schema


def test_prose_is_not_bound_and_nothing_is_sent_that_was_not_asked_for():
    _, body = body_of(replace(ask("q"), answer=FreeText()), CONFIG)
    assert body.keys() == {"model", "temperature", "max_tokens", "messages"}


def test_a_continuation_goes_to_the_text_endpoint_with_its_stops():
    path, body = body_of(plain(Continuation(("\n", "."))), CONFIG)
    assert path == "/completions"
    assert (body["prompt"], body["stop"]) == ("Once upon", ["\n", "."])
    assert "messages" not in body
    assert "echo" not in body


def test_prompt_scores_are_asked_for_by_an_echo_with_log_probabilities_and_one_token():
    path, body = body_of(plain(PromptScores(3)), CONFIG, {"logprobs", "seed"})
    assert path == "/completions"
    assert (body["echo"], body["logprobs"], body["max_tokens"]) == (True, 1, 1)


@pytest.mark.parametrize("answer", [Continuation(), PromptScores(1)])
def test_a_plain_texts_answer_without_a_plain_text_is_an_error(answer):
    with pytest.raises(ValueError, match="got none, wanted a plain text"):
        body_of(replace(ask("q"), answer=answer), CONFIG)


def test_a_choice_is_bound_in_whatever_way_the_server_has():
    request = replace(ask("q"), answer=YES_NO)
    lacks: list = []
    bodies = []
    for feature in ("response_format", "json_object", "structured_outputs", "guided_choice"):
        _, body = body_of(request, CONFIG, lacks)
        assert feature in features_in(body)
        bodies.append(body)
        lacks.append(feature)
    enum = {"type": "string", "enum": ["yes", "no"]}
    assert bodies[0]["response_format"]["json_schema"]["schema"] == enum
    assert bodies[1]["response_format"] == {"type": "json_object", "schema": enum}
    assert bodies[2]["structured_outputs"] == {"choice": ["yes", "no"]}
    assert bodies[3]["guided_choice"] == ["yes", "no"]
    _, unbound = body_of(request, CONFIG, lacks)
    assert features_in(unbound) == ["max_tokens", "temperature"]


def test_what_a_server_lacks_is_left_out_and_max_tokens_put_in_another_way():
    request = ask("q", top_logprobs=5, seed=3)
    lacks = {"response_format", "json_object", "seed", "logprobs", "temperature", "max_tokens"}
    _, body = body_of(request, CONFIG, lacks)
    assert body.keys() == {"model", "messages", "max_completion_tokens"}


def test_structured_outputs_can_be_switched_off_for_a_study():
    config = remote("http://host/v1", structured_outputs=False)
    assert "response_format" not in body_of(ask("q"), config)[1]


def test_extra_fields_win_and_those_of_chats_do_not_go_to_the_text_endpoint():
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "top_k": 1, "temperature": 0.1}
    config = remote("http://host/v1", extra_body=extra)
    assert extra.items() <= body_of(ask("q"), config)[1].items()
    text_body = body_of(plain(Continuation()), config)[1]
    assert (text_body["top_k"], text_body["temperature"]) == (1, 0.1)
    assert "chat_template_kwargs" not in text_body
