from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llm_requests import BLOCK, ask, remote
from local_models import local, save_model
from transformers import AutoModelForCausalLM

from autointerp_dagster.adapters.llm.backend import Reply
from autointerp_dagster.adapters.llm.local.backend import LocalBackend
from autointerp_dagster.adapters.llm.local.model import load_model
from autointerp_dagster.adapters.llm.local.prompts import integer_form
from autointerp_dagster.adapters.llm.remote.body import body_of
from autointerp_dagster.adapters.llm.remote.reply import follows_schema
from autointerp_dagster.core.llm import IntegerList, LabelList, Message, Request

SHOTS = (Message("system", "Count."), Message("user", "a b"), Message("assistant", "[0, 10]"))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("chat_model"))


@pytest.fixture
def backend(model_dir) -> LocalBackend:
    load_model(model_dir, "float32", "cpu").prefixes.clear()
    return LocalBackend(model_dir, local(model_dir))


def count(name: str, n: int, **parameters) -> Request:
    return Request(
        messages=(*SHOTS, Message("user", name)),
        answer=IntegerList(n, 0, 12),
        unit="unit",
        block=BLOCK,
        n_shared=len(SHOTS),
        **parameters,
    )


def naive_list(model_dir: Path, request: Request) -> str:
    """Greedy, one plain forward over the whole text for every token."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = load_model(model_dir, "float32", "cpu").tokenizer
    turns = [{"role": m.role, "content": m.content} for m in request.messages]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    numbers: list[str] = []
    while len(numbers) < request.answer.n:
        said = "[" + "".join(f"{number}, " for number in numbers)
        digits = "0123456789"
        number = ""
        while digits:
            ids = tokenizer(text + said + number, add_special_tokens=False, return_tensors="pt")
            with torch.no_grad():
                after = model(ids["input_ids"]).logits[0, -1]
            options = [*digits, ","] if number else [*digits]
            best = max(options, key=lambda c: after[tokenizer.convert_tokens_to_ids(c)])
            if best == ",":
                break
            number += best
            digits = "012" if number == "1" else ""
        numbers.append(number)
    return "[" + ", ".join(numbers) + "]"


def test_a_guided_list_is_that_of_a_plain_forward_pass_and_has_the_format(backend, model_dir):
    requests = [count(f"text {i}" * (1 + i % 3), 1 + 2 * i) for i in range(5)]
    for request, reply in zip(requests, backend.run_unit(requests), strict=True):
        assert request.answer.fault(reply.text) is None
        assert reply.text == naive_list(model_dir, request)
        assert reply.finish_reason == "stop"
        assert reply.usage.completion_tokens >= request.answer.n


def test_company_changes_no_list_and_samples_differ(backend):
    requests = [count(f"text {i}", 6, temperature=1.0, sample=i) for i in range(6)]
    requests.append(replace(requests[0], answer=LabelList(3)))
    together = [reply.text for reply in backend.run_unit(requests)]
    assert together == [backend.run_unit([request])[0].text for request in requests]
    assert len(set(together)) >= 5


def test_numbers_of_several_tokens_are_options_of_their_own(model_dir):
    tokenizer = load_model(model_dir, "float32", "cpu").tokenizer
    form = integer_form(tokenizer, 0, 12)
    assert tokenizer.decode(form.opening) == "["
    assert tokenizer.decode(form.separator) == ", "
    assert sorted(form.first.values()) == list(range(13))
    assert {tokenizer.decode(ids): n for ids, n in form.later.items()}["12"] == 12
    assert tokenizer.decode(integer_form(tokenizer, 3, 3).opening) == "["


def test_a_list_is_bound_by_its_schema():
    request = replace(ask("q"), answer=IntegerList(3, 0, 10))
    _, body = body_of(request, remote("http://host/v1"))
    schema = body["response_format"]["json_schema"]
    assert (schema["name"], schema["schema"]) == ("integers", request.answer.json_schema)


@pytest.mark.parametrize(
    ("text", "finish_reason", "verdict"),
    [
        ("[1, 10, 0]", "stop", True),
        ("[1, 10]", "stop", False),
        ("[1, 11, 0]", "stop", False),
        ("[1, 2.0, 0]", "stop", False),
        ("Here: [1, 10, 0]", "stop", False),
        ("[1, 1", "length", None),
    ],
)
def test_whether_a_list_kept_to_its_schema(text, finish_reason, verdict):
    request = replace(ask("q"), answer=IntegerList(3, 0, 10))
    assert follows_schema(Reply(text=text, finish_reason=finish_reason), request) is verdict
