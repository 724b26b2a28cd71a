"""What is written into batch files, and that every answer finds its question again."""

import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llm_requests import BLOCK
from pyarrow import Table
from upath import UPath

from autointerp_dagster.adapters.llm.batch.answers import MAX_BATCHES, import_answers
from autointerp_dagster.adapters.llm.batch.files import (
    BatchWriter,
    check_series_free,
    free_paths,
    numbered_paths,
)
from autointerp_dagster.adapters.llm.batch.records import (
    Batch,
    Outstanding,
    Question,
    note_failed,
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
    with BatchWriter(UPath(root / "store"), "study", out, **limits) as writer:
        for request in requests:
            writer.add(Question(request.call_id("me"), request), CONFIG, "me")
    return writer


def files_below(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def ask(number: int) -> Request:
    return Request((Message("user", str(number)),), FreeText(), "u", BLOCK)


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
        assert batch.questions(call_id) == [Question(call_id, request)]
    assert batch.questions("0" * 32) == []


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
        export(tmp_path, [*REQUESTS, broken], max_requests=2)
    assert files_below(tmp_path) == []


def test_nobody_sees_a_file_or_a_record_before_the_export_is_whole(tmp_path: Path) -> None:
    store, out = UPath(tmp_path / "store"), numbered_paths(tmp_path / "out.jsonl")
    with BatchWriter(store, "study", out, max_requests=2) as writer:
        for request in REQUESTS:
            writer.add(Question(request.call_id("me"), request), CONFIG, "me")
        assert {path.suffix for path in files_below(tmp_path)} == {".part"}
    assert len(writer.files) == 3
    assert {path.suffix for path in files_below(tmp_path)} == {".jsonl", ".parquet"}


def test_an_export_whose_last_name_is_taken_meanwhile_takes_all_back(tmp_path: Path) -> None:
    store, out = UPath(tmp_path / "store"), numbered_paths(tmp_path / "out.jsonl")
    writer = BatchWriter(store, "study", out, max_requests=2)
    for request in REQUESTS:
        writer.add(Question(request.call_id("me"), request), CONFIG, "me")
    (tmp_path / "out-3.jsonl").touch()
    with pytest.raises(StoreError, match=r"out-3\.jsonl: exists already"), writer:
        pass
    assert writer.files == []
    assert files_below(tmp_path) == [tmp_path / "out-3.jsonl"]


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    export(tmp_path, REQUESTS)
    with pytest.raises(StoreError, match=r"out\.jsonl: exists already"):
        export(tmp_path, REQUESTS)


def test_a_name_that_an_export_may_need_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "out-2.jsonl").touch()
    with pytest.raises(StoreError, match=r"out-2\.jsonl: exists already"):
        check_series_free(tmp_path / "out.jsonl")
    (tmp_path / "else-answers.jsonl").touch()
    check_series_free(tmp_path / "else.jsonl")
    check_series_free(tmp_path / "nowhere" / "out.jsonl")


def test_a_default_name_is_the_first_that_is_free(tmp_path: Path) -> None:
    for name in ("out.jsonl", "out-2-answers.jsonl", "out-4.jsonl"):
        (tmp_path / name).touch()
    names = free_paths(tmp_path / "out.jsonl")
    assert [next(names).name, next(names).name] == ["out-3.jsonl", "out-5.jsonl"]


@pytest.mark.parametrize("folder", ["/proc/nope", "file"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    out = numbered_paths(tmp_path / folder / "x.jsonl")
    with (
        pytest.raises(StoreError, match=r"x\.jsonl: cannot be written"),
        BatchWriter(UPath(tmp_path / "store"), "study", out) as writer,
    ):
        writer.add(Question("0" * 32, REQUESTS[0]), CONFIG, "me")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has a full disk at hand")
def test_a_full_disk_is_an_error_of_the_store_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.part").symlink_to("/dev/full")
    with pytest.raises(StoreError, match=r"out\.jsonl: cannot be written: No space left"):
        export(tmp_path, REQUESTS)
    assert list(tmp_path.iterdir()) == []


def test_what_an_earlier_batch_asked_is_known_until_it_came_back_without_an_answer(
    tmp_path: Path,
) -> None:
    requests, store = [ask(i) for i in range(600)], UPath(tmp_path / "store")
    ids = [request.call_id("me") for request in requests]
    asked = [Question(*pair) for pair in zip(ids, requests, strict=True)]
    assert any(call_id.endswith("00") for call_id in ids)
    first, second = export(tmp_path, requests, max_requests=400).files
    outstanding = Outstanding(store)
    assert outstanding.batch_of(asked[399]) == f"{first.batch} ({first.path})"
    named = {second.batch: 200, first.batch: 400}
    found = [str(outstanding.batch_of(question)).split()[0] for question in asked]
    assert {batch: found.count(batch) for batch in set(found)} == named
    assert outstanding.batch_of(Question("f" * 32, requests[0])) is None
    elsewhere = replace(requests[0], block=replace(BLOCK, block=BLOCK.block + 1))
    assert outstanding.batch_of(Question(ids[0], elsewhere)) is None
    note_failed(store, first.batch, ids[:3])
    note_failed(store, first.batch, ids[2:4])
    again = Outstanding(store)
    is_free = [again.batch_of(question) is None for question in asked[:6]]
    assert is_free == [True] * 4 + [False] * 2


def test_a_store_without_batches_waits_for_nothing(tmp_path: Path) -> None:
    question = Question("0" * 32, ask(0))
    assert Outstanding(UPath(tmp_path / "store")).batch_of(question) is None


def test_an_import_tells_what_failed_from_what_is_not_there_yet(tmp_path: Path) -> None:
    requests = [ask(i) for i in range(3)]
    (file,) = export(tmp_path, requests).files
    ids = [request.call_id("me") for request in requests]
    take(tmp_path, answered(f"{file.batch}-{ids[0]}", status=500))
    outstanding = Outstanding(UPath(tmp_path / "store"))
    asked = [Question(*pair) for pair in zip(ids, requests, strict=True)]
    assert [outstanding.batch_of(question) is None for question in asked] == [True, False, False]


def test_one_answer_goes_into_every_block_that_asked(tmp_path: Path) -> None:
    """The same window in two layers: one line, one payment, an answer in both blocks."""
    here, there = ask(0), replace(ask(0), block=replace(BLOCK, coder_hash="other"))
    call_id = here.call_id("me")
    (file,) = export(tmp_path, [here, there, ask(1)]).files
    assert len(lines_of(file.path)) == file.n_requests == 2
    outstanding = Outstanding(UPath(tmp_path / "store"))
    assert None not in [outstanding.batch_of(Question(call_id, q)) for q in (here, there)]
    imported = take(tmp_path, answered(f"{file.batch}-{call_id}", "[EXPLANATION]: words"))
    assert (imported.n_recorded, imported.usage.prompt_tokens) == (1, 100)
    with open_journal(UPath(tmp_path / "store")) as journal:
        assert all(journal.lookup(q.block, call_id) is not None for q in (here, there))
    again = take(tmp_path, answered(f"{file.batch}-{call_id}", "[EXPLANATION]: words"))
    assert (again.n_recorded, again.n_known) == (0, 1)


def test_an_import_keeps_few_batches_in_memory(tmp_path: Path) -> None:
    requests, store = [ask(i) for i in range(10)], UPath(tmp_path / "store")
    files = export(tmp_path, requests, max_requests=1).files
    alive: list[weakref.ref[Table]] = []
    most = 0

    def find(name: str) -> Batch | None:
        nonlocal most
        most = max(most, sum(table() is not None for table in alive))
        batch = Batch.find([store], name)
        assert batch is not None
        alive.append(weakref.ref(batch._table))
        return batch

    lines = [
        answered(f"{file.batch}-{request.call_id('me')}", "[X]: x")
        for file, request in zip(files, requests, strict=True)
    ]
    imported = import_answers([*lines, lines[-1]], find)
    assert (imported.n_recorded, imported.n_known, len(alive)) == (10, 1, 10)
    assert most <= MAX_BATCHES


@pytest.mark.parametrize("where", ["line", "custom_id", "error", "body"])
def test_a_line_that_is_nested_too_deeply_is_a_failed_line(tmp_path: Path, where: str) -> None:
    (file,) = export(tmp_path, REQUESTS[:1]).files
    custom_id = f"{file.batch}-{REQUESTS[0].call_id('me')}".encode()
    for depth in (300, 600, 900, 950, 980, 990, 200_000):
        deep = b"[" * depth + b"]" * depth
        line = {
            "line": deep,
            "custom_id": b'{"custom_id": %b}' % deep,
            "error": b'{"custom_id": "%b", "error": %b}' % (custom_id, deep),
            "body": b'{"custom_id": "%b", "response": {"status_code": 200, "body": %b}}'
            % (custom_id, deep),
        }[where]
        imported = take(tmp_path, line)
        assert imported.n_failed + imported.n_unknown == 1


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


def test_a_refusal_that_repeats_the_question_is_no_answer(tmp_path: Path) -> None:
    request = replace(REQUESTS[0], messages=(Message("user", "What is a context window made of?"),))
    (file,) = export(tmp_path, [request]).files
    problem = {"msg": "no", "input": "What is a context window made of?"}
    line = {"custom_id": f"{file.batch}-{request.call_id('me')}", "error": None,
            "response": {"status_code": 422, "body": {"detail": [problem]}}}  # fmt: skip
    assert take(tmp_path, json.dumps(line).encode()).n_failed == 1


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
                                  {"error": {"message": "no"}}, {"error": {"code": 429}},
                                  {"choices": [{"text": "a", "finish_reason": "abort"}]},
                                  {"choices": [{"text": "a", "logprobs": 7}]}, "text"])  # fmt: skip
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
