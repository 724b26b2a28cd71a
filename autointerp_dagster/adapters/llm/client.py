"""The one way to ask a language model: journal first, then the model, within a budget.

A request passes: 1. the journal; 2. the same call already under way; 3. limit, pause, deadline and
budget; 4. the model, again after a failure; 5. the journal again, before anybody sees the answer;
6. a check of the format, and a repeat that quotes the fault. Steps 1 and 6 happen where the caller
waits, the others in ``sender``'s thread; the two exchange lists, for a hand-over costs more than
all else that is done here for a request.
"""

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from datetime import timedelta
from math import inf
from typing import Literal, Self

from autointerp_dagster.adapters.llm.backend import Backend
from autointerp_dagster.adapters.llm.flow import Backoff
from autointerp_dagster.adapters.llm.journal.journal import Journal
from autointerp_dagster.adapters.llm.ledger import Account
from autointerp_dagster.adapters.llm.questions import Group, Inbox
from autointerp_dagster.adapters.llm.sender import Sender
from autointerp_dagster.core.llm import Completion, Request, Usage
from autointerp_dagster.core.schemas import VerdictReason

__all__ = ["Backoff", "JournaledLLM", "Mode", "OnMissing"]

Answered = tuple[Request, Completion]

Mode = Literal["record", "replay"]
"""``record``: what the journal lacks is asked and kept; ``replay``: nothing is ever sent."""

OnMissing = Callable[[Request, str], None]
"""Told, in replay, of each call that the journal lacks, with its id."""

HAND_OVER = 16
"""Groups handed to the sender at once, at most, where more than the limit wait anyhow."""


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
        account: Account | None = None,
        deadline: float | timedelta | None = None,
        backoff: Backoff | None = None,
        mode: Mode = "record",
        on_missing: OnMissing | None = None,
    ) -> None:
        """Put a journal and a budget in front of ``backend``.

        Args:
            backend: The model.
            journal: Where completed calls are kept.
            max_in_flight: Groups under way at once, over all callers; null: the backend's.
            account: Asked before each call whether it may be paid; null: nothing is counted.
            deadline: From now, or in seconds of the monotonic clock. After it nothing is sent and
                what the journal lacks has reason ``deadline``; calls under way may end.
            backoff: Waits between tries, and how many.
            mode: In ``replay`` a call that the journal lacks has reason ``not_recorded``.
            on_missing: Told of each of these, in the caller's thread.
        """
        if isinstance(deadline, timedelta):
            deadline = time.monotonic() + deadline.total_seconds()
        self.identity = backend.identity
        self._backend = backend
        self._journal = journal
        self._account = account
        self._deadline = inf if deadline is None else deadline
        self._mode = mode
        self._on_missing = on_missing
        limit = max_in_flight or backend.max_in_flight
        self._limit = limit
        self._look_ahead = 2 * limit
        self._counting = threading.Lock()
        self._cost = Usage()
        self._sender = Sender(
            backend,
            journal,
            max_in_flight=limit,
            account=account,
            backoff=backoff or Backoff(),
            deadline=self._deadline,
        )

    @property
    def usage(self) -> Usage:
        """What was paid so far, by all callers."""
        return self._sender.usage

    @property
    def cost(self) -> Usage:
        """What all answers so far cost, whenever they were paid; one given twice counts twice."""
        return self._cost

    @property
    def capabilities(self) -> Mapping[str, bool] | None:
        """What the model was seen to offer; null before its first answer."""
        return self._backend.capabilities

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is under way and end the background thread."""
        self._sender.close()

    def answer(self, requests: Iterable[Request]) -> Generator[Answered, None, None]:
        """See :meth:`autointerp_dagster.core.llm.LLM.answer`.

        At most twice the limit in flight is drawn ahead of what was yielded. A caller that stops
        early cancels its calls; those that were complete are in the journal.

        Raises:
            LLMError: If the endpoint cannot be asked at all, or stopped answering for good; what
                was answered is in the journal.
            StoreError: If the journal cannot be read or written.
        """
        waiting: set[Group] = set()
        try:
            for group in self._completed(requests, waiting):
                answers = list(group.answers())
                with self._counting:
                    self._cost = sum((done.cost for _, done in answers), start=self._cost)
                yield from answers
        finally:
            if waiting:
                self._sender.abandon(waiting)

    def _completed(self, requests: Iterable[Request], waiting: set[Group]) -> Iterator[Group]:
        """Groups as they are completed; ``waiting`` holds those drawn and not yet yielded."""
        inbox = Inbox()
        unsent: list[Group] = []
        for group in self._groups(requests, inbox):
            is_open = bool(group.open)
            if is_open:
                waiting.add(group)
                unsent.append(group)
                # Below the limit at once: nobody knows how long the next request takes to draw.
                is_between = self._limit < len(waiting) < self._look_ahead
                if is_between and inbox.is_empty and len(unsent) < HAND_OVER:
                    continue
            if unsent:  # before anything is yielded, for nobody knows when the caller comes back
                self._sender.send(unsent)
                unsent = []
            if not is_open:
                yield group
            while waiting and (len(waiting) >= self._look_ahead or not inbox.is_empty):
                yield from _come(inbox, waiting)
        if unsent:
            self._sender.send(unsent)
        while waiting:
            yield from _come(inbox, waiting)

    def _groups(self, requests: Iterable[Request], inbox: Inbox) -> Iterator[Group]:
        """The requests in groups, those complete for which nothing has to be sent."""
        for drawn in self._backend.groups(requests):
            for block in dict.fromkeys([request.block for request in drawn]):
                self._journal.load(block)
            group = Group(drawn, self.identity, inbox)
            group.answer_from(self._journal.lookup)
            reason = self._reason_not_to_send() if group.open else None
            if reason is not None:
                if reason == "not_recorded":
                    self._report_missing(group)
                group.settle_without(reason, self._journal.lookup)
            yield group

    def _reason_not_to_send(self) -> VerdictReason | None:
        if self._mode == "replay":
            return "not_recorded"
        if time.monotonic() >= self._deadline:
            return "deadline"
        return "budget" if self._account is not None and self._account.is_exhausted else None

    def _report_missing(self, group: Group) -> None:
        if self._on_missing is not None:
            for call_id, request in {q.call_id: q.asked for q in group.open}.items():
                self._on_missing(request, call_id)


def _come(inbox: Inbox, waiting: set[Group]) -> Iterator[Group]:
    """What has come; waits for at least one group."""
    for group in inbox.get():
        waiting.remove(group)
        yield group
