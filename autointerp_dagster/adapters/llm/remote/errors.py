"""What a server's refusals mean: an answer, a feature to do without, a later try, or the end."""

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
import openai

from autointerp_dagster.adapters.llm.backend import TOO_LONG, CallError, Reply
from autointerp_dagster.adapters.llm.remote.body import Body, Feature, features_in
from autointerp_dagster.core.config.models import RemoteLLMConfig
from autointerp_dagster.core.errors import LLMError

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


def of_response(response: httpx2.Response) -> openai.APIStatusError:
    """A refusal as the official client reports it: with the server's words, code and type."""
    try:
        body: Any = response.json()
    except ValueError:
        body = response.text
    said = f"Error code: {response.status_code} - {body}"
    body = body.get("error", body) if isinstance(body, dict) else body
    return openai.APIStatusError(said, response=response, body=body)


def as_reply(error: openai.APIStatusError) -> Reply | None:
    """The answer that a refusal amounts to: filtered, or too long; null for any other."""
    if error.code == "content_filter":
        return Reply(text=None, finish_reason="content_filter")
    if error.status_code not in (400, 413, 422):
        return None
    complaint = str(error).lower()
    if error.code == "context_length_exceeded" or any(w in complaint for w in _TOO_LONG_WORDS):
        return Reply(text=None, finish_reason=TOO_LONG)
    return None


def to_drop(error: openai.APIStatusError, body: Body) -> frozenset[Feature]:
    """The features to try without after a rejected body; empty if none is left to blame."""
    complaint = str(error).lower()
    sent = features_in(body)
    named: list[Feature] = [
        feature
        for feature, words in _HINTS.items()
        if feature in sent and any(word in complaint for word in words)
    ]
    blamed = named
    if error.status_code in (400, 422):
        blamed = named or [feature for feature in sent if feature not in _NEVER_GUESSED]
    elif error.status_code not in (500, 501):  # so llama_cpp.server refuses a field's value
        blamed = []
    if blamed[:1] == ["response_format"] and "json_object" not in complaint:
        return frozenset({"response_format", "json_object"})
    return frozenset(blamed[:1])


def status_error(
    error: openai.APIStatusError, config: RemoteLLMConfig, complaint: str
) -> CallError | LLMError:
    """What to raise for a refused call.

    Args:
        error: Any status from 400 on.
        config: Where the call went.
        complaint: The server's words, without the key.
    """
    code = error.status_code
    page = error.response.headers.get("content-type", "").startswith("text/html")
    words = "an HTML page" if page else complaint[:LONGEST_COMPLAINT]
    message = f"{config.base_url}: HTTP {code} for model {config.model!r}: {words}"
    if code == 402 or (code == 429 and _is_out_of_credit(error)):
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
        retry_after_s=retry_after_s(error.response.headers, datetime.now(UTC)),
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


def _is_out_of_credit(error: openai.APIStatusError) -> bool:
    return "insufficient_quota" in (error.code, error.type) or "insufficient_quota" in str(error)
