"""What a server's refusals mean: an answer, a feature to do without, a later try, or the end."""

import re
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any

import httpx2

from autointerp_dagster.adapters.llm.backend import TOO_LONG, CallError, Reply
from autointerp_dagster.adapters.llm.remote.body import Body, Feature, features_in
from autointerp_dagster.adapters.llm.remote.complaints import complaint_of
from autointerp_dagster.core.config.models import RemoteLLMConfig
from autointerp_dagster.core.errors import LLMError
from autointerp_dagster.core.llm import Request, Usage

RETRIABLE = frozenset({408, 409, 425, 429})
"""Besides all codes from 500 on."""
BUSY = frozenset({429, 503, 529})
ENDPOINT_WIDE = frozenset({401, 403, 404, 405})
"""Codes that say something about the address or the key, if no call ever succeeded."""
LONGEST_RETRY_AFTER_S = 300.0
"""A server that asks for a longer wait is asked again all the same."""
LONGEST_COMPLAINT = 500
"""Characters of a server's words that a message repeats."""

_FORMAT_WORDS = ("response_format", "json_schema", "schema", "guided", "structured")
_HINTS: Mapping[Feature, tuple[str, ...]] = {
    "structured_outputs": ("structured_outputs",),
    "guided_choice": ("guided_choice",),
    "logprobs": ("logprob",),
    "response_format": _FORMAT_WORDS,
    "json_object": _FORMAT_WORDS,
    "seed": ("seed",),
    "max_tokens": ("max_completion_tokens",),
    "temperature": ("temperature",),
}
"""Words in a server's complaint that name a feature."""
_NEVER_GUESSED: frozenset[Feature] = frozenset({"max_tokens", "temperature"})
"""What is done without only where the complaint names it: models that reason refuse these."""

_TOO_LONG_WORDS = ("context length", "context window", "context size", "context_length")
_FLAGGED = re.compile(r"\bflagged\b|content_filter|content_policy_violation")
_MODERATED = re.compile(r"\bmoderat(?:ed|ion)\b")
_ACCOUNT = re.compile(r"\b(?:accounts?|organi[sz]ations?|api[ _-]?keys?|subscriptions?)\b")
"""Whose mention says that it is not the prompt which was flagged."""

_NAMED_CODES: Mapping[str, int] = {
    "rate_limit_exceeded": 429,
    "rate_limit_error": 429,
    "insufficient_quota": 429,
    "overloaded_error": 529,
    "context_length_exceeded": 400,
    "content_filter": 400,
    "content_policy_violation": 400,
}
"""Errors that servers name where others give a status."""


class RefusedError(Exception):
    """A refusal: a status from 400 on, or an error in the clothes of a success."""

    def __init__(
        self,
        status: int,
        body: object,
        request: Request | None,
        config: RemoteLLMConfig,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Describe a refusal by its status.

        Args:
            status: From 400 on.
            body: Decoded JSON, or text.
            request: What was asked, which the server may repeat; null if nothing was.
            config: Where it was asked.
            headers: Of the response; names in lower case, or in any.
        """
        super().__init__(f"HTTP {status}")
        self.status = status
        self.headers: Mapping[str, str] = headers or {}
        self.usage: Usage | None = Usage()
        self.what = f"HTTP {status}"
        self._body = body
        self._request = request
        self._config = config

    @classmethod
    def of_response(
        cls, response: httpx2.Response, request: Request | None, config: RemoteLLMConfig
    ) -> "RefusedError":
        """The refusal in a response with a status from 400 on."""
        body: Any
        if response.headers.get("content-type", "").startswith("text/html"):
            body = "an HTML page"
        else:
            try:
                body = response.json()
            except (ValueError, RecursionError):
                body = response.text
        return cls(response.status_code, body, request, config, response.headers)

    @classmethod
    def in_answer(
        cls, error: object, request: Request, config: RemoteLLMConfig, usage: Usage | None
    ) -> "RefusedError":
        """The refusal in an answer that came with status 200, as OpenRouter sends them.

        Args:
            error: The error object.
            request: What was asked.
            config: Where it was asked.
            usage: As the answer reports it; null if it reports none.
        """
        status = _status_in(error)
        refused = cls(status, error, request, config)
        refused.what = f"error {status} in an answer"
        # A fault of the server's may have come after it had written, and billed, half an answer.
        refused.usage = Usage() if usage is None and status < 500 else usage
        return refused

    @cached_property
    def words(self) -> str:
        """The server's own words; may hold the key."""
        sent: Sequence[str] = ()
        if self._request is not None:
            texts = [message.content for message in self._request.messages]
            sent = [*texts, self._request.prompt or ""]
        return complaint_of(self._body, sent, self._config.model)

    @cached_property
    def complaint(self) -> str:
        """The same in lower case, to search."""
        return self.words.lower()


def declined(refused: RefusedError) -> Reply | None:
    """The answer that a refusal amounts to: filtered, or too long; null for any other."""
    if refused.status not in (400, 403, 413, 422):
        return None
    if _is_flagged(refused):
        return Reply(None, "content_filter", usage=refused.usage or Usage())
    if refused.status != 403 and any(words in refused.complaint for words in _TOO_LONG_WORDS):
        return Reply(None, TOO_LONG, usage=refused.usage or Usage())
    return None


def to_drop(
    refused: RefusedError, body: Body, taken: Collection[Feature] = ()
) -> frozenset[Feature]:
    """The features to try without after a rejected body; empty if none is left to blame.

    Args:
        refused: The refusal.
        body: What was refused.
        taken: Features that the server is known to take in such a request: to blame only where
            the server names them.
    """
    sent = features_in(body)
    named: list[Feature] = [
        feature
        for feature, words in _HINTS.items()
        if feature in sent and any(word in refused.complaint for word in words)
    ]
    blamed = named
    if refused.status in (400, 422):
        blamed = named or [f for f in sent if f not in _NEVER_GUESSED and f not in taken]
    elif refused.status not in (500, 501):  # so llama_cpp.server refuses a field's value
        blamed = []
    if blamed[:1] == ["response_format"] and "json_object" not in refused.complaint:
        return frozenset({"response_format", "json_object"})
    return frozenset(blamed[:1])


def error_of(refused: RefusedError, config: RemoteLLMConfig, words: str) -> CallError | LLMError:
    """What to raise for a refused call.

    Args:
        refused: The refusal.
        config: Where the call went.
        words: The server's, without the key.
    """
    code = refused.status
    message = (
        f"{config.base_url}: {refused.what} for model {config.model!r}: {words[:LONGEST_COMPLAINT]}"
    )
    if code == 402 or (code == 429 and "insufficient_quota" in refused.complaint):
        return LLMError(
            f"{message} The account has no credit left. Add some and run again: what was answered "
            "is in the journal."
        )
    if code in (401, 403):
        name = config.api_key_env
        hint = "Name the key's environment variable in api_key_env."
        message += f" Check the key in {name}." if name else f" {hint}"
    elif code in ENDPOINT_WIDE:
        message += " Check base_url (it ends in /v1) and the model's name."
    return CallError(
        message,
        retriable=code in RETRIABLE or code >= 500,
        endpoint=code in ENDPOINT_WIDE,
        busy=code in BUSY,
        timed_out=code in (408, 504),
        retry_after_s=retry_after_s(refused.headers, datetime.now(UTC)),
        usage=refused.usage,
    )


def retry_after_s(headers: Mapping[str, str], now: datetime) -> float | None:
    """Seconds that a server asks to wait, in [0, 300]; null if it does not say.

    ``retry-after-ms`` is read first, then ``Retry-After`` as seconds or as an HTTP date.

    Args:
        headers: Of the response; names in any case.
        now: With a time zone.
    """
    wait_s = _seconds(headers.get("retry-after-ms"), 1e-3)
    if wait_s is None:
        wait_s = _seconds(headers.get("retry-after"), 1.0)
    if wait_s is None:
        wait_s = _seconds_until(headers.get("retry-after"), now)
    return None if wait_s is None else min(LONGEST_RETRY_AFTER_S, max(0.0, wait_s))


def _seconds(value: str | None, unit_s: float) -> float | None:
    try:
        wait_s = float(value or "") * unit_s
    except ValueError:
        return None
    return wait_s if wait_s == wait_s else None  # not a number


def _seconds_until(value: str | None, now: datetime) -> float | None:
    try:
        date = parsedate_to_datetime(value or "")
    except ValueError:
        return None
    # A date without a zone is in UTC.
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now.timestamp()


def _is_flagged(refused: RefusedError) -> bool:
    """Whether a filter took offence at the prompt."""
    complaint = refused.complaint
    is_flagged = _FLAGGED.search(complaint) is not None
    # Elsewhere the word may be the name of a field.
    is_flagged |= refused.status == 403 and _MODERATED.search(complaint) is not None
    return is_flagged and _ACCOUNT.search(complaint) is None


def _status_in(error: object) -> int:
    """The status that an error object stands for; 500 if it does not say."""
    if not isinstance(error, Mapping):
        return 500
    for code in (error.get("code"), error.get("type")):
        if isinstance(code, str):
            code = int(code) if re.fullmatch("[0-9]{3}", code) else _NAMED_CODES.get(code)
        if isinstance(code, int) and 400 <= code < 600:
            return code
    return 500
