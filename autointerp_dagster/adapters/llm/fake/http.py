"""Just enough HTTP/1.1 for a fake server: whole requests in, whole or broken responses out.

One event loop in a thread of its own; thousands of requests a second.
"""

import asyncio
import socket
import struct
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import NamedTuple, cast

from autointerp_dagster.adapters.llm.loop import LoopThread

BACKLOG = 1024
"""Connections that may wait to be accepted."""

JSON = "application/json"


class HttpRequest(NamedTuple):
    """One request, wholly received."""

    method: str
    path: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def token(self) -> str:
        """The bearer token; empty without one."""
        return self.headers.get("authorization", "").removeprefix("Bearer ")


Handler = Callable[[HttpRequest, "Connection"], None]
"""Called in the server's thread; it answers at once or later, through the connection."""


class Connection(asyncio.Protocol):
    """One client's connection. Requests that come before an answer is sent are not kept apart."""

    def __init__(self, handle: Handler, opened: "set[Connection]") -> None:
        """Describe a connection.

        Args:
            handle: Told of every request.
            opened: The connection is in this set as long as it is open.
        """
        self._handle = handle
        self._opened = opened
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See :class:`asyncio.Protocol`."""
        self._transport = cast(asyncio.Transport, transport)
        self._opened.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """See :class:`asyncio.Protocol`."""
        self._transport = None
        self._opened.discard(self)

    def data_received(self, data: bytes) -> None:
        """See :class:`asyncio.Protocol`."""
        self._received += data
        while (request := self._next_request()) is not None:
            self._handle(request, self)

    def send(
        self, status: int, content: bytes, headers: Mapping[str, str] | None = None, cut: int = 0
    ) -> None:
        """Send a response; without effect if the client is gone.

        Args:
            status: HTTP status.
            content: The body.
            headers: Besides the length; JSON is the default type.
            cut: So many bytes at the end are announced but not sent, and the connection ends.
        """
        if self._transport is None:
            return
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
        named = {"Content-Type": JSON, "Content-Length": str(len(content)), **(headers or {})}
        lines += [f"{name}: {value}" for name, value in named.items()]
        head = "\r\n".join(lines).encode() + b"\r\n\r\n"
        self._transport.write(head + content[: len(content) - cut])
        if cut:
            self._transport.close()

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        if self._transport is None:
            return
        linger = struct.pack("ii", 1, 0)
        connection: socket.socket = self._transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._transport.abort()

    def _next_request(self) -> HttpRequest | None:
        head_end = self._received.find(b"\r\n\r\n")
        if head_end < 0:
            return None
        first, *lines = self._received[:head_end].decode("latin-1").split("\r\n")
        named = (line.split(":", maxsplit=1) for line in lines)
        headers = {name.lower(): value.strip() for name, value in named}
        body_start = head_end + 4
        body_end = body_start + int(headers.get("content-length", 0))
        if len(self._received) < body_end:
            return None
        body = bytes(self._received[body_start:body_end])
        del self._received[:body_end]
        method, path, _ = first.split(" ", maxsplit=2)
        return HttpRequest(method, path, headers, body)


class HttpServer:
    """Listens on 127.0.0.1 from :meth:`start` to :meth:`stop`."""

    def __init__(self, handle: Handler) -> None:
        self._handle = handle
        self._opened: set[Connection] = set()
        self._loop = LoopThread("fake-llm")
        self._listener: asyncio.Server | None = None

    def start(self, port: int = 0) -> int:
        """Listen, and return the port.

        Args:
            port: 0: any that is free.

        Raises:
            OSError: If the port is taken.
        """
        self._loop.submit(self._listen(port)).result()
        assert self._listener is not None
        return self._listener.sockets[0].getsockname()[1]

    def stop(self) -> None:
        """Reset all connections and end the thread."""
        self._loop.close(self._end())

    async def _listen(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            lambda: Connection(self._handle, self._opened), "127.0.0.1", port, backlog=BACKLOG
        )

    async def _end(self) -> None:
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._opened):
            connection.reset()
        await asyncio.sleep(0)  # lets the transports close their sockets
