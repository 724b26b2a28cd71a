import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_requests import BLOCK
from upath import UPath

from autointerp_dagster.adapters.llm.backend import Reply
from autointerp_dagster.adapters.llm.journal.journal import Entry, Journal
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.llm import Continuation, LabelList, Message, Request, Token, Usage

SHARED = (Message("system", "Count the ☃." * 50), Message("user", "an example"))
ODD = "aZ0 \n\r\t\"\\'[]{},\x00\x7f\x85\u2028\u0301é☃\ufeff\ufffd\ufffe😀"
"""No lone surrogates: backends replace them before a reply is made (see openai_reply)."""
TEXT = st.text(ODD, max_size=9)
LOGPROB = st.floats(max_value=0, allow_nan=False)  # -inf too: vLLM sends it for banned tokens
TOKEN = st.tuples(TEXT, LOGPROB, st.lists(st.tuples(TEXT, LOGPROB), max_size=4).map(tuple))
COUNT = st.integers(0, 2**40)
USAGE = st.tuples(COUNT, COUNT, COUNT, st.floats(0, 1e9), COUNT)
MESSAGES = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT), max_size=4)
CALL = st.fixed_dictionaries(
    {
        "model": TEXT,
        "messages": MESSAGES,
        "parameters": TEXT,
        "text": st.none() | TEXT,
        "finish_reason": TEXT,
        "tokens": st.none() | st.lists(TOKEN, max_size=6),
        "usage": USAGE,
        "prompt": st.none() | TEXT,
        "n_shared": st.integers(0, 4),
    }
)
"""Plain values: the run-time type checks of the tests draw lots, which a strategy must not."""


def entry_from(call_id: str, values: dict[str, Any]) -> Entry:
    tokens = values["tokens"]
    return Entry(
        call_id=call_id,
        model=values["model"],
        messages=tuple(Message(*message) for message in values["messages"]),
        parameters=values["parameters"],
        reply=Reply(
            values["text"],
            values["finish_reason"],
            None if tokens is None else tuple(Token(*token) for token in tokens),
            Usage(*values["usage"]),
        ),
        time="2026-01-01T00:00:00.000000+00:00",
        prompt=values["prompt"],
        n_shared=min(values["n_shared"], len(values["messages"])),
    )


def chat(question: str, n_shared: int = 2) -> Request:
    messages = (*SHARED, Message("user", question))
    return Request(messages, LabelList(1), "unit", BLOCK, n_shared=n_shared)


def templates(root: Path) -> list[Path]:
    return sorted((root / "journal-templates").iterdir())


@settings(max_examples=25, deadline=None)
@given(st.lists(CALL, min_size=1, max_size=4))
def test_whatever_is_recorded_comes_back_from_the_log_and_from_a_segment(calls):
    recorded = [entry_from(f"call {i}", values) for i, values in enumerate(calls)]
    with tempfile.TemporaryDirectory() as folder:
        root = UPath(folder)
        writer = Journal(root)
        for done in [writer.record(BLOCK, entry) for entry in recorded]:
            done.result()
        (log,) = (Path(folder) / "journal-wal").glob("*.jsonl")
        content = log.read_bytes()
        writer.close()
        orphan = Path(folder) / "orphan"
        (orphan / "journal-wal").mkdir(parents=True)
        (Path(orphan) / "journal-wal" / log.name).write_bytes(content)
        for journal in (Journal(root), Journal(UPath(orphan))):
            assert [journal.find(e.call_id, BLOCK) for e in recorded] == recorded
            assert [journal.lookup(BLOCK, e.call_id) for e in recorded] == [
                e.reply for e in recorded
            ]


def test_shared_messages_are_stored_once_and_found_whole(tmp_path):
    recorded = [
        Entry.of(name, "model", chat(f"question {name}"), Reply("[1]", "stop")) for name in "abc"
    ]
    with Journal(UPath(tmp_path)) as journal:
        for entry in recorded:
            journal.record(BLOCK, entry).result()
        (log,) = (tmp_path / "journal-wal").glob("*.jsonl")
        assert log.read_text().count(SHARED[0].content) == 1
    assert len(templates(tmp_path)) == 1
    assert [Journal(UPath(tmp_path)).find(name) for name in "abc"] == recorded


def test_the_same_messages_have_the_same_template_in_every_process(tmp_path):
    for name in "ab":
        with Journal(UPath(tmp_path)) as journal:
            entry = Entry.of(name, "model", chat(name), Reply("[1]", "stop"))
            journal.record(BLOCK, entry).result()
    assert len(templates(tmp_path)) == 1


def test_a_lost_or_damaged_template_is_named_and_the_answers_are_still_there(tmp_path):
    with Journal(UPath(tmp_path)) as journal:
        journal.record(BLOCK, Entry.of("a", "m", chat("a"), Reply("[1]", "stop"))).result()
    (template,) = templates(tmp_path)
    template.write_bytes(b"[]")
    with pytest.raises(StoreError, match="does not match the name"):
        Journal(UPath(tmp_path)).find("a")
    template.unlink()
    journal = Journal(UPath(tmp_path))
    with pytest.raises(StoreError, match="a prompt is missing"):
        journal.find("a")
    assert journal.lookup(BLOCK, "a") == Reply("[1]", "stop")


def test_the_plain_text_of_a_base_model_is_kept(tmp_path):
    request = Request((), Continuation(), "unit", BLOCK, prompt="Once upon a time")
    reply = Reply(" there", "length", usage=Usage(4, 0, 1, 0.0, estimated_tokens=5))
    with Journal(UPath(tmp_path)) as journal:
        journal.record(BLOCK, Entry.of("a", "model", request, reply)).result()
    found = Journal(UPath(tmp_path)).find("a", BLOCK)
    assert found is not None
    assert (found.prompt, found.messages, found.reply) == ("Once upon a time", (), reply)
    assert not (tmp_path / "journal-templates").exists()


def test_more_shared_messages_than_there_are_means_all_of_them(tmp_path):
    entry = Entry.of("a", "model", chat("a", n_shared=9), Reply("[1]", "stop"))
    assert entry.n_shared == 3
    with Journal(UPath(tmp_path)) as journal:
        journal.record(BLOCK, entry).result()
    assert Journal(UPath(tmp_path)).find("a") == entry


def test_a_vocabulary_larger_than_a_page_is_read_back(tmp_path):
    tokens = tuple(
        Token(f"{i:06d}" * 10, -1.0, ((f"top {i:06d}" * 10, -1.0),)) for i in range(20_000)
    )
    reply = Reply("", "stop", tokens)
    entry = Entry.of("a", "m", chat("a"), reply)
    with Journal(UPath(tmp_path)) as journal:
        journal.record(BLOCK, entry).result()
    assert Journal(UPath(tmp_path)).lookup(BLOCK, "a") == reply
