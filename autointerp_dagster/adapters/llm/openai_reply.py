"""Reading the body of a chat completion, tolerant of what servers leave out."""

from typing import Any

from autointerp_dagster.adapters.llm.backend import REFUSED, CallError, Reply
from autointerp_dagster.core.config.models import RemoteLLMConfig
from autointerp_dagster.core.llm import Token, Usage


def reply_of(body: dict[str, Any], prices: RemoteLLMConfig) -> Reply:
    """The first choice of a chat completion.

    Args:
        body: The decoded response.
        prices: Where the price per token is.

    Raises:
        CallError: If the body is a server's error in the clothes of a success.
        KeyError, TypeError, IndexError, AttributeError: If it is not a chat completion.
    """
    if body.get("error") is not None:  # OpenRouter sends these with status 200
        raise CallError("the server answered with an error object", retriable=True)
    choice = body["choices"][0]
    message = choice["message"]
    content, refusal = message.get("content"), message.get("refusal")
    if content is not None and not isinstance(content, str):
        raise TypeError("content is not text")
    finish_reason = "refusal" if refusal else choice.get("finish_reason") or "stop"
    return Reply(
        text=None if finish_reason in REFUSED else _clean(content or ""),
        finish_reason=finish_reason,
        tokens=_tokens_of(choice.get("logprobs")),
        usage=_usage_of(body.get("usage") or {}, prices),
    )


def _tokens_of(logprobs: dict[str, Any] | None) -> tuple[Token, ...] | None:
    content = (logprobs or {}).get("content")
    if not content:
        return None
    return tuple(
        Token(
            _clean(item["token"]),
            float(item["logprob"]),
            tuple(
                (_clean(candidate["token"]), float(candidate["logprob"]))
                for candidate in item.get("top_logprobs") or ()
            ),
        )
        for item in content
    )


def _usage_of(usage: dict[str, Any], prices: RemoteLLMConfig) -> Usage:
    prompt = int(usage.get("prompt_tokens") or 0)
    completion = int(usage.get("completion_tokens") or 0)
    cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    usd = prompt * prices.usd_per_1m_prompt + completion * prices.usd_per_1m_completion
    return Usage(prompt, cached, completion, usd / 1e6)


def _clean(text: str) -> str:
    """``text`` without lone surrogates, which JSON can carry and UTF-8 cannot."""
    return text.encode("utf-8", errors="replace").decode()
