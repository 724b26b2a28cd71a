"""What a language model must offer so that :class:`~.client.JournaledLLM` can ask it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from autointerp_dagster.core.llm import Request, Token, Usage
from autointerp_dagster.core.schemas import VerdictReason

REFUSED = frozenset({"content_filter", "refusal"})
"""Finish reasons of an answer that the model or its filter declined to give."""

TOO_LONG = "too_long"
"""Finish reason of a prompt that does not fit the model's context; asking again cannot help."""

CUT_OFF = "length"
"""Finish reason of an answer that ended at ``max_tokens``."""

FULL_LINE = "full_line"
"""Finish reason of a line of free text that a local model ended at ``max_tokens``. It is taken as
it is: asked again, a small model writes no shorter line."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said to one call, before its format is judged."""

    text: str | None
    """Null if the model declined, or the prompt does not fit."""
    finish_reason: str
    """``stop``, ``length``, ``full_line``, ``content_filter``, ``refusal``, ``too_long``, or the
    server's own."""
    tokens: tuple[Token, ...] | None = None
    """Null where the endpoint gave no log-probabilities."""
    usage: Usage = field(default_factory=Usage)

    @property
    def reason(self) -> VerdictReason | None:
        """Why the call can have no answer; null if there is a text to read."""
        if self.finish_reason in REFUSED:
            return "refused"
        if self.finish_reason == TOO_LONG:
            return "too_long"
        return "call_failed" if self.text is None else None


class CallError(Exception):
    """One call did not come back with an answer."""

    def __init__(
        self,
        message: str,
        *,
        retriable: bool,
        endpoint: bool = False,
        busy: bool = False,
        timed_out: bool = False,
        retry_after_s: float | None = None,
        usage: Usage | None = None,
    ) -> None:
        """Describe the failure.

        Args:
            message: Without secrets; for ``endpoint`` failures it says what to do.
            retriable: Whether the same call may succeed later.
            endpoint: Whether every call would fail alike (nothing listens, the key is wrong).
            busy: Whether the server has too much to do (429, 503, 529); says nothing of the call.
            timed_out: Whether no answer came in time.
            retry_after_s: How long the server asked to wait.
            usage: What the call was billed, zeros where it surely cost nothing (it was refused or
                never arrived); null where that is unknown: it may have been paid.
        """
        super().__init__(message)
        self.retriable = retriable
        self.endpoint = endpoint
        self.busy = busy
        self.timed_out = timed_out
        self.retry_after_s = retry_after_s
        self.usage = usage


class Backend(Protocol):
    """A model without journal, retries or budget."""

    identity: str
    """Part of every ``call_id``; see :class:`~autointerp_dagster.core.llm.LLM`."""
    max_in_flight: int
    """Groups under way at once."""

    @property
    def capabilities(self) -> Mapping[str, bool] | None:
        """What the model was seen to offer, for manifests; null before its first answer.

        Keys: ``structured_outputs``, ``log_probabilities``, ``seed`` and
        ``prompt_log_probabilities``; one that nothing has told about is absent.
        """
        ...

    def groups(self, requests: Iterable[Request]) -> Iterator[list[Request]]:
        """``requests`` in their order, cut lazily into what is asked together."""
        ...

    async def ask(self, group: Sequence[Request]) -> list[Reply]:
        """One reply per request of a group, in order.

        Raises:
            CallError: If the call failed; the group as a whole may be asked again.
            LLMError: If no call can succeed (e.g. the key's environment variable is not set).
        """
        ...

    async def check(self) -> None:
        """Find out, without a call that costs anything, whether the model can be asked at all.

        Raises:
            LLMError: If not; says which address was tried and how to start a server.
        """
        ...

    async def close(self) -> None:
        """Give connections back; the backend is not used afterwards."""
        ...
