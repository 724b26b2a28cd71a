"""Chat models behind any server that speaks OpenAI's API: vLLM, llama.cpp, OpenRouter, OpenAI.

Retries, limits and the journal live in ``client.JournaledLLM``.
What a server refuses (log-probabilities, JSON schemas, a seed) is left away from then on.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import openai

from autointerp_dagster.adapters.llm.backend import TOO_LONG, CallError, Reply
from autointerp_dagster.adapters.llm.openai_reply import reply_of
from autointerp_dagster.core.config.models import RemoteLLMConfig
from autointerp_dagster.core.errors import LLMError
from autointerp_dagster.core.llm import LabelList, Request

RETRIABLE = frozenset({408, 409, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
ENDPOINT_WIDE = frozenset({401, 403, 404, 405})
"""Codes that say something about the address or the key, if no call ever succeeded."""
CONNECT_TIMEOUT_S = 10.0
LONGEST_RETRY_AFTER_S = 300.0
"""A server that asks for a longer wait is asked again all the same."""

_OPTIONAL = {
    "response_format": ("response_format",),
    "seed": ("seed",),
    "logprobs": ("logprobs", "top_logprobs"),
}
"""Features a server may lack, and the body fields that belong to each; dropped in this order."""
_HINTS = {
    "logprobs": ("logprob",),
    "response_format": ("response_format", "json_schema", "schema", "guided", "structured"),
    "seed": ("seed",),
}
"""Words in a server's complaint that name a feature."""

logger = logging.getLogger(__name__)


class OpenAIBackend:
    """One model of one OpenAI-compatible server. The key never leaves the client."""

    def __init__(self, config: RemoteLLMConfig) -> None:
        """Describe the endpoint; nothing is sent and no key is read yet.

        Raises:
            LLMError: If ``base_url`` carries credentials.
        """
        if config.base_url is None:
            raise LLMError("models: serve: the server was not started. Open the model in a run.")
        if "@" in config.base_url.split("://", maxsplit=1)[1].split("/", maxsplit=1)[0]:
            raise LLMError(
                "base_url: got credentials before the host, wanted an address only. "
                "Put the key into an environment variable and name it in api_key_env."
            )
        self._config = config
        self._url = config.base_url.rstrip("/")
        self.identity = f"{config.endpoint}|{config.model}"
        if not config.structured_outputs:
            self.identity += "|unstructured"
        if config.extra_body:
            self.identity += f"|{json.dumps(config.extra_body, sort_keys=True)}"
        self.max_in_flight = config.max_in_flight
        self._lacks: set[str] = set() if config.structured_outputs else {"response_format"}
        self._client: openai.AsyncOpenAI | None = None

    def __repr__(self) -> str:
        return f"OpenAIBackend({self.identity!r})"

    def groups(self, requests: Iterable[Request]) -> Iterator[list[Request]]:
        """Each request by itself: the server batches."""
        return ([request] for request in requests)

    async def ask(self, group: Sequence[Request]) -> list[Reply]:
        """See :class:`~autointerp_dagster.adapters.llm.backend.Backend`."""
        return [await self._ask_one(request) for request in group]

    async def check(self) -> None:
        """See :class:`~autointerp_dagster.adapters.llm.backend.Backend`; asks for the models."""
        try:
            await self._connected().models.list()
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):  # others say no more than: no such listing
                raise LLMError(str(self._status_error(error))) from None
        except openai.APIConnectionError as error:
            raise LLMError(str(self._connection_error(error))) from None
        except (openai.OpenAIError, ValueError):
            logger.info("%s: answers, though not with a list of models", self._url)

    async def close(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def _ask_one(self, request: Request) -> Reply:
        """Ask; where the server rejects the body, without its optional features, one by one."""
        lacks = set(self._lacks)
        while True:
            body = self._body(request, lacks)
            try:
                content = await self._send(body)
            except openai.APIStatusError as error:
                if error.code == "content_filter":
                    return Reply(text=None, finish_reason="content_filter")
                if _is_too_long(error):
                    return Reply(text=None, finish_reason=TOO_LONG)
                feature = _to_drop(error, body)
                if feature is None:
                    raise self._status_error(error) from None
                lacks.add(feature)
            except openai.APIConnectionError as error:
                raise self._connection_error(error) from None
            except (openai.OpenAIError, OSError) as error:
                raise CallError(f"{self._url}: {self._redacted(error)}", retriable=True) from None
            else:
                self._remember(lacks)
                return self._read(content)

    def _body(self, request: Request, lacks: set[str]) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._config.model,
            "messages": [{"role": m.role, "content": m.content} for m in request.messages],
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
        }
        if request.seed is not None:
            body["seed"] = request.seed
        if request.top_logprobs > 0:
            body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        if isinstance(request.answer, LabelList):
            schema = {"name": "labels", "strict": True, "schema": request.answer.json_schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        for feature in lacks:
            for name in _OPTIONAL[feature]:
                body.pop(name, None)
        return body

    async def _send(self, body: dict[str, Any]) -> bytes:
        # The raw response: servers deviate from the official models, and parsing them costs time.
        raw = await self._connected().chat.completions.with_raw_response.create(
            **body, extra_body=self._config.extra_body
        )
        return raw.http_response.content

    def _connected(self) -> openai.AsyncOpenAI:
        if self._client is None:
            timeout_s = self._config.timeout_s
            self._client = openai.AsyncOpenAI(
                base_url=self._url,
                api_key=self._key() or "none",  # else the client would take OPENAI_API_KEY
                timeout=openai.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
                max_retries=0,
            )
        return self._client

    def _key(self) -> str | None:
        """The key, read from the environment.

        Raises:
            LLMError: If the variable that should hold it is not set.
        """
        name = self._config.api_key_env
        if name is None:
            return None
        key = os.environ.get(name)
        if not key:
            raise LLMError(
                f"{self._url}: environment variable {name} is not set, wanted the API key. "
                f"Set it (export {name}=...) or remove api_key_env from the study."
            )
        return key

    def _read(self, content: bytes) -> Reply:
        try:
            return reply_of(json.loads(content), self._config)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            # Not quoted: the answer may hold anything.
            raise CallError(
                f"{self._url}: the answer is not a chat completion ({type(error).__name__}).",
                retriable=True,
            ) from None

    def _remember(self, lacks: set[str]) -> None:
        for feature in lacks - self._lacks:
            logger.warning("%s does not support %s; going on without.", self.identity, feature)
        self._lacks |= lacks

    def _status_error(self, error: openai.APIStatusError) -> CallError:
        code = error.status_code
        message = f"{self._url}: HTTP {code} for model {self._config.model!r}: "
        message += self._redacted(error)[:500]
        if code in (401, 403):
            name = self._config.api_key_env
            hint = "Name the key's environment variable in api_key_env."
            message += f" Check the key in {name}." if name else f" {hint}"
        elif code in ENDPOINT_WIDE:
            message += " Check base_url (it ends in /v1) and the model's name."
        return CallError(
            message,
            retriable=code in RETRIABLE or code >= 500,
            endpoint=code in ENDPOINT_WIDE,
            retry_after_s=_retry_after_s(error),
        )

    def _connection_error(self, error: openai.APIConnectionError) -> CallError:
        cause = type(error.__cause__).__name__
        if cause in ("ConnectError", "ConnectTimeout"):  # of httpx, or of its successor
            message = (
                f"{self._url}: nothing answers ({cause}), wanted a server for model "
                f"{self._config.model!r}. Start one, e.g. `vllm serve {self._config.model} "
                "--port 8000`, or correct base_url."
            )
            return CallError(message, retriable=True, endpoint=True)
        return CallError(f"{self._url}: {cause}: {self._redacted(error)}", retriable=True)

    def _redacted(self, error: Exception) -> str:
        """The error's text without the key, which some servers repeat."""
        name = self._config.api_key_env
        key = os.environ.get(name) if name else None
        return str(error).replace(key, "<key>") if key else str(error)


def _is_too_long(error: openai.APIStatusError) -> bool:
    """Whether the server says, by code or in words, that the prompt does not fit."""
    if error.status_code not in (400, 413, 422):
        return False
    complaint = str(error).lower()
    return error.code == "context_length_exceeded" or "context length" in complaint


def _to_drop(error: openai.APIStatusError, body: dict[str, Any]) -> str | None:
    """The feature to try without after a rejected body; null if none is left to blame."""
    if error.status_code not in (400, 422):
        return None
    sent = [feature for feature, names in _OPTIONAL.items() if names[0] in body]
    complaint = str(error).lower()
    named = [feature for feature in sent if any(word in complaint for word in _HINTS[feature])]
    return next(iter(named or sent), None)


def _retry_after_s(error: openai.APIStatusError) -> float | None:
    """Seconds from a Retry-After header; null without one or for a date."""
    value = error.response.headers.get("retry-after", "")
    try:
        return min(LONGEST_RETRY_AFTER_S, max(0.0, float(value)))
    except ValueError:
        return None
