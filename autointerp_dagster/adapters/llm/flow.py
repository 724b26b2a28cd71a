"""How fast an endpoint is asked, and when it is given up. Pure: every method is told the time.

1. The number of calls under way starts at 32, grows by one with every answer until the endpoint
   first has too much to do, and by one per round trip after that (slow start and congestion
   avoidance, RFC 5681), as long as at least half of it is used and latency holds.
2. Overload (429, 503, no answer in time) shrinks it by half the share of recent calls that met
   overload, once per round trip (DCTCP, RFC 8257): a server that refuses everything is asked half
   as much, one that refuses every tenth call at random loses little.
3. A call that failed waits with full jitter (Brooker 2015, "Exponential backoff and jitter"). A
   Retry-After, and an address where nothing listens, hold up every call.
"""

from dataclasses import dataclass
from math import inf
from typing import Literal

from autointerp_dagster.adapters.llm.backend import CallError

FIRST_LIMIT = 32
"""Calls under way before the first answer: what one latent has ready for a scorer, as a rule. The
default maximum, 64, is reached one round trip later."""
SLOWER = 2.0
"""Growth pauses while latency is this many times what it was."""
LATENCY_GAIN = 1 / 8
"""Weight of an answer in the mean latency of late (as of a round trip in RFC 6298)."""
BASELINE_GAIN = 1 / 600
"""Weight of the mean of late in the latency it is compared with, where that is lower: other
prompts take other times, so the comparison must forget."""
OVERLOAD_GAIN = 1 / 16
"""Weight of a call in the share that met overload (RFC 8257, section 4.2)."""

Failure = Literal["unreachable", "denied", "busy", "late", "other"]
"""``unreachable``: nothing listens; ``denied``: the key, the credit or the address is wrong;
``busy``: 429, 503, 529; ``late``: no answer in time; ``other``: may lie with the call."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits between tries, and how many there are."""

    tries: int = 5
    """Before a call is given up."""
    busy_tries: int = 50
    """Likewise where the server had too much to do, which says nothing of the call. Some ten
    minutes if it never asks for a longer wait."""
    unreachable_tries: int = 3
    """Before an endpoint that never answered is given up; then nothing is asked any more."""
    denied_first: int = 5
    """How many calls may be denied by an endpoint that never answered; likewise."""
    denied_calls: int = 50
    """How many in a row by one that did answer; likewise. The key is good, for that is looked up
    first: so many prompts together may be against a provider's rules."""
    silent_s: float = 600.0
    """Likewise seconds without any answer, if at least ``silent_calls`` failed in them. A server
    may be away for so long; waits that it asked for itself do not count."""
    silent_calls: int = 20
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
        longest = min(self.longest_s, self.first_s * 2 ** min(n_tried - 1, 60))
        return lot * longest + (retry_after_s or 0.0)


class AdaptiveLimit:
    """How many calls may be under way at once; from 1 to a maximum."""

    def __init__(self, most: int, first: int = FIRST_LIMIT) -> None:
        """Start at ``first`` calls, but never allow more than ``most`` >= 1."""
        self._most = most
        self._calls = float(min(first, most))
        self._is_starting = True
        self._overload = 1.0  # so the first refusal of all halves
        self._shrunk = -inf
        self._latency: float | None = None
        self._baseline = inf

    @property
    def calls(self) -> int:
        """Calls that may be under way now."""
        return int(self._calls)

    def answered(self, sent: float, now: float, n_under_way: int) -> None:
        """Take note of an answer.

        Args:
            sent: When the call was sent, in seconds of any clock.
            now: The time on the same clock.
            n_under_way: Calls under way, this one included.
        """
        self._overload -= OVERLOAD_GAIN * self._overload
        latency = now - sent
        if self._latency is not None:
            latency = self._latency + LATENCY_GAIN * (latency - self._latency)
        self._latency = latency
        if self._baseline < latency:
            self._baseline += BASELINE_GAIN * (latency - self._baseline)
        else:
            self._baseline = latency
        # Half: answers come in bursts, between which nothing is sent (as in RFC 7661).
        is_used = 2 * n_under_way >= self.calls
        if is_used and latency <= SLOWER * self._baseline:
            growth = 1.0 if self._is_starting else 1.0 / self._calls
            self._calls = min(float(self._most), self._calls + growth)

    def overloaded(self, sent: float, now: float) -> None:
        """Take note of a call that met overload, sent at ``sent``.

        What was sent before the limit last shrank met the same overload and shrinks nothing.
        """
        self._overload += OVERLOAD_GAIN * (1.0 - self._overload)
        if sent > self._shrunk:
            self._calls = max(1.0, self._calls * (1.0 - self._overload / 2))
            self._is_starting = False
            self._shrunk = now


class EndpointHealth:
    """Whether an endpoint may be asked now, later, or never again."""

    def __init__(self, backoff: Backoff) -> None:
        self._backoff = backoff
        self._has_answered = False
        self._failed_at: float | None = None
        self._failing_s = 0.0
        """Since the first failure of the series, without the waits that the server asked for."""
        self._asked_to_wait_until = -inf
        self._n_failed = 0
        self._n_denied = 0
        self._n_lost = 0
        self._lost_at = -inf
        self.closed_until = -inf
        """No call is sent before this time."""
        self.is_hopeless = False
        """Whether no call can succeed any more."""

    def answered(self) -> None:
        """Take note of an answer, which ends every series of failures."""
        self._has_answered = True
        if self._failed_at is not None:
            self._failed_at = None
            self._failing_s = 0.0
            self._n_failed = self._n_denied = self._n_lost = 0

    def failed(
        self, failure: Failure, sent: float, now: float, retry_after_s: float | None, lot: float
    ) -> None:
        """Take note of a failed call.

        Args:
            failure: What went wrong.
            sent: When the call was sent.
            now: The time on the same clock.
            retry_after_s: What the server asked for.
            lot: Uniform in [0, 1), for the wait of all calls where nothing listens.
        """
        if self._failed_at is not None:
            since = max(self._failed_at, self._asked_to_wait_until)
            self._failing_s += max(0.0, now - since)
        self._failed_at = now
        self._n_failed += 1
        if retry_after_s is not None:
            self._asked_to_wait_until = max(self._asked_to_wait_until, now + retry_after_s)
            self.closed_until = max(self.closed_until, self._asked_to_wait_until)
        if failure == "denied":
            self._n_denied += 1
        # Calls that found nobody together count once.
        elif failure == "unreachable" and sent > self._lost_at:
            self._n_lost += 1
            self._lost_at = now
            pause_s = self._backoff.wait_s(self._n_lost, None, lot)
            self.closed_until = max(self.closed_until, now + pause_s)
        self.is_hopeless = self.is_hopeless or self._has_no_hope()

    def _has_no_hope(self) -> bool:
        backoff = self._backoff
        if self._failing_s >= backoff.silent_s and self._n_failed >= backoff.silent_calls:
            return True
        if self._has_answered:
            return self._n_denied >= backoff.denied_calls
        return self._n_denied >= backoff.denied_first or self._n_lost >= backoff.unreachable_tries


def failure_of(error: CallError) -> Failure:
    """What a call's failure says about its endpoint."""
    if error.endpoint:
        return "unreachable" if error.retriable else "denied"
    if error.busy:
        return "busy"
    return "late" if error.timed_out else "other"
