"""One completed call as it is kept: the entry, and its line in a write-ahead log."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

from autointerp_dagster.adapters.llm.backend import Reply
from autointerp_dagster.core.llm import JournalBlock, Message, Request, Token, Usage

_compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_sorted = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode


@dataclass(frozen=True, slots=True)
class Entry:
    """One completed call: who was asked what, with which parameters, and what came back."""

    call_id: str
    model: str
    """The model's identity."""
    messages: tuple[Message, ...]
    """All of them; empty if there is a ``prompt``."""
    parameters: str
    """Answer format, sampling parameters, attempt and sample, as canonical JSON."""
    reply: Reply
    time: str
    """When the reply came, ISO 8601 in UTC."""
    prompt: str | None = None
    """Plain text that a base model was given."""
    n_shared: int = 0
    """How many leading messages are stored once for all entries that begin with them."""

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
        return cls(
            call_id=call_id,
            model=model,
            messages=request.messages,
            parameters=_sorted(parameters),
            reply=reply,
            time=datetime.now(UTC).isoformat(timespec="microseconds"),
            prompt=request.prompt,
            n_shared=min(request.n_shared, len(request.messages)),
        )

    @property
    def shared(self) -> tuple[Message, ...]:
        """The leading messages that are stored once."""
        return self.messages[: self.n_shared]

    @property
    def own(self) -> tuple[Message, ...]:
        """The messages after those that are stored once."""
        return self.messages[self.n_shared :]


def to_line(block: JournalBlock, entry: Entry, template: str | None) -> bytes:
    """One line of a write-ahead log, newline included.

    Args:
        block: Where the call belongs.
        entry: The call.
        template: The address of its shared messages, which are left out; null if there are none.
    """
    content = {
        "block": [block.stage, block.coder_hash, block.block],
        "call": entry.call_id,
        "model": entry.model,
        "template": template,
        "messages": [[message.role, message.content] for message in entry.own],
        "prompt": entry.prompt,
        "parameters": entry.parameters,
        "reply": _reply_values(entry.reply),
        "time": entry.time,
    }
    return _compact(content).encode() + b"\n"


def from_line(
    content: dict[str, Any], templates: dict[str, tuple[Message, ...]]
) -> tuple[JournalBlock, Entry]:
    """The inverse of :func:`to_line`.

    Args:
        content: The decoded line.
        templates: Shared messages by address.

    Raises:
        KeyError, TypeError, ValueError: If the line is not a call's, or lacks its template.
    """
    template = content["template"]
    shared = () if template is None else templates[template]
    entry = Entry(
        call_id=content["call"],
        model=content["model"],
        messages=shared + messages_of(content["messages"]),
        parameters=content["parameters"],
        reply=_reply_of(content["reply"]),
        time=content["time"],
        prompt=content["prompt"],
        n_shared=len(shared),
    )
    return JournalBlock(*content["block"]), entry


def messages_to_json(messages: Sequence[Message]) -> bytes:
    """Messages as canonical JSON; the same messages always give the same bytes."""
    return _compact([[message.role, message.content] for message in messages]).encode()


def messages_of(values: Sequence[Sequence[Any]]) -> tuple[Message, ...]:
    """Messages from pairs of role and content."""
    return tuple(Message(role, content) for role, content in values)


def _reply_values(reply: Reply) -> list[Any]:
    usage = reply.usage
    tokens = reply.tokens
    return [
        reply.text,
        reply.finish_reason,
        None if tokens is None else [[t.text, t.logprob, t.top] for t in tokens],
        [
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens,
            usage.usd,
            usage.estimated_tokens,
        ],
    ]


def _reply_of(values: list[Any]) -> Reply:
    text, finish_reason, tokens, usage = values
    return Reply(
        text=text,
        finish_reason=finish_reason,
        tokens=None if tokens is None else tuple(_token_of(*token) for token in tokens),
        usage=Usage(*usage),
    )


def _token_of(text: str, logprob: float, top: list[list[Any]]) -> Token:
    return Token(text, logprob, tuple((text, logprob) for text, logprob in top))
