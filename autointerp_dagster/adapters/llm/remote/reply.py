"""From the body of a chat or text completion to a reply, tolerant of what servers leave out."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from autointerp_dagster.adapters.llm.backend import REFUSED, CallError, Reply
from autointerp_dagster.adapters.llm.remote.errors import RefusedError
from autointerp_dagster.adapters.llm.remote.prompt_tokens import best_of, prompt_tokens
from autointerp_dagster.core.config.models import RemoteLLMConfig
from autointerp_dagster.core.errors import LLMError
from autointerp_dagster.core.llm import (
    Choice,
    IntegerList,
    LabelList,
    PromptScores,
    Request,
    Token,
    Usage,
    estimated_tokens,
)

TOKENS_PER_MESSAGE = 4
"""What a chat template puts around a message, where tokens must be estimated."""

MOST_TOKENS = 2**53
"""A count of tokens from here on is a fault, not a count."""
LONGEST_REASON = 64
"""Characters of a finish reason that are kept."""
BROKEN_OFF = frozenset({"error", "abort"})
"""Finish reasons of an answer that the server did not finish: OpenRouter's where the provider
failed; vLLM's and SGLang's where they shut down."""

_LIST_START = re.compile(r"\[[-\d,\s]*")

Json = Mapping[str, Any]


def reply_of(body: object, request: Request, config: RemoteLLMConfig) -> Reply:
    """The first choice of a completion.

    Args:
        body: The decoded response.
        request: What was asked; its answer decides what is read.
        config: Prices, and the server's name for messages.

    Raises:
        CallError: If it is no whole completion; with its usage where that can be read.
        RefusedError: If the body is a server's refusal in the clothes of a success.
        LLMError: If log-probabilities of the prompt were asked for and none came.
    """
    try:
        return _reply_of(body, request, config)
    except (CallError, RefusedError, LLMError):
        raise
    except Exception as error:  # noqa: BLE001 a body may be anything, and none may end a run
        # Not quoted: the answer may hold anything.
        raise CallError(
            f"the answer is not a completion ({type(error).__name__}).",
            retriable=True,
            usage=_billed(body, request, config),
        ) from None


def follows_schema(reply: Reply, request: Request) -> bool | None:
    """Whether an answer is such as a server that binds answers to a schema gives.

    Null where that cannot be told: no text, a good start cut short, or an answer without a schema.
    """
    text = (reply.text or "").strip()
    if not text or not isinstance(request.answer, LabelList | IntegerList | Choice):
        return None
    if isinstance(request.answer, Choice):
        is_whole = text in request.answer.options
        is_start = any(option.startswith(text.strip('"')) for option in request.answer.options)
    else:
        is_whole = _is_integer_list(text, request.answer)
        is_start = _LIST_START.fullmatch(text) is not None
    if not is_whole and is_start and reply.finish_reason != "stop":
        return None
    return is_whole


def no_prompt_scores(config: RemoteLLMConfig, what: str) -> LLMError:
    """The error of a server from which log-probabilities of a prompt cannot be had."""
    return LLMError(
        f"{config.base_url or config.endpoint}: {what}, wanted the log-probabilities of a "
        f"prompt's own tokens from model {config.model!r} (/completions with echo and logprobs). "
        "Serve the model with vLLM or SGLang, use a model in this process (source: ...), or leave "
        "away the scorers that need them."
    )


def _reply_of(body: Any, request: Request, config: RemoteLLMConfig) -> Reply:
    if body.get("error") is not None:
        raise _refused(body, body["error"], request, config)
    choice = body["choices"][0]
    if choice.get("error") is not None:
        raise _refused(body, choice["error"], request, config)
    ended = _clean(str(choice.get("finish_reason") or "stop"))[:LONGEST_REASON]
    if ended in BROKEN_OFF:
        usage = _billed(body, request, config)
        raise CallError(f"the server broke the answer off ({ended}).", retriable=True, usage=usage)
    text, is_refusal = _said(choice)
    usage = _usage_of(body, request, text, config)
    if isinstance(request.answer, PromptScores):
        tokens = _scores_of(choice, request, config, usage.completion_tokens)
        return Reply(text="", finish_reason="stop", tokens=tokens, usage=usage)
    finish_reason = "refusal" if is_refusal else ended
    return Reply(
        text=None if finish_reason in REFUSED else _plain(text, request),
        finish_reason=finish_reason,
        tokens=_tokens_of(choice.get("logprobs") or {}),
        usage=usage,
    )


def _refused(body: Json, error: object, request: Request, config: RemoteLLMConfig) -> RefusedError:
    return RefusedError.in_answer(error, request, config, _billed(body, request, config))


def _billed(body: object, request: Request, config: RemoteLLMConfig) -> Usage | None:
    """What a body without an answer says that the call cost; null if it does not say."""
    if not isinstance(body, Mapping) or _count(_within(body, "usage"), "prompt_tokens") == 0:
        return None
    return _usage_of(body, request, "", config)


def _is_integer_list(text: str, answer: LabelList | IntegerList) -> bool:
    lo, hi = (answer.lo, answer.hi) if isinstance(answer, IntegerList) else (0, 1)
    try:
        numbers = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(numbers, list)
        and len(numbers) == answer.n
        and all(type(number) is int and lo <= number <= hi for number in numbers)
    )


def _said(choice: Json) -> tuple[str, bool]:
    """The text of a choice, and whether it is a refusal."""
    if "message" not in choice:
        text = choice["text"]
        refusal = None
    else:
        text, refusal = choice["message"].get("content"), choice["message"].get("refusal")
    if text is not None and not isinstance(text, str):
        raise TypeError("content is not text")
    return _clean(text or ""), bool(refusal)


def _plain(text: str, request: Request) -> str:
    """A choice that came as a JSON string, as the option that it stands for."""
    if isinstance(request.answer, Choice) and text.lstrip().startswith('"'):
        try:
            option = json.loads(text)
        except ValueError:
            return text
        return option if isinstance(option, str) else text
    return text


def _scores_of(
    choice: Json, request: Request, config: RemoteLLMConfig, n_written: int
) -> tuple[Token, ...]:
    assert isinstance(request.answer, PromptScores)
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, Mapping) or not logprobs.get("tokens"):
        raise no_prompt_scores(config, "got no log-probabilities")
    tokens = prompt_tokens(
        logprobs, request.prompt or "", request.answer.start, n_written, request.top_logprobs
    )
    if tokens is None:
        raise no_prompt_scores(config, "got log-probabilities, but none of the prompt")
    return tuple(Token(_clean(token.text), token.logprob, _cleaned(token.top)) for token in tokens)


def _tokens_of(logprobs: Json) -> tuple[Token, ...] | None:
    """Tokens in the form of either endpoint."""
    if logprobs.get("content"):
        return tuple(
            Token(
                _clean(item["token"]),
                float(item["logprob"]),
                tuple(
                    (_clean(candidate["token"]), float(candidate["logprob"]))
                    for candidate in item.get("top_logprobs") or ()
                ),
            )
            for item in logprobs["content"]
        )
    if not logprobs.get("tokens"):
        return None
    texts, scores = logprobs["tokens"], logprobs["token_logprobs"]
    tops = logprobs.get("top_logprobs") or [None] * len(texts)
    return tuple(
        Token(_clean(text), float(score), _cleaned(best_of(top, len(top or ()))))
        for text, score, top in zip(texts, scores, tops, strict=True)
    )


def _usage_of(body: Json, request: Request, text: str, config: RemoteLLMConfig) -> Usage:
    usage = _within(body, "usage")
    prompt, completion = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    n_estimated = 0
    if prompt == 0:
        prompt = _estimated_prompt(request)
        completion = completion or estimated_tokens(text)
        n_estimated = prompt + completion
    details = _within(usage, "prompt_tokens_details")
    # The latter is DeepSeek's.
    cached = _count(details, "cached_tokens") or _count(usage, "prompt_cache_hit_tokens")
    cached = min(cached, prompt)
    usd = config.usd_of(prompt, cached, completion)
    if not config.has_price and _is_openrouter(config):
        usd = _number(usage, "cost")  # "the total amount charged to your account"
    return Usage(prompt, cached, completion, usd, n_estimated)


def _within(body: Json, name: str) -> Json:
    """An object of a body; empty if there is none."""
    value = body.get(name)
    return value if isinstance(value, Mapping) else {}


def _count(usage: Json, name: str) -> int:
    return int(_number(usage, name))


def _number(usage: Json, name: str) -> float:
    """A count or an amount; 0 if it is none that can be meant: what was answered counts more."""
    value = usage.get(name)
    return float(value) if isinstance(value, int | float) and 0 <= value < MOST_TOKENS else 0.0


def _estimated_prompt(request: Request) -> int:
    if request.prompt is not None:
        return estimated_tokens(request.prompt)
    return sum(estimated_tokens(m.content) + TOKENS_PER_MESSAGE for m in request.messages)


def _is_openrouter(config: RemoteLLMConfig) -> bool:
    host = urlsplit(config.base_url or "").hostname or ""
    return host == "openrouter.ai" or host.endswith(".openrouter.ai")


def _clean(text: str) -> str:
    """``text`` without lone surrogates, which JSON can carry and UTF-8 cannot."""
    return text.encode("utf-8", errors="replace").decode()


def _cleaned(pairs: Iterable[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    return tuple((_clean(text), logprob) for text, logprob in pairs)
