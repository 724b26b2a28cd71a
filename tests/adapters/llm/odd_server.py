"""A real HTTP server on this machine whose every response a test writes by hand."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass(frozen=True)
class Response:
    """What is sent back."""

    body: Any = None
    """Bytes and text as they are, all else as JSON."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    n_missing: int = 0
    """Bytes announced and never sent; the connection is closed instead."""
    reset: bool = False
    """Send a TCP reset and nothing else."""
    after_s: float = 0.0

    @property
    def content(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        return (self.body if isinstance(self.body, str) else json.dumps(self.body)).encode()


Answer = Callable[[str, dict[str, Any]], Response]


class OddServer:
    """Serves inside a ``with`` block; ``seen`` are the paths and bodies of all POSTs."""

    def __init__(self, answer: Answer) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []
        odd = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                path = self.path.removeprefix("/v1")
                odd.seen.append((path, body))
                _send(self, answer(path, body))

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client may hang up."""


def _send(handler: BaseHTTPRequestHandler, response: Response) -> None:
    time.sleep(response.after_s)
    if response.reset:
        linger = struct.pack("ii", 1, 0)
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        handler.connection.close()
        handler.close_connection = True
        return
    handler.send_response(response.status)
    for name, value in {"Content-Type": "application/json", **response.headers}.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(response.content) + response.n_missing))
    handler.end_headers()
    handler.wfile.write(response.content)
    handler.close_connection = response.n_missing > 0


def chat(text: str | None, *, usage: Any = None, logprobs: Any = None, **message: Any) -> Response:
    """A chat completion."""
    choice = {"message": {"content": text, **message}, "finish_reason": "stop"}
    return Response({"choices": [choice | {"logprobs": logprobs}], "usage": usage})


def complaint(message: str, status: int = 400, code: str | None = None, **headers: str) -> Response:
    """An error in OpenAI's form."""
    error = {"message": message, "type": "invalid_request_error", "code": code}
    return Response({"error": error}, status, headers)
