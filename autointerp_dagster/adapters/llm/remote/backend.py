"""Models behind any server that speaks OpenAI's API: vLLM, SGLang, llama.cpp, OpenRouter, OpenAI.

Retries, limits and the journal live in ``client.JournaledLLM``. What a server refuses
(log-probabilities, JSON schemas, a seed) is left away from then on; see ``capabilities``.
"""

import asyncio
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import httpx2
import jiter
import openai

from autointerp_dagster.adapters.llm.backend import CallError, Reply
from autointerp_dagster.adapters.llm.remote import errors
from autointerp_dagster.adapters.llm.remote.body import STRUCTURED, Feature, body_of, features_in
from autointerp_dagster.adapters.llm.remote.capabilities import Learnt
from autointerp_dagster.adapters.llm.remote.prompt_tokens import looks_shifted
from autointerp_dagster.adapters.llm.remote.reply import no_prompt_scores, reply_of
from autointerp_dagster.adapters.llm.remote.transport import (
    cause_of,
    http_pools,
    is_unreachable,
    transport_errors,
)
from autointerp_dagster.core.config.models import RemoteLLMConfig
from autointerp_dagster.core.errors import LLMError
from autointerp_dagster.core.llm import JournalBlock, PromptScores, Request, Usage

CHECK_TIMEOUT_S = 20.0
"""How long a check waits for the list of models; connecting must be done in half of it."""

_SHIFTED = (
    "gives each token the log-probability of the place after it (llama_cpp.server does so unless "
    "the text starts with the model's beginning-of-sequence token)"
)
_EASY_TEXT = (
    "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, Monday, Tuesday, Wednesday"
)
_PROBE = Request(
    messages=(),
    prompt=_EASY_TEXT,
    answer=PromptScores(start=1),
    unit="probe",
    block=JournalBlock("probe", "", 0),
    top_logprobs=1,
)
"""Twenty tokens, asked once before the first prompt is scored, and paid besides."""

logger = logging.getLogger(__name__)


class OpenAIBackend:
    """One model of one OpenAI-compatible server. The key never leaves the client."""

    def __init__(self, config: RemoteLLMConfig) -> None:
        """Describe the endpoint; nothing is sent and no key is read yet.

        Raises:
            LLMError: If a server to start was not started.
        """
        if config.base_url is None:
            raise LLMError("models: serve: the server was not started. Open the model in a run.")
        self._config = config
        self._url = config.base_url.rstrip("/")
        self.identity = f"{config.endpoint}|{config.model}"
        if not config.structured_outputs:
            self.identity += "|unstructured"
        if config.extra_body:
            self.identity += f"|{json.dumps(config.extra_body, sort_keys=True)}"
        self.max_in_flight = config.max_in_flight
        self._learnt = Learnt(self.identity, () if config.structured_outputs else STRUCTURED)
        self._probing = asyncio.Lock()
        self._client: openai.AsyncOpenAI | None = None
        self._pools: tuple[httpx2.AsyncClient, ...] = ()
        self._turns = count()
        self._headers = httpx2.Headers()
        self._has_answered = False
        self._wrong_key: LLMError | None = None

    def __repr__(self) -> str:
        return f"OpenAIBackend({self.identity!r})"

    @property
    def capabilities(self) -> Mapping[str, bool] | None:
        """See :class:`~autointerp_dagster.adapters.llm.backend.Backend`."""
        return self._learnt.capabilities.to_json() or None

    def groups(self, requests: Iterable[Request]) -> Iterator[list[Request]]:
        """Each request by itself: the server batches."""
        return ([request] for request in requests)

    async def ask(self, group: Sequence[Request]) -> list[Reply]:
        """See :class:`~autointerp_dagster.adapters.llm.backend.Backend`."""
        return [await self._ask_one(request) for request in group]

    async def check(self) -> None:
        """See :class:`~autointerp_dagster.adapters.llm.backend.Backend`; asks for the models.

        Some servers, OpenRouter among them, list their models whatever the key. So a key that was
        refused by a call (401), and never taken before, is known to be wrong.
        """
        if self._wrong_key is not None:
            raise self._wrong_key
        try:
            async with asyncio.timeout(min(self._config.timeout_s, CHECK_TIMEOUT_S)):
                await self._connected().models.list()
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):  # others say no more than: no such listing
                refused = errors.RefusedError.of_response(error.response, None, self._config)
                raise LLMError(str(self._refusal_error(refused))) from None
        except openai.APIConnectionError as error:
            raise LLMError(str(self._transport_error(error))) from None
        except (*transport_errors(), TimeoutError, ValueError):
            # A busy server may be long about its list, and some have none.
            logger.info("%s: answers, though not with a list of models", self._url)

    async def close(self) -> None:
        """Close the connections."""
        self._client, pools, self._pools = None, self._pools, ()
        for pool in pools:
            await pool.aclose()

    async def _ask_one(self, request: Request) -> Reply:
        if isinstance(request.answer, PromptScores):
            return await self._score(request)
        features = features_in(body_of(request, self._config, self._learnt.lacks)[1])
        if self._learnt.knows(features):
            return await self._exchange(request)
        async with self._learnt.trial(features):
            return await self._exchange(request)

    async def _score(self, request: Request) -> Reply:
        """The log-probabilities of a prompt, from a server that was seen to give the right ones."""
        async with self._probing:
            if self._learnt.prompt_scores is None:
                await self._probe()
        reply = await self._exchange(replace(request, top_logprobs=max(1, request.top_logprobs)))
        if not self._learnt.prompt_scores and not _is_in_place(reply):
            raise no_prompt_scores(self._config, _SHIFTED)
        if request.top_logprobs > 0 or reply.tokens is None:
            return reply
        return replace(reply, tokens=tuple(replace(token, top=()) for token in reply.tokens))

    async def _probe(self) -> None:
        """Score a text that is easy to guess.

        Raises:
            LLMError: If the server gives no log-probabilities of a prompt.
        """
        try:
            reply = await self._exchange(_PROBE)
        except LLMError:
            self._learnt.prompt_scores = False
            raise
        self._learnt.prompt_scores = not looks_shifted(reply.tokens or ())
        if not self._learnt.prompt_scores:
            logger.warning("%s %s.", self.identity, _SHIFTED)

    async def _exchange(self, request: Request) -> Reply:
        """Ask; where the server rejects the body, without its optional features, one by one."""
        lacks: set[Feature] = set(self._learnt.lacks)
        while True:
            path, body = body_of(request, self._config, lacks)
            try:
                reply = self._read(await self._send(path, body, request), request)
            except errors.RefusedError as refused:
                declined = errors.declined(refused)
                if declined is not None:
                    return declined
                lacks |= self._to_drop(refused, request, body)
            except (TimeoutError, *transport_errors()) as error:
                raise self._transport_error(error) from None
            else:
                self._learn(request, reply, body, lacks)
                return reply

    def _learn(
        self, request: Request, reply: Reply, body: dict[str, Any], lacks: set[Feature]
    ) -> None:
        self._has_answered, self._wrong_key = True, None
        features = features_in(body)
        self._learnt.refused(lacks)
        self._learnt.took(request, features)
        if not isinstance(request.answer, PromptScores):
            self._learnt.answered(request, reply, features)

    def _to_drop(
        self, refused: errors.RefusedError, request: Request, body: dict[str, Any]
    ) -> frozenset[Feature]:
        """What to try without; at least one feature.

        Raises:
            CallError: If nothing is left to blame.
            LLMError: If no call can succeed.
        """
        features = errors.to_drop(refused, body, self._learnt.taken_with(request))
        is_score = isinstance(request.answer, PromptScores)
        if features and not (is_score and "logprobs" in features):
            return features
        failure = self._refusal_error(refused)
        if refused.status == 401 and not self._has_answered:
            self._wrong_key = LLMError(str(failure))
        if not is_score or isinstance(failure, LLMError) or refused.status in (401, 403):
            raise failure from None
        # A server that gave scores before lacks nothing, unless it says so.
        if not features and (failure.retriable or self._learnt.prompt_scores):
            raise failure from None
        raise no_prompt_scores(self._config, f"got {failure}") from None

    async def _send(self, path: str, body: dict[str, Any], request: Request) -> bytes:
        # The official client's transport, headers and key, but not its typed methods and options:
        # those take more CPU time than everything else that is done for a request.
        client = self._connected()
        http = self._pools[next(self._turns) % len(self._pools)]
        if not self._headers:
            given = {**client.default_headers, **client.auth_headers}
            self._headers = httpx2.Headers({k: v for k, v in given.items() if isinstance(v, str)})
        post = httpx2.Request(
            "POST", self._url + path, headers=self._headers, content=json.dumps(body).encode()
        )
        async with asyncio.timeout(self._config.timeout_s):
            response = await http.send(post)
        if response.status_code >= 400:
            raise errors.RefusedError.of_response(response, request, self._config)
        return response.content

    def _connected(self) -> openai.AsyncOpenAI:
        if self._client is None:
            key = self._key() or "none"  # else the client would take OPENAI_API_KEY
            self._pools = http_pools(self._config.timeout_s, self.max_in_flight)
            self._client = openai.AsyncOpenAI(
                base_url=self._url, api_key=key, max_retries=0, http_client=self._pools[0]
            )
        return self._client

    def _key(self) -> str | None:
        """The key, read from the environment.

        Raises:
            LLMError: If the variable that should hold it is not set, or holds what is no key.
        """
        name = self._config.api_key_env
        if name is None:
            return None
        key = os.environ.get(name, "").strip()  # a line read from a file ends with its newline
        if not key:
            raise LLMError(
                f"{self._url}: environment variable {name} is not set, wanted the API key. "
                f"Set it (export {name}=...) or remove api_key_env from the study."
            )
        if not (key.isascii() and key.isprintable()):
            raise LLMError(
                f"{self._url}: environment variable {name} holds characters that no HTTP header "
                "can carry, wanted the API key (printable ASCII). Set it again: the key may have "
                "been copied with a typographic quote or with several lines."
            )
        return key

    def _read(self, content: bytes, request: Request) -> Reply:
        try:
            return reply_of(_decoded(content), request, self._config)
        except CallError as error:
            raise CallError(
                f"{self._url}: {error}", retriable=error.retriable, usage=error.usage
            ) from None

    def _refusal_error(self, refused: errors.RefusedError) -> CallError | LLMError:
        return errors.error_of(refused, self._config, self._redacted(refused.words))

    def _transport_error(self, error: BaseException) -> CallError:
        cause = cause_of(error)
        if is_unreachable(error):
            message = (
                f"{self._url}: nothing answers ({cause}), wanted a server for model "
                f"{self._config.model!r}. Start one, e.g. `vllm serve {self._config.model} "
                "--port 8000`, or correct base_url."
            )
            return CallError(message, retriable=True, endpoint=True, usage=Usage())
        if isinstance(error, TimeoutError):
            message = f"{self._url}: no whole answer within {self._config.timeout_s:g} s."
            return CallError(message, retriable=True, timed_out=True)
        return CallError(f"{self._url}: the exchange broke off ({cause}).", retriable=True)

    def _redacted(self, text: str) -> str:
        """A text of the server's without the key, which some servers repeat."""
        name = self._config.api_key_env
        key = os.environ.get(name, "").strip() if name else None
        return text.replace(key, "<key>") if key else text


def _decoded(content: bytes) -> Any:
    """A body as JSON; a fifth of a request's CPU time goes here if the standard library reads it.

    Raises:
        CallError: If it is no JSON.
    """
    try:
        return jiter.from_json(content)
    except ValueError:  # perhaps only over half a character, which the standard library takes
        pass
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CallError(
            f"the answer is not JSON ({type(error).__name__}).", retriable=True
        ) from None


def _is_in_place(reply: Reply) -> bool:
    """Whether the most probable candidates show that each token has its own log-probability."""
    tokens = reply.tokens or ()
    own = sum(bool(token.top) and token.top[0][0] == token.text for token in tokens)
    return own > 0 and not looks_shifted(tokens)
