"""One run of a server's command: its port, its log, its guard."""

import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from autointerp_dagster.adapters.llm.managed import guard as server_guard
from autointerp_dagster.core.errors import LLMError

HOST = "127.0.0.1"
PORTS = range(20_000, 32_768)
"""Below the ports that Linux gives to outgoing connections, one of which could take a port
between its choice and the minute in which a server listens on it."""

LOG_END_BYTES = 16_384


class Port:
    """A free port, claimed against every other process of this package on this machine."""

    def __init__(self) -> None:
        """Choose one.

        Raises:
            LLMError: If none is free.
        """
        lots = random.Random()  # no result depends on a port
        for number in lots.sample(PORTS, 200):
            claim = _claim(number)
            if claim is not None and not is_taken(number):
                self.number = number
                self._claim = claim
                return
            if claim is not None:
                claim.close()
        raise LLMError(
            f"serve: no free port among 200 tried in {PORTS.start} to {PORTS.stop - 1}. "
            "End servers that are not needed, or start one yourself and give its base_url."
        )

    def release(self) -> None:
        """Let others have it."""
        self._claim.close()


def is_taken(port: int) -> bool:
    """Whether a server could not listen on this port of the local host."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


def _claim(port: int) -> socket.socket | None:
    """A claim that ends with this process at the latest; null if another process has it."""
    claim = socket.socket(socket.AF_UNIX)
    if sys.platform == "linux":  # an abstract name: no file, and gone with its last owner
        try:
            claim.bind(f"\0autointerp-port-{port}")
        except OSError:
            claim.close()
            return None
    return claim


class ServerProcess:
    """A server that was started, under a guard that ends it with this process."""

    def __init__(self, command: list[str], port: Port, log: Path, grace_s: float) -> None:
        """Start the command; it may not answer for minutes.

        Args:
            command: Program and arguments.
            port: Where it will listen; released when it is ended.
            log: File that its output is appended to; only its owner can read it.
            grace_s: Seconds between asking it to end and killing it.

        Raises:
            OSError: If the log cannot be written.
        """
        self.port, self.log = port, log
        self._grace_s = grace_s
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._exit_code: int | None = None
        self._has_ended = False
        guard = [sys.executable, "-I", "-S", server_guard.__file__, str(grace_s), str(self._owner)]
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._guard = subprocess.Popen(
                guard + command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                bufsize=0,
                start_new_session=True,  # Ctrl-C is for the run; the guard ends with it
            )
        finally:
            os.close(output)
        assert self._guard.stdin is not None
        assert self._guard.stdout is not None
        self._orders, self._reports = self._guard.stdin, self._guard.stdout
        self._server = int(self._reports.readline() or 0)

    @property
    def exit_code(self) -> int | None:
        """128 + n if signal n ended it; null if it runs, or its guard was killed."""
        return self._exit_code

    def is_running(self) -> bool:
        """Whether the server was neither ended nor ended itself; returns at once."""
        if self._has_ended:  # known without the lock, which ending holds for seconds
            return False
        with self._lock:
            return not self._note_end()

    def end(self) -> None:
        """End the server and everything that it started; return once they are gone."""
        if os.getpid() != self._owner:  # a fork of the owner, to whom the server does not belong
            return
        with self._lock:
            if self._orders.closed:
                return
            self._note_end()
            self._has_ended = True
            with contextlib.suppress(OSError):
                self._orders.write(b"\n")  # a forked child may keep the pipe open
            self._orders.close()
            try:
                code = self._guard.wait(self._grace_s + server_guard.KILL_WAIT_S + 5)
            except subprocess.TimeoutExpired:
                self._guard.kill()
                code = self._guard.wait()
            if code < 0 and self._server > 0:  # the guard was killed and could not do its work
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._server, signal.SIGKILL)
            self._reports.close()
            self.port.release()

    def last_lines(self, n: int) -> list[str]:
        """The last lines of its log that are not blank, oldest first; at most ``n``."""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LOG_END_BYTES))
            text = file.read().decode(errors="replace")
        lines = [line.rstrip() for line in text.splitlines()]
        return [line for line in lines if line][-n:]

    def _note_end(self) -> bool:
        """Whether the guard reported the server's end, or is gone itself."""
        if self._has_ended:
            return True
        poll = select.poll()
        poll.register(self._reports, select.POLLIN)
        if not poll.poll(0):
            return False
        report = self._reports.readline().strip()
        self._exit_code = int(report) if report.isdigit() else None
        self._has_ended = True
        return True
