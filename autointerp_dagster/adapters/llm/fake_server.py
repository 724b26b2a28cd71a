"""A small OpenAI-compatible server on this machine, for tests and for trials without a model.

It answers ``/v1/models`` and ``/v1/chat/completions`` with whatever a Python function says, and
misbehaves on demand: too many requests, server errors, resets, hangs, answers in a wrong format.
"""

import json
import math
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self

from autointerp_dagster.adapters.llm.rule_judge import ChatMessages

Fault = Literal[
    "403", "429", "500", "reset", "hang", "malformed", "html", "prose", "short", "refusal"
]
"""``malformed``: not JSON; ``prose``: an answer without a list; ``short``: one label too few."""

Schedule = Callable[[int], Fault | None]
"""From the number of a request (0, 1, ... in order of arrival) to what goes wrong with it."""

RETRY_AFTER_S = 0.05
HANG_S = 30.0
"""A hanging request ends with the server, or after this time."""


class FakeLLMServer:
    """Serves inside a ``with`` block, on a free port of 127.0.0.1."""

    def __init__(
        self,
        answer: Callable[[ChatMessages], str],
        *,
        faults: Schedule | None = None,
        latency_s: Callable[[int], float] | None = None,
        rejects: tuple[str, ...] = (),
        api_key: str | None = None,
        p_answer: float = 0.9,
    ) -> None:
        """Describe the server.

        Args:
            answer: From the messages of a chat to the assistant's text.
            faults: What goes wrong; nothing by default.
            latency_s: Seconds before the answer, by number of the request.
            rejects: Body fields that are answered with status 400.
            api_key: Wanted as bearer token; others get status 401 (which repeats their token).
            p_answer: Probability given to each label answered; the other label gets the rest.
        """
        self._answer = answer
        self._faults = faults or (lambda _: None)
        self._latency_s = latency_s or (lambda _: 0.0)
        self._rejects = rejects
        self._api_key = api_key
        self._p_answer = p_answer
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._server: _Server | None = None
        self._n_open = 0
        self.requests: list[dict[str, Any]] = []
        """Bodies of all chat requests, in order of arrival."""
        self.max_open = 0
        """The most chat requests that were under way at once."""

    def __enter__(self) -> Self:
        self._server = _Server(("127.0.0.1", 0), _handler_for(self))
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    @property
    def base_url(self) -> str:
        """What goes into ``RemoteLLMConfig.base_url``."""
        if self._server is None:
            raise RuntimeError("FakeLLMServer: not started. Use it in a with block.")
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def respond(self, handler: "_Handler", body: dict[str, Any]) -> None:
        """Answer one chat request through ``handler``, or misbehave."""
        if self._end.is_set():  # a connection that was kept alive
            handler.reset()
            return
        with self._lock:
            number = len(self.requests)
            self.requests.append(body)
            self._n_open += 1
            self.max_open = max(self.max_open, self._n_open)
        try:
            time.sleep(self._latency_s(number))
            refusal = self._refusal(handler, body)
        finally:
            with self._lock:
                self._n_open -= 1  # before the reply, which lets the client send the next
        if refusal is not None:
            handler.send(*refusal)
        else:
            self._send(handler, body, self._faults(number))

    def _refusal(self, handler: "_Handler", body: dict[str, Any]) -> tuple[int, str] | None:
        token = handler.headers.get("Authorization", "").removeprefix("Bearer ")
        if self._api_key is not None and token != self._api_key:
            return 401, _error(f"Incorrect API key provided: {token}")
        rejected = [name for name in self._rejects if name in body]
        return (400, _error(f"Unsupported parameter: {rejected[0]}")) if rejected else None

    def _send(self, handler: "_Handler", body: dict[str, Any], fault: Fault | None) -> None:
        if fault == "403":
            handler.send(403, _error("no credit left"))
        elif fault == "429":
            handler.send(429, _error("slow down"), {"Retry-After": str(RETRY_AFTER_S)})
        elif fault == "500":
            handler.send(500, _error("something broke"))
        elif fault == "reset":
            handler.reset()
        elif fault == "hang":
            self._end.wait(HANG_S)
            handler.close_connection = True
        elif fault == "malformed":
            handler.send(200, '{"choices": [{"message": {"content": "[1')
        elif fault == "html":
            handler.send(200, "<html>Bad gateway</html>", {"Content-Type": "text/html"})
        else:
            handler.send(200, json.dumps(self._completion(body, fault)))

    def _completion(self, body: dict[str, Any], fault: Fault | None) -> dict[str, Any]:
        text = self._answer(body["messages"])
        if fault == "prose":
            text = "I would say that the first text fits best."
        elif fault == "short":
            text = json.dumps(json.loads(text)[:-1])
        message = {"role": "assistant", "content": text}
        if fault == "refusal":
            message = {"role": "assistant", "content": None, "refusal": "I cannot help with that."}
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": "stop"}
        tokens = re.findall(r"[01]|[^01]+", text)[: body.get("max_tokens")]
        if message["content"] is not None:
            message["content"] = "".join(tokens)
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [self._logprobs(token) for token in tokens]}
        n_prompt = sum(len(turn["content"].split()) for turn in body["messages"])
        usage = {"prompt_tokens": n_prompt, "completion_tokens": len(tokens)}
        return {
            "id": "chatcmpl-fake",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [choice],
            "usage": {**usage, "total_tokens": n_prompt + len(tokens)},
        }

    def _logprobs(self, token: str) -> dict[str, Any]:
        if token not in ("0", "1"):
            return {"token": token, "logprob": 0.0, "top_logprobs": []}
        other = "1" if token == "0" else "0"
        chosen = {"token": token, "logprob": _log(self._p_answer)}
        declined = {"token": other, "logprob": _log(1 - self._p_answer)}
        return {**chosen, "top_logprobs": [chosen, declined]}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients of a misbehaving server hang up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fake: FakeLLMServer

    def do_GET(self) -> None:
        """The list of models."""
        models = [{"id": "fake", "object": "model", "created": 0, "owned_by": "nobody"}]
        self.send(200, json.dumps({"object": "list", "data": models}))

    def do_POST(self) -> None:
        """A chat completion."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("/chat/completions"):
            self.fake.respond(self, body)
        else:
            self.send(404, _error(f"no such path: {self.path}"))

    def send(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        """Send a whole response."""
        content = text.encode()
        headers = {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def _handler_for(fake: FakeLLMServer) -> type[_Handler]:
    return type("_BoundHandler", (_Handler,), {"fake": fake})


def _error(message: str) -> str:
    return json.dumps({"error": {"message": message, "type": "fake", "code": None}})


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -9999.0
