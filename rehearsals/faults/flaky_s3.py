"""An S3 service on loopback that is slow, breaks off, or fails: moto behind a small proxy."""

import http.client
import importlib.util
import logging
import random
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self

_WANTED = ("moto", "s3fs", "flask")
_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive", "date", "server"}
_ERROR = '<?xml version="1.0"?><Error><Code>{}</Code><Message>A rehearsal.</Message></Error>'
_NO_LINGER = struct.pack("ii", 1, 0)

Fault = Literal["500", "503", "reset before", "reset after", "cut"]
"""An error; a connection that is reset before or after the request was served; half a body."""
_FAULTS: tuple[Fault, ...] = ("500", "503", "reset before", "reset after", "cut")
_CODES = {"500": "InternalError", "503": "SlowDown"}


def missing_packages() -> list[str]:
    """Those of the packages that this needs which are not installed."""
    return [name for name in _WANTED if importlib.util.find_spec(name) is None]


@dataclass(frozen=True)
class Weather:
    """What happens to requests."""

    delay_s: float = 0.0
    """Before each answer."""
    p_fault: float = 0.0
    """Chance of a fault, each kind as likely as the others."""


class FlakyS3:
    """The service. A context manager."""

    def __init__(self, rng: random.Random) -> None:
        """Describes it; ``rng`` draws the faults."""
        self.weather = Weather()
        self.n_requests = 0
        self.n_faults: Counter[Fault] = Counter()
        self._rng = rng
        self._lock = threading.Lock()
        self._server: Any = None
        self._proxy: ThreadingHTTPServer | None = None

    def __enter__(self) -> Self:
        """Serves from now on."""
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self._behind = self._server.get_host_and_port()
        handler = type("Handler", (_Handler,), {"service": self})
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._proxy.daemon_threads = True
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends both servers."""
        assert self._proxy is not None
        self._proxy.shutdown()
        self._server.stop()

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process use it."""
        assert self._proxy is not None
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._proxy.server_address[1]}",
            "AWS_ACCESS_KEY_ID": "rehearsal",
            "AWS_SECRET_ACCESS_KEY": "rehearsal",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def bucket(self, name: str) -> str:
        """The address of a new store."""
        connection = http.client.HTTPConnection(*self._behind)
        connection.request("PUT", f"/rehearsal-{name}")
        connection.getresponse().read()
        return f"s3://rehearsal-{name}/store"

    def fault(self) -> Fault | None:
        """What goes wrong with the next request."""
        with self._lock:
            self.n_requests += 1
            if self._rng.random() >= self.weather.p_fault:
                return None
            fault = self._rng.choice(_FAULTS)
            self.n_faults[fault] += 1
            return fault

    def forward(self, method: str, path: str, headers: Any, body: bytes) -> Any:
        """The answer of the real service: status, headers, content."""
        connection = http.client.HTTPConnection(*self._behind, timeout=60)
        try:
            connection.request(method, path, body or None, dict(headers))
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


class _Handler(BaseHTTPRequestHandler):
    service: FlakyS3
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        body = self._body()
        fault = self.service.fault()
        time.sleep(self.service.weather.delay_s)
        if fault in _CODES:
            told = _ERROR.format(_CODES[fault]).encode()
            self._answer(int(fault), [("Content-Type", "application/xml")], told)
            return
        if fault == "reset before":
            self._reset()
            return
        status, headers, content = self.service.forward(
            self.command, self.path, self.headers.items(), body
        )
        if fault == "reset after":
            self._reset()
            return
        self._answer(status, headers, content, is_cut=fault == "cut")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            del self.headers["Transfer-Encoding"]
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(
        self, status: int, headers: list[tuple[str, str]], content: bytes, is_cut: bool = False
    ) -> None:
        self.send_response_only(status)
        length = str(len(content))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            if name.lower() not in _HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if is_cut else content)
        if is_cut:
            self._reset()
