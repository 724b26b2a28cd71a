"""Calls under way together, from the first group that wants them until they land."""

import asyncio
from collections.abc import Sequence

from autointerp_dagster.adapters.llm.backend import Reply
from autointerp_dagster.adapters.llm.ledger import Cost
from autointerp_dagster.adapters.llm.questions import Call, Group, known_call
from autointerp_dagster.core.llm import Request


class Flight:
    """Distinct calls that are asked together, and the groups that wait for them."""

    __slots__ = (
        "cost",
        "groups",
        "is_recording",
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
