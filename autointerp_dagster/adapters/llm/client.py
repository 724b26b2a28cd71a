"""The one way to ask a language model: journal first, then the model, within a budget.

A request passes: 1. the journal; 2. the same call already under way; 3. the budget; 4. the model,
again after a transport failure; 5. the journal again, before anybody sees the answer; 6. a check
of the format, and a repeat that quotes the fault. Nothing here draws lots that a result depends on.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Literal, NamedTuple, Self

from autointerp_dagster.adapters.llm.backend import Backend, CallError, Reply
from autointerp_dagster.adapters.llm.journal import Entry, Journal
from autointerp_dagster.adapters.llm.loop import LoopThread
from autointerp_dagster.core.errors import LLMError
from autointerp_dagster.core.llm import Completion, Message, Request, Usage
from autointerp_dagster.core.schemas import VerdictReason

MAX_REPEATS = 3
"""How often a question is asked again after an answer in the wrong format."""

Answered = tuple[Request, Completion]

Mode = Literal["record", "replay"]
"""``record``: what the journal lacks is asked and kept; ``replay``: nothing is ever sent."""

OnMissing = Callable[[Request, str], None]
"""Told, in replay, of each call that the journal lacks, with its id."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential waits with full jitter between tries of one call."""

    tries: int = 5
    """Before a call is given up."""
    unreachable_tries: int = 3
    """Before an endpoint that never answered is given up; then nothing is asked any more."""
    first_s: float = 0.5
    """Upper end of the first wait; doubles with every try."""
    longest_s: float = 30.0

    def wait_s(self, n_tried: int, retry_after_s: float | None, lot: float) -> float:
        """Seconds to wait after ``n_tried`` >= 1 tries.

        Args:
            n_tried: Tries so far.
            retry_after_s: What the server asked for; never undercut.
            lot: Uniform in [0, 1).
        """
        jittered = lot * min(self.longest_s, self.first_s * 2 ** (n_tried - 1))
        return jittered + (retry_after_s or 0.0)


class _Call(NamedTuple):
    """One attempt: the model's reply, or why there is none."""

    call_id: str
    reply: Reply | None
    reason: VerdictReason | None
    """Null if there is a text whose format is still to be judged."""
    from_journal: bool
    usage: Usage = Usage()

    def seen_again(self) -> "_Call":
        """The same call for somebody who did not pay for it."""
        return self._replace(from_journal=True, usage=Usage())


@dataclass(slots=True)
class _Flight:
    """A group of calls under way, and how many wait for it."""

    task: "asyncio.Task[list[_Call]]"
    n_waiting: int = 0


@dataclass(slots=True)
class _Question:
    """A request on its way to a completion."""

    request: Request
    asked: Request = field(init=False)
    """As last asked: the request, or a repeat that quotes a fault."""
    usage: Usage = field(default_factory=Usage)
    from_journal: bool = True
    completion: Completion | None = None

    def __post_init__(self) -> None:
        self.asked = self.request

    def settle(self, call: _Call) -> None:
        """Take the outcome of the last attempt: complete, or ask again."""
        self.usage += call.usage
        self.from_journal = self.from_journal and call.from_journal
        text = call.reply.text if call.reply is not None else None
        if call.reason is not None or text is None:
            self._complete(call, text, call.reason)
            return
        fault = self.request.answer.fault(text)
        n_repeats = self.asked.attempt - self.request.attempt
        if fault is None:
            self._complete(call, text, None)
        elif n_repeats >= MAX_REPEATS:
            self._complete(call, text, "unparsable")
        else:
            self.asked = repeat_of(self.asked, self.request, text, fault)

    def _complete(self, call: _Call, text: str | None, reason: VerdictReason | None) -> None:
        self.completion = Completion(
            call_id=call.call_id,
            text=text,
            tokens=call.reply.tokens if call.reply is not None else None,
            reason=reason,
            n_calls=1 + self.asked.attempt - self.request.attempt,
            from_journal=self.from_journal,
            usage=self.usage,
        )


def repeat_of(asked: Request, original: Request, text: str, fault: str) -> Request:
    """``original`` asked again, after the faulty answer ``text`` to ``asked``.

    Only the last fault is quoted, so a repeat does not grow with every attempt.
    """
    turns = (
        Message("assistant", text),
        Message("user", f"That answer could not be read: {fault}. Answer again in the format."),
    )
    return replace(asked, messages=original.messages + turns, attempt=asked.attempt + 1)


class JournaledLLM:
    """An :class:`~autointerp_dagster.core.llm.LLM` over a backend; safe to use from many threads.

    Closing it (or leaving its context) ends its background thread; the journal stays open.
    """

    def __init__(
        self,
        backend: Backend,
        journal: Journal,
        *,
        max_in_flight: int | None = None,
        budget_usd: float | None = None,
        budget_tokens: int | None = None,
        backoff: Backoff | None = None,
        mode: Mode = "record",
        on_missing: OnMissing | None = None,
    ) -> None:
        """Put a journal and a budget in front of ``backend``.

        Args:
            backend: The model.
            journal: Where completed calls are kept.
            max_in_flight: Groups under way at once; null: the backend's.
            budget_usd: Stop calling once this much was spent. Calls then under way still count.
            budget_tokens: Likewise, prompt and completion tokens together.
            backoff: Waits between tries.
            mode: In ``replay`` a call that the journal lacks has reason ``not_recorded``.
            on_missing: Told of each of these; called from the background thread.
        """
        self._mode = mode
        self._on_missing = on_missing
        self.identity = backend.identity
        self._backend = backend
        self._journal = journal
        self._limit = max_in_flight or backend.max_in_flight
        self._budget_usd = budget_usd
        self._budget_tokens = budget_tokens
        self._backoff = backoff or Backoff()
        self._usage = Usage()
        self._has_answered = False
        self._lots = random.Random()  # waits only
        self._loop = LoopThread("llm")
        self._slots = asyncio.Semaphore(self._limit)
        self._flights: dict[tuple[str, ...], _Flight] = {}

    @property
    def usage(self) -> Usage:
        """What was paid so far, by all callers."""
        return self._usage

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is under way and end the background thread."""
        self._loop.close(self._backend.close())

    def answer(self, requests: Iterable[Request]) -> Iterator[Answered]:
        """See :meth:`autointerp_dagster.core.llm.LLM.answer`.

        At most twice the limit in flight is drawn ahead of what was yielded. A caller that stops
        early cancels its calls; those that were complete are in the journal.
        """
        done: SimpleQueue[Future[list[Answered]]] = SimpleQueue()
        waiting: set[Future[list[Answered]]] = set()
        try:
            for group in self._backend.groups(requests):
                for block in dict.fromkeys(request.block for request in group):
                    self._journal.load(block)
                future = self._loop.submit(self._answer_group(group))
                waiting.add(future)
                future.add_done_callback(done.put)
                while waiting and (len(waiting) >= 2 * self._limit or not done.empty()):
                    yield from self._next(done, waiting)
            while waiting:
                yield from self._next(done, waiting)
        finally:
            for future in waiting:
                future.cancel()

    def _next(
        self, done: "SimpleQueue[Future[list[Answered]]]", waiting: set[Future[list[Answered]]]
    ) -> list[Answered]:
        future = done.get()
        waiting.remove(future)
        return future.result()

    async def _answer_group(self, group: list[Request]) -> list[Answered]:
        questions = [_Question(request) for request in group]
        open_ = questions
        while open_:
            calls = await self._calls([question.asked for question in open_])
            for question, call in zip(open_, calls, strict=True):
                question.settle(call)
            open_ = [question for question in open_ if question.completion is None]
        return [(q.request, q.completion) for q in questions if q.completion is not None]

    async def _calls(self, asked: list[Request]) -> list[_Call]:
        """One call per request: from the journal if it has them all, else the group as a whole."""
        ids = [request.call_id(self.identity) for request in asked]
        distinct = dict(zip(ids, asked, strict=True))
        known = {i: self._journal.lookup(r.block, i) for i, r in distinct.items()}
        if all(reply is not None for reply in known.values()):
            return [_known(call_id, known[call_id]) for call_id in ids]
        flown = {call.call_id: call for call in await self._join(distinct)}
        calls = []
        for call_id in ids:
            # The journal wins, so that an answer never changes once it was used.
            reply = known[call_id]
            calls.append(flown[call_id] if reply is None else _known(call_id, reply))
            flown[call_id] = flown[call_id].seen_again()
        return calls

    async def _join(self, distinct: dict[str, Request]) -> list[_Call]:
        """Wait for these calls, and send them unless they are already under way."""
        key = tuple(distinct)
        flight = self._flights.get(key)
        is_owner = flight is None
        if flight is None:
            flight = self._flights[key] = _Flight(asyncio.create_task(self._fly(distinct)))
            flight.task.add_done_callback(lambda _: self._flights.pop(key, None))
        flight.n_waiting += 1
        try:
            calls = await asyncio.shield(flight.task)
        finally:
            flight.n_waiting -= 1
            if flight.n_waiting == 0:
                flight.task.cancel()
        return calls if is_owner else [call.seen_again() for call in calls]

    async def _fly(self, distinct: dict[str, Request]) -> list[_Call]:
        if self._mode == "replay":
            for call_id, request in distinct.items():
                if self._on_missing is not None:
                    self._on_missing(request, call_id)
            return [_Call(call_id, None, "not_recorded", False) for call_id in distinct]
        async with self._slots:
            if self._is_exhausted():
                return [_Call(call_id, None, "budget", False) for call_id in distinct]
            replies = await self._ask(list(distinct.values()))
            if replies is None:
                return [_Call(call_id, None, "call_failed", False) for call_id in distinct]
            self._usage = sum((reply.usage for reply in replies), start=self._usage)
        await self._record(distinct, replies)
        return [
            _Call(call_id, reply, reply.reason, False, reply.usage)
            for call_id, reply in zip(distinct, replies, strict=True)
        ]

    async def _record(self, distinct: dict[str, Request], replies: list[Reply]) -> None:
        """Return once the replies would survive a crash."""
        writes = [
            self._journal.record(request.block, Entry.of(call_id, self.identity, request, reply))
            for (call_id, request), reply in zip(distinct.items(), replies, strict=True)
            if self._journal.lookup(request.block, call_id) is None
        ]
        await asyncio.gather(*(asyncio.wrap_future(write) for write in writes))

    async def _ask(self, asked: list[Request]) -> list[Reply] | None:
        """The backend's replies; null if it failed for good, which was logged."""
        for n_tried in range(1, self._backoff.tries + 1):
            try:
                replies = await self._backend.ask(asked)
            except CallError as error:
                if self._is_hopeless(error, n_tried):
                    raise LLMError(str(error)) from None
                if not error.retriable or n_tried == self._backoff.tries:
                    logger.warning("%s: gave up after %d tries: %s", self.identity, n_tried, error)
                    break
                lot = self._lots.random()
                await asyncio.sleep(self._backoff.wait_s(n_tried, error.retry_after_s, lot))
            else:
                self._has_answered = True
                return replies
        return None

    def _is_hopeless(self, error: CallError, n_tried: int) -> bool:
        """Whether nothing was ever answered here, and nothing will be."""
        if self._has_answered or not error.endpoint:
            return False
        return not error.retriable or n_tried >= self._backoff.unreachable_tries

    def _is_exhausted(self) -> bool:
        spent_tokens = self._usage.prompt_tokens + self._usage.completion_tokens
        return (self._budget_usd is not None and self._usage.usd >= self._budget_usd) or (
            self._budget_tokens is not None and spent_tokens >= self._budget_tokens
        )


def _known(call_id: str, reply: Reply | None) -> _Call:
    assert reply is not None
    return _Call(call_id, reply, reply.reason, True)
