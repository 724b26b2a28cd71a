"""Requests on their way to completions, and where the completed ones are collected."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import NamedTuple

from autointerp_dagster.adapters.llm.backend import CUT_OFF, Reply
from autointerp_dagster.core.llm import (
    Completion,
    FreeText,
    JournalBlock,
    Message,
    Request,
    Usage,
)
from autointerp_dagster.core.schemas import VerdictReason

MAX_REPEATS = 3
"""How often a question is asked again after an answer in the wrong format."""

Lookup = Callable[[JournalBlock, str], Reply | None]
"""The journal's reply to a call, if there is one."""

NOTHING = Usage()


class Call(NamedTuple):
    """One attempt: the model's reply, or why there is none."""

    reply: Reply | None
    reason: VerdictReason | None
    """Null if there is a text whose format is still to be judged."""
    from_journal: bool = False
    usage: Usage = NOTHING
    """What whoever gets this pays for it."""

    def seen_again(self) -> "Call":
        """The same call for somebody who did not pay for it."""
        return self._replace(from_journal=True, usage=NOTHING)


def known_call(reply: Reply) -> Call:
    """A call that the journal answers."""
    return Call(reply, reply.reason, from_journal=True)


class Question:
    """A request, what was paid for it so far, and its completion in the end."""

    __slots__ = (
        "_cost",
        "_from_journal",
        "_identity",
        "_usage",
        "asked",
        "call_id",
        "completion",
        "request",
    )

    def __init__(self, request: Request, identity: str) -> None:
        """A question to the model with this identity."""
        self.request = request
        self.asked = request
        """As last asked: the request, or a repeat that quotes a fault."""
        self.call_id = request.call_id(identity)
        """Of ``asked``."""
        self.completion: Completion | None = None
        self._identity = identity
        self._usage = NOTHING
        self._cost = NOTHING
        self._from_journal = True

    def settle(self, call: Call) -> None:
        """Take the outcome of the last attempt: complete, or ask again."""
        reply, reason = call.reply, call.reason
        self._from_journal = self._from_journal and call.from_journal
        if call.usage is not NOTHING:
            self._usage = _sum(self._usage, call.usage)
        if reply is not None:
            self._cost = _sum(self._cost, reply.usage)
        if reason is not None or reply is None or reply.text is None:
            self._complete(reply, reason)
            return
        text = reply.text
        fault = _fault(self.request, text, reply.finish_reason)
        if fault is None:
            self._complete(reply, None)
        elif self.asked.attempt - self.request.attempt >= MAX_REPEATS:
            self._complete(reply, "unparsable")
        else:
            self.asked = repeat_of(self.asked, self.request, text, fault)
            self.call_id = self.asked.call_id(self._identity)

    def _complete(self, reply: Reply | None, reason: VerdictReason | None) -> None:
        self.completion = Completion(
            call_id=self.call_id,
            text=reply.text if reply is not None else None,
            tokens=reply.tokens if reply is not None else None,
            reason=reason,
            n_calls=1 + self.asked.attempt - self.request.attempt,
            from_journal=self._from_journal,
            usage=self._usage,
            cost=self._cost,
        )


def _fault(request: Request, text: str, finish_reason: str) -> str | None:
    """What is wrong with an answer; a description that was cut off may say something else."""
    if isinstance(request.answer, FreeText) and finish_reason == CUT_OFF:
        return "the answer was cut off before its end; be shorter"
    return request.answer.fault(text)


def _sum(first: Usage, second: Usage) -> Usage:
    return second if first is NOTHING else first + second


def repeat_of(asked: Request, original: Request, text: str, fault: str) -> Request:
    """``original`` asked again, after the faulty answer ``text`` to ``asked``.

    Only the last fault is quoted, so a repeat does not grow with every attempt. An empty answer is
    not: servers refuse an empty turn, and chat templates two turns of one role.
    """
    if not text.strip():
        complaint = "An earlier answer to this was empty. Answer in the format."
        *before, question = original.messages or (Message("user", ""),)
        if question.role == "user":
            complaint = f"{question.content}\n\n{complaint}".lstrip()
        else:
            before.append(question)
        return replace(
            asked,
            messages=(*before, Message("user", complaint)),
            n_shared=min(original.n_shared, len(before)),
            attempt=asked.attempt + 1,
        )
    turns = (
        Message("assistant", text),
        Message("user", f"That answer could not be read: {fault}. Answer again in the format."),
    )
    return replace(asked, messages=original.messages + turns, attempt=asked.attempt + 1)


class Inbox:
    """Where one caller waits for groups that are complete. Filled by one thread, read by one."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[list[Group] | Exception] = SimpleQueue()
        self._batch: list[Group] = []

    def put(self, group: "Group") -> None:
        """Add a group, which is seen by the reader after the next :meth:`deliver`."""
        self._batch.append(group)

    def deliver(self) -> None:
        """Wake the reader, once for everything added."""
        if self._batch:
            self._queue.put(self._batch)
            self._batch = []

    def fail(self, error: Exception) -> None:
        """Raise ``error`` where the reader waits."""
        self._queue.put(error)

    @property
    def is_empty(self) -> bool:
        """Whether :meth:`get` would have to wait."""
        return self._queue.empty()

    def get(self) -> "list[Group]":
        """At least one complete group; waits for it."""
        came = self._queue.get()
        if isinstance(came, Exception):
            raise came
        return came


class Group:
    """Questions that are asked together."""

    __slots__ = ("inbox", "open", "questions")

    def __init__(self, requests: Sequence[Request], identity: str, inbox: Inbox) -> None:
        """Questions of the model with this identity, for the reader of ``inbox``."""
        self.questions = [Question(request, identity) for request in requests]
        self.open = self.questions
        """Those without completion."""
        self.inbox = inbox

    @property
    def key(self) -> tuple[str, ...]:
        """Ids of the calls that the open questions need, each once."""
        return tuple(dict.fromkeys([question.call_id for question in self.open]))

    def answer_from(self, lookup: Lookup) -> None:
        """Settle what the journal knows: attempts for which it has every open question."""
        while self.open:
            replies = [lookup(question.asked.block, question.call_id) for question in self.open]
            calls = [known_call(reply) for reply in replies if reply is not None]
            if len(calls) < len(replies):
                return
            for question, call in zip(self.open, calls, strict=True):
                question.settle(call)
            self._drop_completed()

    def settle(self, calls: dict[str, Call]) -> None:
        """Settle every open question by its call; who asks twice pays once.

        Args:
            calls: By id.
        """
        seen: set[str] = set()
        for question in self.open:
            call_id = question.call_id
            call = calls[call_id]
            question.settle(call.seen_again() if call_id in seen else call)
            seen.add(call_id)
        self._drop_completed()

    def settle_without(self, reason: VerdictReason, lookup: Lookup) -> None:
        """Complete every open question by what the journal knows or else by the reason."""
        while self.open:
            for question in self.open:
                reply = lookup(question.asked.block, question.call_id)
                question.settle(Call(None, reason) if reply is None else known_call(reply))
            self._drop_completed()

    def answers(self) -> list[tuple[Request, Completion]]:
        """The completed questions, in order."""
        return [(q.request, q.completion) for q in self.questions if q.completion is not None]

    def _drop_completed(self) -> None:
        self.open = [question for question in self.open if question.completion is None]
