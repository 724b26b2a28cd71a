"""Calls under way: who waits for which, when each is sent, and what becomes of a failure.

1. A group of calls boards the flight that already has the same calls, or a new one.
2. Flights are sent in order, while limit, pause, budget and deadline allow.
3. A flight that failed waits and is sent again, or lands with the reason.
4. A flight that was answered keeps its place until the journal has made the answer durable: a
   process that is killed pays twice for no more than the limit. Then it lands.
5. A group whose answer has the wrong format boards again, before all others.
6. Where a call was denied, the backend is asked whether all are; if not, only that one is given up.

Everything here happens in the loop's thread but for the public methods. Nothing that a result
depends on is random: lots only spread waits.
"""

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any

from autointerp_dagster.adapters.llm.backend import Backend, CallError, Reply
from autointerp_dagster.adapters.llm.flight import Flight, GivenUp, billed
from autointerp_dagster.adapters.llm.flow import (
    AdaptiveLimit,
    Backoff,
    EndpointHealth,
    Failure,
    failure_of,
)
from autointerp_dagster.adapters.llm.journal.journal import Entry, Journal
from autointerp_dagster.adapters.llm.ledger import Account
from autointerp_dagster.adapters.llm.loop import LoopThread
from autointerp_dagster.adapters.llm.questions import Call, Group, Inbox
from autointerp_dagster.core.errors import LLMError
from autointerp_dagster.core.llm import Usage
from autointerp_dagster.core.schemas import VerdictReason

LOOK_AGAIN_S = 0.1
"""Seconds until a call that waits for room in the budget is tried again."""

logger = logging.getLogger(__name__)


class Sender:
    """Sends groups of calls to one backend, for many callers."""

    def __init__(
        self,
        backend: Backend,
        journal: Journal,
        *,
        max_in_flight: int,
        account: Account | None,
        backoff: Backoff,
        deadline: float,
    ) -> None:
        """Describe a sender; its thread is started by the first group.

        Args:
            backend: The model.
            journal: Where completed calls are kept.
            max_in_flight: Flights under way at once, at most.
            account: The budget.
            backoff: Waits between tries, and how many.
            deadline: In seconds of the monotonic clock; after it nothing is sent.
        """
        self._backend = backend
        self._journal = journal
        self._account = account
        self._backoff = backoff
        self._deadline = deadline
        self._limit = AdaptiveLimit(max_in_flight)
        self._health = EndpointHealth(backoff)
        self._lots = random.Random()
        self._loop = LoopThread("llm")
        self._flights: dict[tuple[str, ...], Flight] = {}
        self._ready: deque[Flight] = deque()
        self._n_under_way = 0
        self._written: deque[tuple[Flight, Future[None]]] = deque()
        self._is_called = False
        self._inboxes: set[Inbox] = set()
        self._alarm: asyncio.TimerHandle | None = None
        self._denied: list[tuple[Flight, CallError]] = []
        self._check: asyncio.Task[None] | None = None
        self._given_up = GivenUp(backend.identity)
        self._stopped: Exception | None = None
        self._n_answered = 0
        self.usage = Usage()
        """What was paid so far; estimated where a call may have been paid and nobody said."""

    def send(self, groups: list[Group]) -> None:
        """Have groups completed, each in its inbox, in any order.

        Raises:
            LLMError: If the sender was closed.
        """
        try:
            self._loop.post(self._do, self._take, groups)
        except RuntimeError as error:
            raise LLMError("the language model was closed. Open it again to ask.") from error

    def abandon(self, groups: Iterable[Group]) -> None:
        """Forget groups that nobody waits for any more; calls for nobody else are cancelled."""
        self._loop.post_if_running(self._do, self._drop, list(groups))

    def close(self) -> None:
        """Cancel what is under way and end the thread; whoever still waits gets an LLMError."""
        self._loop.post_if_running(self._stop, LLMError("the language model was closed."))
        try:
            self._loop.close(self._backend.close())
        finally:
            self._given_up.report()

    def _do(self, step: Callable[..., None], *args: Any) -> None:
        """Every step starts here."""
        try:
            step(*args)
        except Exception as error:  # noqa: BLE001 callers wait for their groups, or must hear why not
            self._stop(error)
        self._deliver()

    def _deliver(self) -> None:
        for inbox in self._inboxes:
            inbox.deliver()
        self._inboxes.clear()

    def _take(self, groups: list[Group]) -> None:
        for group in groups:
            self._board(group)
        self._pump()

    def _board(self, group: Group, *, is_first: bool = False) -> None:
        if self._stopped is not None:
            group.inbox.fail(self._stopped)
            return
        flight = self._flights.get(group.key)
        if flight is None:
            requests = {question.call_id: question.asked for question in group.open}
            flight = self._flights[group.key] = Flight(group.key, requests)
            if is_first:
                self._ready.appendleft(flight)
            else:
                self._ready.append(flight)
        flight.groups.append(group)
        if flight.is_recording:
            self._keep(flight)  # its block may be another

    def _drop(self, groups: list[Group]) -> None:
        for group in groups:
            flight = self._flights.get(group.key)
            if flight is None or group not in flight.groups:
                continue
            flight.groups.remove(group)
            if not flight.groups and not flight.is_recording:
                del self._flights[flight.key]
                if flight.task is not None:
                    flight.task.cancel()
                if flight.timer is not None:
                    flight.timer.cancel()

    def _pump(self) -> None:
        """Send what may be sent."""
        while self._ready and self._stopped is None:
            flight = self._ready.popleft()
            if flight.groups and not self._depart(flight, time.monotonic()):
                self._ready.appendleft(flight)
                return

    def _depart(self, flight: Flight, now: float) -> bool:
        """Send a flight, or land it if nothing need or may be sent; false if it has to wait."""
        if now >= self._deadline:
            self._land_without(flight, "deadline")
            return True
        if self._n_under_way >= self._limit.calls:
            return False  # whatever ends next pumps again
        if now < self._health.closed_until:
            self._pump_in(min(self._health.closed_until, self._deadline) - now)
            return False
        flight.look_up(self._journal.lookup)  # somebody else's answer may have come meanwhile
        if len(flight.known) == len(flight.requests):
            self._n_under_way += 1
            self._keep(flight)
            return True
        return self._reserve_and_send(flight, now)

    def _reserve_and_send(self, flight: Flight, now: float) -> bool:
        if self._account is not None:
            if flight.cost is None:
                flight.cost = self._account.estimate(list(flight.requests.values()))
            grant = self._account.reserve(flight.cost)
            if grant == "exhausted":
                self._land_without(flight, "budget")
                return True
            if grant == "wait":
                self._pump_in(LOOK_AGAIN_S)
                return False
        self._n_under_way += 1
        flight.sent = now
        asking = self._backend.ask(list(flight.requests.values()))
        flight.task = asyncio.get_running_loop().create_task(asking)
        flight.task.add_done_callback(partial(self._do, self._end, flight))
        return True

    def _pump_in(self, wait_s: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = asyncio.get_running_loop().call_later(wait_s, self._do, self._pump)

    def _end(self, flight: Flight, task: "asyncio.Task[list[Reply]]") -> None:
        """The backend is done with a flight."""
        flight.task = None
        error = (
            CallError("the call was cancelled.", retriable=True)
            if task.cancelled()
            else task.exception()
        )
        if error is None:
            self._record(flight, task.result())
            return
        self._n_under_way -= 1  # before anything is raised, for others use the same budget
        self._book(flight, billed(error))
        if not isinstance(error, CallError):
            raise error
        if flight.groups:
            self._judge(flight, error)
        self._pump()

    def _book(self, flight: Flight, usage: Usage | None) -> None:
        """Put what a flight cost in the place of what was reserved; null: nobody knows."""
        if self._account is not None and flight.cost is not None:
            if usage is None:
                usage = self._account.dearest(list(flight.requests.values()))
            self._account.release(flight.cost, usage)
        if usage is not None:
            self.usage += usage

    def _judge(self, flight: Flight, error: CallError) -> None:
        """Try again later, or give the flight up, or the endpoint."""
        now = time.monotonic()
        failure = failure_of(error)
        if failure in ("busy", "late"):
            self._limit.overloaded(flight.sent, now)
        self._health.failed(failure, flight.sent, now, error.retry_after_s, self._lots.random())
        if self._health.is_hopeless:
            self._stop(self._no_hope(error))
        elif failure == "unreachable":
            self._ready.appendleft(flight)  # which says nothing of these calls; all calls wait
        elif failure == "denied":
            self._denied.append((flight, error))
            self._check_denied()
        elif self._is_given_up(flight, failure, error):
            self._give_up(flight, error)
        else:
            wait_s = self._backoff.wait_s(
                flight.n_tried + flight.n_busy, error.retry_after_s, self._lots.random()
            )
            wait_s = max(0.0, min(wait_s, self._deadline - now))
            flight.timer = asyncio.get_running_loop().call_later(
                wait_s, self._do, self._again, flight
            )

    def _is_given_up(self, flight: Flight, failure: Failure, error: CallError) -> bool:
        if failure == "busy":
            flight.n_busy += 1
        else:
            flight.n_tried += 1
        return (
            not error.retriable
            or flight.n_tried >= self._backoff.tries
            or flight.n_busy >= self._backoff.busy_tries
        )

    def _give_up(self, flight: Flight, error: CallError) -> None:
        self._given_up.add(flight.n_tried + flight.n_busy, error)
        self._land_without(flight, "call_failed")

    def _check_denied(self) -> None:
        """Ask whether every call is denied; one check at a time, begun after the denial."""
        if self._check is None and self._denied:
            suspects, self._denied = self._denied, []
            self._check = asyncio.get_running_loop().create_task(self._backend.check())
            self._check.add_done_callback(partial(self._do, self._end_check, suspects))

    def _end_check(
        self, suspects: list[tuple[Flight, CallError]], task: "asyncio.Task[None]"
    ) -> None:
        self._check = None
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, LLMError):
            self._stop(self._no_hope(error))
        elif error is not None:
            raise error
        else:
            for flight, denial in suspects:
                flight.n_tried += 1
                if flight.groups:
                    self._give_up(flight, denial)
            self._check_denied()

    def _no_hope(self, error: CallError | LLMError) -> LLMError:
        if self._n_answered == 0:
            return LLMError(str(error))
        return LLMError(
            f"{error} It did answer before, and does no more: {self._n_answered:,} answers are in "
            "the journal. Run again when it answers; nothing is paid twice."
        )

    def _again(self, flight: Flight) -> None:
        flight.timer = None
        self._ready.append(flight)
        self._pump()

    def _record(self, flight: Flight, replies: list[Reply]) -> None:
        now = time.monotonic()
        self._limit.answered(flight.sent, now, self._n_under_way)
        self._health.answered()
        self._n_answered += len(replies)
        self._book(flight, sum([reply.usage for reply in replies[1:]], start=replies[0].usage))
        flight.replies = replies
        self._keep(flight)

    def _keep(self, flight: Flight) -> None:
        """Have the journal keep what it lacks, in the block of everybody who waits for it."""
        flight.is_recording = True
        self._flights.setdefault(flight.key, flight)
        for (block, call_id), request, reply in flight.take_unkept():
            entry = Entry.of(call_id, self._backend.identity, request, reply)
            written = self._journal.record(block, entry)
            written.add_done_callback(partial(self._note_written, flight))
        if flight.n_unwritten == 0:
            self._n_under_way -= 1
            self._land(flight, flight.calls())

    def _note_written(self, flight: Flight, future: "Future[None]") -> None:
        """Called by the journal's thread, once per call; wakes the loop once per commit."""
        self._written.append((flight, future))
        if not self._is_called:
            self._is_called = True
            self._loop.post_if_running(self._do, self._land_written)

    def _land_written(self) -> None:
        self._is_called = False  # first, so that no later note goes unseen
        while self._written:
            flight, future = self._written.popleft()
            error = future.exception()
            if error is not None:
                raise error
            flight.n_unwritten -= 1
            if flight.n_unwritten == 0:
                self._n_under_way -= 1
                self._land(flight, flight.calls())
        self._pump()

    def _land(self, flight: Flight, calls: dict[str, Call]) -> None:
        """Hand the calls to everybody who waits for them; the first to come pays."""
        for group in flight.groups:
            group.settle(calls)
            calls = {call_id: call.seen_again() for call_id, call in calls.items()}
            group.answer_from(self._journal.lookup)  # a repeat may have been asked before
            self._return(group)
        self._forget(flight)

    def _land_without(self, flight: Flight, reason: VerdictReason) -> None:
        """Tell everybody who waits for the flight why there is no answer."""
        for group in flight.groups:
            group.settle_without(reason, self._journal.lookup)
            self._return(group)
        self._forget(flight)

    def _return(self, group: Group) -> None:
        if group.open:
            self._board(group, is_first=True)
        else:
            group.inbox.put(group)
            self._inboxes.add(group.inbox)

    def _forget(self, flight: Flight) -> None:
        """Called last, so that an error while it lands reaches everybody who waits for it."""
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]

    def _stop(self, error: Exception) -> None:
        """Send nothing any more, and tell everybody why. Calls under way may end."""
        self._deliver()
        self._stopped = self._stopped or error
        groups = [group for flight in self._flights.values() for group in flight.groups]
        for inbox in {group.inbox for group in groups}:
            inbox.fail(error)
        for flight in self._flights.values():
            flight.groups.clear()
            if flight.timer is not None:
                flight.timer.cancel()
        self._flights.clear()
        self._ready.clear()
