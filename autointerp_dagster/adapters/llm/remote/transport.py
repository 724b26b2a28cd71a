"""The HTTP client below the official one: aiohttp where it is installed, else httpx.

Both take proxies (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY) and certificates (SSL_CERT_FILE,
SSL_CERT_DIR) from the environment through httpx, and so alike.
"""

from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai

CONNECT_TIMEOUT_S = 10.0
KEEP_ALIVE_S = 4.0
"""Idle connections are given up before uvicorn's 5 s, which would meet a request with a reset."""
POOLS = 4
"""Over httpx, where many requests are in flight."""
MAX_BODY_BYTES = 64 * 2**20
"""A response that is longer is a fault, not an answer."""

_UNREACHABLE = frozenset({"ConnectError", "ConnectTimeout"})
"""httpx's errors of a connection that was never made."""
_AIOHTTP_UNREACHABLE = frozenset({"ClientConnectorError", "ConnectionTimeoutError"})
"""aiohttp's; its adapter to httpx calls resets, too, a ``ConnectTimeout``."""


class BodyTooLongError(httpx2.ReadError):
    """A response of more than ``MAX_BODY_BYTES``."""


def http_pools(timeout_s: float, max_in_flight: int) -> tuple[httpx2.AsyncClient, ...]:
    """Clients to be used in turns; each has room for all requests in flight.

    One over aiohttp. Several over httpx, which looks at every idle connection of a pool whenever it
    sends a request: small pools take a tenth less CPU time per request.
    """
    first = http_client(timeout_s, max_in_flight)
    if not isinstance(first, openai.DefaultAsyncHttpxClient):
        return (first,)
    n_more = min(POOLS, -(-max_in_flight // POOLS)) - 1
    return (first, *(http_client(timeout_s, max_in_flight) for _ in range(n_more)))


def http_client(timeout_s: float, max_in_flight: int) -> httpx2.AsyncClient:
    """A client with a connection for each request in flight.

    Only connecting is timed; whoever sends a request bounds the time of the whole.

    Args:
        timeout_s: Of a whole call; connecting may take half of it, at most ``CONNECT_TIMEOUT_S``.
        max_in_flight: Connections at most.
    """
    settings: dict[str, Any] = {
        "timeout": httpx2.Timeout(None, connect=min(timeout_s / 2, CONNECT_TIMEOUT_S)),
        "limits": httpx2.Limits(
            max_connections=max_in_flight,
            max_keepalive_connections=max_in_flight,
            keepalive_expiry=KEEP_ALIVE_S,
        ),
        "event_hooks": {"response": [_bound]},
    }
    try:
        return openai.DefaultAioHttpClient(**settings)
    except RuntimeError:  # the extra openai[aiohttp] is not installed
        return openai.DefaultAsyncHttpxClient(**settings)


def transport_errors() -> tuple[type[Exception], ...]:
    """What a failed exchange may raise; some of aiohttp's errors pass through both layers above."""
    errors = (openai.OpenAIError, httpx2.HTTPError, httpx2.StreamError, OSError)
    try:
        import aiohttp
    except ImportError:
        return errors
    return (*errors, aiohttp.ClientError)


def cause_of(error: BaseException) -> str:
    """The name of the error at the root, as far as a library named it: no text, so no secrets."""
    named = [link for link in _chain(error) if not isinstance(link, openai.OpenAIError)]
    theirs = [link for link in named if type(link).__module__.startswith("aiohttp")]
    return type((theirs or named or [error])[0]).__name__


def is_unreachable(error: BaseException) -> bool:
    """Whether no connection was made at all."""
    chain = _chain(error)
    if any(type(link).__module__.startswith("aiohttp") for link in chain):
        return any(_AIOHTTP_UNREACHABLE & _names(link) for link in chain)
    return any(_UNREACHABLE & _names(link) for link in chain)


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return chain


async def _bound(response: httpx2.Response) -> None:
    """Make a response end with an error once it is too long."""
    stream = response.stream
    if isinstance(stream, httpx2.AsyncByteStream):
        response.stream = _BoundedStream(stream)


class _BoundedStream(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        n_bytes = 0
        async for chunk in self._stream:
            n_bytes += len(chunk)
            if n_bytes > MAX_BODY_BYTES:
                raise BodyTooLongError(f"more than {MAX_BODY_BYTES} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()
