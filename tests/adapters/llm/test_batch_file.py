"""What is written into batch files, and that every answer finds its question again."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llm_requests import BLOCK
from upath import UPath

from autointerp_dagster.adapters.llm.batch.answers import import_answers
from autointerp_dagster.adapters.llm.batch.files import (
    Batch,
    BatchWriter,
    Question,
    numbered_paths,
    split_custom_id,
)
from autointerp_dagster.adapters.llm.factory import open_journal
from autointerp_dagster.core.config.models import RemoteLLMConfig
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.llm import (
    Choice,
    Continuation,
    FreeText,
    LabelList,
    Message,
    PromptScores,
    Request,
)

CONFIG = RemoteLLMConfig(
    base_url="http://127.0.0.1:1/v1", model="m", usd_per_1m_prompt=2.0, usd_per_1m_completion=4.0
)
CHAT = (Message("system", "Judge."), Message("user", "1. Straße\u2028\n2. ok"))
REQUESTS = [
    Request(CHAT, LabelList(2), "u", BLOCK, n_shared=1, top_logprobs=3, seed=7, attempt=2),
    Request(CHAT, FreeText("[X]:"), "u", BLOCK, temperature=0.7, sample=3),
    Request(CHAT, Choice(("yes", "no")), "u", BLOCK, n_shared=2),
    Request((), Continuation(("\n",)), "u", BLOCK, prompt="Once"),
    Request((), PromptScores(4), "u", BLOCK, prompt="Once upon"),
]


def export(root: Path, requests: list[Request], **limits: int) -> BatchWriter:
    out = numbered_paths(root / "out.jsonl")
    with BatchWriter(UPath(root / "store"), "study", CONFIG, "me", out, **limits) as writer:
        for request in requests:
            writer.add(Question(request.call_id("me"), request))
    return writer


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def answered(custom_id: str, text: str = "[1, 0]", status: int = 200) -> bytes:
    body = {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 5},
    }
    response = {"status_code": status, "request_id": "r", "body": body}
    return json.dumps({"custom_id": custom_id, "response": response, "error": None}).encode()


def take(root: Path, *lines: bytes):
    store = UPath(root / "store")
    return import_answers(lines, lambda batch: Batch.find([store], batch))


def test_every_kind_of_request_is_kept_as_it_was_asked(tmp_path: Path) -> None:
    (file,) = export(tmp_path, REQUESTS).files
    batch = Batch.find([UPath(tmp_path), UPath(tmp_path / "store")], file.batch)
    assert batch is not None
    assert (batch.study, batch.identity, batch.config) == ("study", "me", CONFIG)
    assert len(batch) == len(REQUESTS)
    for request in REQUESTS:
        call_id = request.call_id("me")
        assert batch.question(call_id) == Question(call_id, request)
    assert batch.question("0" * 32) is None


def test_chats_and_plain_texts_go_to_their_own_endpoints(tmp_path: Path) -> None:
    (file,) = export(tmp_path, REQUESTS).files
    lines = lines_of(file.path)
    assert [line["url"] for line in lines] == ["/v1/chat/completions"] * 3 + ["/v1/completions"] * 2
    assert {line["custom_id"].split("-")[0] for line in lines} == {file.batch}
    assert file.n_bytes == file.path.stat().st_size


@given(sizes=st.lists(st.integers(0, 2000), max_size=12), max_requests=st.integers(1, 5))
def test_no_file_exceeds_its_limits_and_nothing_is_lost(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], max_requests: int
) -> None:
    root, max_bytes = tmp_path_factory.mktemp("limits"), 2500
    requests = [
        Request((Message("user", f"{i} " + "é" * (size // 2)),), FreeText(), "u", BLOCK)
        for i, size in enumerate(sizes)
    ]
    files = export(root, requests, max_requests=max_requests, max_bytes=max_bytes).files
    texts = [line["body"]["messages"][0]["content"] for f in files for line in lines_of(f.path)]
    assert texts == [request.messages[0].content for request in requests]
    for file in files:
        assert file.n_requests <= max_requests
        assert file.n_bytes <= max_bytes or file.n_requests == 1


def test_an_export_that_fails_leaves_no_file_and_no_record(tmp_path: Path) -> None:
    broken = Request((), Continuation(), "u", BLOCK)  # without a prompt
    with pytest.raises(ValueError, match="wanted a plain text"):
        export(tmp_path, [REQUESTS[0], broken])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    export(tmp_path, REQUESTS)
    with pytest.raises(StoreError, match=r"out\.jsonl: exists already"):
        export(tmp_path, REQUESTS)


def test_an_answer_is_recorded_with_its_price_under_the_question_it_answers(tmp_path: Path) -> None:
    (file,) = export(tmp_path, REQUESTS[:1]).files
    call_id = REQUESTS[0].call_id("me")
    imported = take(tmp_path, answered(f"{file.batch}-{call_id}"))
    assert (imported.n_recorded, imported.studies) == (1, {"study"})
    assert imported.usage.usd == pytest.approx((100 * 2 + 5 * 4) / 1e6)
    with open_journal(UPath(tmp_path / "store")) as journal:
        entry = journal.find(call_id, BLOCK)
    assert entry is not None
    assert (entry.reply.text, entry.model, entry.messages) == ("[1, 0]", "me", CHAT)


def test_a_prompt_that_is_too_long_is_an_answer(tmp_path: Path) -> None:
    (file,) = export(tmp_path, REQUESTS[:1]).files
    call_id = REQUESTS[0].call_id("me")
    error = {"message": "This model's maximum context length is 2048 tokens."}
    line = {"custom_id": f"{file.batch}-{call_id}", "error": error,
            "response": {"status_code": 400, "body": None}}  # fmt: skip
    assert take(tmp_path, json.dumps(line).encode()).n_recorded == 1
    with open_journal(UPath(tmp_path / "store")) as journal:
        reply = journal.lookup(BLOCK, call_id)
    assert reply is not None
    assert reply.reason == "too_long"


NAMES = st.sampled_from(["custom_id", "response", "error", "status_code", "body", "choices"])
JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


@given(line=st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_line_breaks_an_import(tmp_path_factory: pytest.TempPathFactory, line: bytes) -> None:
    imported = import_answers([line], lambda batch: None)
    assert imported.n_recorded == imported.n_known == 0
    assert imported.n_failed + imported.n_unknown == (1 if line.strip() else 0)


@pytest.mark.parametrize("body", [None, [], {}, {"choices": []}, {"choices": [{"message": 3}]},
                                  {"error": {"message": "no"}}, "text"])  # fmt: skip
def test_a_body_that_is_no_completion_is_a_failure_of_its_line(
    tmp_path: Path, body: object
) -> None:
    (file,) = export(tmp_path, REQUESTS[:1]).files
    custom_id = f"{file.batch}-{REQUESTS[0].call_id('me')}"
    line = {"custom_id": custom_id, "response": {"status_code": 200, "body": body}, "error": None}
    imported = take(tmp_path, json.dumps(line).encode(), answered(custom_id))
    assert (imported.n_failed, imported.n_recorded) == (1, 1)
    assert imported.faults[0].line == 1


@pytest.mark.parametrize("custom_id", ["", "-", "1234", "../../etc-1", "0000000g-1", "00000000-"])
def test_a_foreign_id_is_no_path(custom_id: str) -> None:
    assert split_custom_id(custom_id) is None
