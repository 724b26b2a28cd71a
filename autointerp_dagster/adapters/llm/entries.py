"""One completed call as it is kept: a JSON line in a write-ahead log, a row in a segment."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Self

import pyarrow as pa

from autointerp_dagster.adapters.llm.backend import Reply
from autointerp_dagster.core.llm import JournalBlock, Message, Request, Token, Usage

_CANDIDATE = pa.struct({"text": pa.string(), "logprob": pa.float64()})
_TOKEN = pa.struct({"text": pa.string(), "logprob": pa.float64(), "top": pa.list_(_CANDIDATE)})
_MESSAGE = pa.struct({"role": pa.string(), "content": pa.string()})

REPLY_COLUMNS = {
    "call_id": pa.string(),
    "text": pa.string(),
    "finish_reason": pa.string(),
    "tokens": pa.list_(_TOKEN),
    "prompt_tokens": pa.int64(),
    "cached_tokens": pa.int64(),
    "completion_tokens": pa.int64(),
    "usd": pa.float64(),
    "time": pa.string(),
}
"""What a lookup needs; the prompts stay on disk."""

SCHEMA = pa.schema(
    {
        **REPLY_COLUMNS,
        "model": pa.string(),
        "parameters": pa.string(),
        "messages": pa.list_(_MESSAGE),
    }
)
"""Columns of a segment."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One completed call: who was asked what, with which parameters, and what came back."""

    call_id: str
    model: str
    """The model's identity."""
    messages: tuple[Message, ...]
    parameters: str
    """Answer format, sampling parameters, attempt and sample, as canonical JSON."""
    reply: Reply
    time: str
    """When the reply came, ISO 8601 in UTC."""

    @classmethod
    def of(cls, call_id: str, model: str, request: Request, reply: Reply) -> Self:
        """The entry for a call that has just been answered; reads the clock."""
        parameters = {
            "answer": repr(request.answer),
            "unit": request.unit,
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
            "top_logprobs": request.top_logprobs,
            "seed": request.seed,
            "attempt": request.attempt,
            "sample": request.sample,
        }
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        text = json.dumps(parameters, sort_keys=True, ensure_ascii=False)
        return cls(call_id, model, request.messages, text, reply, time)

    def row(self) -> dict[str, Any]:
        """The entry as plain values under the names of :data:`SCHEMA`."""
        tokens = self.reply.tokens
        return {
            "call_id": self.call_id,
            "text": self.reply.text,
            "finish_reason": self.reply.finish_reason,
            "tokens": None if tokens is None else [_token_row(token) for token in tokens],
            **asdict(self.reply.usage),
            "time": self.time,
            "model": self.model,
            "parameters": self.parameters,
            "messages": [{"role": m.role, "content": m.content} for m in self.messages],
        }

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """The inverse of :meth:`row`."""
        messages = tuple(Message(m["role"], m["content"]) for m in row["messages"])
        return cls(
            row["call_id"],
            row["model"],
            messages,
            row["parameters"],
            reply_from_row(row),
            row["time"],
        )


def reply_from_row(row: dict[str, Any]) -> Reply:
    """The reply in a row that has :data:`REPLY_COLUMNS`."""
    tokens = row["tokens"]
    return Reply(
        text=row["text"],
        finish_reason=row["finish_reason"],
        tokens=None if tokens is None else tuple(_token(token) for token in tokens),
        usage=Usage(
            row["prompt_tokens"], row["cached_tokens"], row["completion_tokens"], row["usd"]
        ),
    )


def to_line(block: JournalBlock, entry: Entry) -> bytes:
    """One line of a write-ahead log, newline included."""
    content = {"block": [block.stage, block.coder_hash, block.block], "entry": entry.row()}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def from_line(line: bytes) -> tuple[JournalBlock, Entry]:
    """The inverse of :func:`to_line`.

    Raises:
        ValueError: If the line is torn.
    """
    content = json.loads(line)
    return JournalBlock(*content["block"]), Entry.from_row(content["entry"])


def _token_row(token: Token) -> dict[str, Any]:
    top = [{"text": text, "logprob": logprob} for text, logprob in token.top]
    return {"text": token.text, "logprob": token.logprob, "top": top}


def _token(row: dict[str, Any]) -> Token:
    top = tuple((candidate["text"], candidate["logprob"]) for candidate in row["top"])
    return Token(row["text"], row["logprob"], top)
