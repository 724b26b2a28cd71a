"""Calls under way together, from the first group that wants them until they land."""

import asyncio
import logging
from collections.abc import Sequence

from autointerp_dagster.adapters.llm.backend import CallError, Reply
from autointerp_dagster.adapters.llm.ledger import Cost
from autointerp_dagster.adapters.llm.questions import Call, Group, Lookup, known_call
from autointerp_dagster.core.errors import LLMError
from autointerp_dagster.core.llm import JournalBlock, Request, Usage

N_SAID = 5
"""Calls given up that have a line each in the log; the others are counted."""

Place = tuple[JournalBlock, str]
"""Where the journal keeps a call: its block and id."""

logger = logging.getLogger(__name__)


class Flight:
    """Distinct calls that are asked together, and the groups that wait for them."""

    __slots__ = (
        "cost",
        "groups",
        "is_recording",
        "kept",
        "key",
        "known",
        "n_busy",
        "n_tried",
        "n_unwritten",
        "replies",
        "requests",
        "sent",
        "task",
        "timer",
    )

    def __init__(self, key: tuple[str, ...], requests: dict[str, Request]) -> None:
        self.key = key
        self.requests = requests
        """By id."""
        self.groups: list[Group] = []
        """The first of them pays."""
        self.cost: Cost | None = None
        """What it may cost; null if not yet estimated."""
        self.n_tried = 0
        """Failures that may lie with the calls."""
        self.n_busy = 0
        self.sent = 0.0
        self.task: asyncio.Task[list[Reply]] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.known: dict[str, Reply] = {}
        """What the journal had when it was sent; the journal wins, for it may have been used."""
        self.kept: set[Place] = set()
        """Where the journal has a call, or is about to."""
        self.replies: Sequence[Reply] = ()
        self.n_unwritten = 0
        self.is_recording = False
        """From the answer until the journal has it."""

    def calls(self) -> dict[str, Call]:
        """What came of it, by id; call it once every request is known or answered."""
        answered = zip(self.requests, self.replies, strict=False)  # no replies: all are known
        calls = {call_id: Call(r, r.reason, usage=r.usage) for call_id, r in answered}
        calls |= {call_id: known_call(reply) for call_id, reply in self.known.items()}
        return calls

    def places(self) -> dict[Place, Request]:
        """Where the journal should have the calls: in the block of everybody who waits for them."""
        found = {(asked.block, call_id): asked for call_id, asked in self.requests.items()}
        for group in self.groups:
            for question in group.open:
                found.setdefault((question.asked.block, question.call_id), question.asked)
        return found

    def look_up(self, lookup: Lookup) -> None:
        """Take what the journal knows by now."""
        for place in self.places():
            reply = lookup(*place)
            if reply is not None:
                self.kept.add(place)
                self.known.setdefault(place[1], reply)

    def take_unkept(self) -> list[tuple[Place, Request, Reply]]:
        """What the journal lacks, each once; call it when every request is known or answered."""
        replies = dict(zip(self.requests, self.replies, strict=False)) | self.known
        places = [item for item in self.places().items() if item[0] not in self.kept]
        self.kept.update(place for place, _ in places)
        self.n_unwritten += len(places)
        return [(place, asked, replies[place[1]]) for place, asked in places]


def billed(error: BaseException) -> Usage | None:
    """What a failed call cost; null: nobody knows. An LLMError is raised in the place of a call."""
    if isinstance(error, CallError):
        return error.usage
    return Usage() if isinstance(error, LLMError) else None


class GivenUp:
    """Calls given up: a line in the log for each of the first few, and one for all at the end."""

    def __init__(self, identity: str) -> None:
        self._identity = identity
        self._n = 0

    def add(self, n_tries: int, error: CallError) -> None:
        """Take note of a call that failed ``n_tries`` times, lastly by ``error``."""
        self._n += 1
        if self._n <= N_SAID:
            logger.warning("%s: gave up after %d tries: %s", self._identity, n_tries, error)
        if self._n == N_SAID:
            logger.warning("%s: further calls given up are counted only.", self._identity)

    def report(self) -> None:
        """Log the number if not all had a line, and start anew."""
        if self._n > N_SAID:
            logger.warning("%s: gave up %d calls in all.", self._identity, self._n)
        self._n = 0
