"""A small OpenAI-compatible server on this machine, for tests and for trials without a model.

It answers ``/v1/models``, ``/v1/chat/completions`` and ``/v1/completions`` with whatever a Python
function says, and misbehaves on demand. Any other GET is answered too (health checks).

``python -m autointerp_dagster.adapters.llm.fake.server --port 8000`` serves until SIGTERM.
"""

import argparse
import asyncio
import hashlib
import json
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from autointerp_dagster.adapters.llm.fake.faults import Fault, Schedule, SeededFaults, read_rates
from autointerp_dagster.adapters.llm.fake.http import Connection, HttpRequest, HttpServer
from autointerp_dagster.adapters.llm.fake.replies import PrefixCache, Voice, error_body
from autointerp_dagster.adapters.llm.fake.rule_judge import ChatMessages, word_judge

__all__ = ["FakeLLMServer", "Fault", "Schedule", "SeededFaults"]

RETRY_AFTER_S = 0.05
HANG_S = 30.0
"""A hanging request ends with the server, or after this time."""

_MODELS = {"object": "list", "data": [{"id": "fake", "object": "model", "owned_by": "nobody"}]}
_PAGE = b"<html><body>Bad gateway</body></html>"
_STATUSES: dict[Fault, str] = {
    "403": "no credit left",
    "429": "slow down",
    "500": "something broke",
    "503": "overloaded",
}


class FakeLLMServer:
    """Serves inside a ``with`` block, on 127.0.0.1.

    Its functions are called in its thread; one that waits holds up all requests. Every error
    repeats the caller's bearer token, as the worst of servers do.
    """

    def __init__(
        self,
        answer: Callable[[ChatMessages], str],
        *,
        continuation: Callable[[str], str] = lambda _: " and so on",
        faults: Schedule | None = None,
        seeded: SeededFaults | None = None,
        latency_s: Callable[[int], float] | None = None,
        rejects: tuple[str, ...] = (),
        ignores: tuple[str, ...] = (),
        api_key: str | None = None,
        p_answer: float = 0.9,
        has_usage: bool = True,
        caches_prefixes: bool = False,
        port: int = 0,
        log: Path | None = None,
    ) -> None:
        """Describe the server.

        Args:
            answer: From the messages of a chat to the assistant's text.
            continuation: From a plain prompt to what follows it.
            faults: What goes wrong by number of the request; nothing by default.
            seeded: What goes wrong besides, by what is asked.
            latency_s: Seconds before the answer, by number of the request.
            rejects: Body fields that are answered with status 400.
            ignores: Body fields that are accepted and have no effect.
            api_key: Wanted as bearer token; others get status 401.
            p_answer: Probability given to each label answered; the other label gets the rest.
            has_usage: Whether token counts (words) are reported.
            caches_prefixes: Whether cached tokens are reported with them.
            port: To listen on; 0: any that is free.
            log: A file that gets one JSON line per request: its number, the hash of its body, the
                requests then under way (it included), and the fault.
        """
        self._answer = answer
        self._continuation = continuation
        self._faults = faults or (lambda _: None)
        self._seeded = seeded or SeededFaults()
        self._latency_s = latency_s or (lambda _: 0.0)
        self._rejects = rejects
        self._ignores = ignores
        self._api_key = api_key
        self._voice = Voice(p_answer, has_usage, PrefixCache() if caches_prefixes else None)
        self._port = port
        self._log = log
        self._http = HttpServer(self._handle)
        self._base_url: str | None = None
        self.requests: list[dict[str, Any]] = []
        """Bodies of all requests for an answer, in order of arrival."""
        self.n_sent: Counter[str] = Counter()
        """How often each came, by the hash of its body."""
        self.n_faults: Counter[Fault] = Counter()
        """How often each fault happened."""
        self.n_open = 0
        """Requests under way now."""
        self.max_open = 0
        """The most that were under way at once."""

    def __enter__(self) -> Self:
        self._base_url = f"http://127.0.0.1:{self._http.start(self._port)}/v1"
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.stop()

    @property
    def base_url(self) -> str:
        """What goes into ``RemoteLLMConfig.base_url``."""
        if self._base_url is None:
            raise RuntimeError("FakeLLMServer: not started. Use it in a with block.")
        return self._base_url

    def _handle(self, request: HttpRequest, connection: Connection) -> None:
        if request.method == "GET" and self._api_key not in (None, request.token):
            connection.send(401, error_body("Incorrect API key", request.token))
        elif request.method == "GET":
            connection.send(200, json.dumps(_MODELS).encode())
        elif request.path.endswith("/completions"):
            self._take(request, connection)
        else:
            connection.send(404, error_body(f"no such path: {request.path}", request.token))

    def _take(self, request: HttpRequest, connection: Connection) -> None:
        number, body = len(self.requests), json.loads(request.body)
        digest = hashlib.blake2b(request.body, digest_size=8).hexdigest()
        scheduled = self._faults(number)
        fault = scheduled or self._seeded.fault(body, digest, self.n_sent[digest])
        self.requests.append(body)
        self.n_sent[digest] += 1
        self.n_open += 1
        self.max_open = max(self.max_open, self.n_open)
        if fault is not None:
            self.n_faults[fault] += 1
        if self._log is not None:
            self._write_log({"number": number, "call": digest, "fault": fault})
        loop, latency_s = asyncio.get_running_loop(), self._latency_s(number)
        loop.call_later(latency_s, self._respond, request, body, fault, connection)

    def _write_log(self, line: dict[str, Any]) -> None:
        assert self._log is not None
        with self._log.open("a") as file:
            file.write(json.dumps({**line, "n_open": self.n_open}) + "\n")

    def _respond(
        self, request: HttpRequest, body: dict[str, Any], fault: Fault | None, to: Connection
    ) -> None:
        self.n_open -= 1  # before the reply, which lets the client send the next
        if self._api_key is not None and request.token != self._api_key:
            to.send(401, error_body("Incorrect API key", request.token))
            return
        rejected = [name for name in self._rejects if name in body]
        if rejected:
            message = f"Unsupported parameter: {rejected[0]}"
            to.send(400, error_body(message, request.token))
        elif fault in _STATUSES:
            headers = {"Retry-After": str(RETRY_AFTER_S)} if fault == "429" else {}
            to.send(int(fault), error_body(_STATUSES[fault], request.token), headers)
        elif fault == "error_object":
            to.send(200, error_body("upstream failed", request.token))
        else:
            self._send(request, body, fault, to)

    def _send(
        self, request: HttpRequest, body: dict[str, Any], fault: Fault | None, to: Connection
    ) -> None:
        page = {"Content-Type": "text/html"}
        match fault:
            case "reset":
                to.reset()
            case "hang":
                asyncio.get_running_loop().call_later(HANG_S, to.reset)
            case "malformed":
                to.send(200, b'{"choices": [{"message": {"content": "[1')
            case "html" | "html_502":
                to.send(200 if fault == "html" else 502, _PAGE, page)
            case _:
                content = self._completion(request.path, body, fault)
                to.send(200, content, cut=len(content) // 2 if fault == "truncated" else 0)

    def _completion(self, path: str, body: dict[str, Any], fault: Fault | None) -> bytes:
        heard = {name: value for name, value in body.items() if name not in self._ignores}
        if path.endswith("/chat/completions"):
            reply = self._voice.chat(heard, self._answer(body["messages"]), fault)
        else:
            reply = self._voice.text(heard, self._continuation(body["prompt"]), fault)
        return json.dumps(reply).encode()


def main(arguments: list[str]) -> None:
    """Serve until SIGTERM or SIGINT; see ``--help``."""
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # in the server's thread too
    wanted = _parser().parse_args(arguments)
    server = FakeLLMServer(
        word_judge(wanted.seed),
        seeded=SeededFaults(wanted.faults, wanted.seed),
        latency_s=lambda _: wanted.latency_ms / 1000,
        caches_prefixes=True,
        port=wanted.port,
        log=wanted.log,
    )
    with server:
        sys.stderr.write(f"fake language model at {server.base_url}\n")
        signal.sigwait(signals)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fake_server", description="A fake language model.")
    parser.add_argument("--port", type=int, required=True, help="of 127.0.0.1; 0: any")
    parser.add_argument("--latency-ms", type=float, default=50.0, help="before every answer")
    parser.add_argument("--seed", type=int, default=0, help="of labels and faults")
    parser.add_argument("--faults", type=read_rates, default={}, help="e.g. 429:0.05,reset:0.01")
    parser.add_argument("--log", type=Path, help="gets one JSON line per request")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
