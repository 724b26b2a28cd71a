"""Servers that a study starts by itself: ``serve: "vllm serve ... --port {port}"``.

A command is started by the first call that needs it, answers every later one, and ends with this
process, however that ends; see ``guard``.
"""

import atexit
import contextlib
import json
import logging
import os
import re
import shlex
import shutil
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple, Self

from autointerp_dagster.adapters.llm.managed.process import HOST, Port, ServerProcess, is_taken
from autointerp_dagster.core.config.models import RemoteLLMConfig
from autointerp_dagster.core.errors import LLMError

GRACE_S = 10.0
"""Seconds between asking a server to end and killing it."""
MAX_RESTARTS = 3
"""How often in a row a server that died is started again."""
STABLE_S = 3600.0
"""A server that lived this long has used up none of its restarts."""
POLL_S = 0.25
PROBE_TIMEOUT_S = 5.0
PROGRESS_S = 30.0
"""Seconds between two log lines while a server starts."""
N_LOG_LINES = 20
LONGEST_LINE = 300

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Served:
    """What became of one command."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while the server is started, so only one thread starts it."""
    is_closed: threading.Event = field(default_factory=threading.Event)
    process: ServerProcess | None = None
    """As last started."""
    started_at: float = 0.0
    n_restarts: int = 0
    """Since the server was last stable."""

    @property
    def url(self) -> str | None:
        """Address of the running server; null if none runs."""
        process = self.process
        return _url(process) if process is not None and process.is_running() else None


class ManagedServers:
    """The servers of this process, one per command; safe to use from many threads.

    Make one per process. Nothing is started before it is asked for.
    """

    def __init__(
        self,
        *,
        grace_s: float = GRACE_S,
        max_restarts: int = MAX_RESTARTS,
        progress_s: float = PROGRESS_S,
    ) -> None:
        """No servers yet.

        Args:
            grace_s: Seconds between asking a server to end and killing it.
            max_restarts: How often in a row a server that died is started again.
            progress_s: Seconds between two log lines while a server starts.
        """
        self._grace_s = grace_s
        self._max_restarts = max_restarts
        self._progress_s = progress_s
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._served: dict[str, _Served] = {}
        atexit.register(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def url_of(self, config: RemoteLLMConfig, log_dir: Path) -> str:
        """Address (``http://127.0.0.1:PORT/v1``) of the server of ``config.serve``.

        Starts it, or starts it again if it died, and returns once it answers: this may take
        minutes. The same command is the same server, whatever else the configuration says.

        Args:
            config: With a ``serve`` command.
            log_dir: Where a new server's output goes: ``<model>-<port>-<process id>.log``.

        Raises:
            LLMError: If the server does not start, did not answer in time, or died too often.
        """
        command = config.serve or ""
        program_of(config)
        with self._lock:
            served = self._served.setdefault(command, _Served())
        with served.lock:
            url = served.url
            if url is not None:
                return url
            if served.process is not None:
                self._allow_restart(served, served.process, config)
            served.process = self._start(served, config, log_dir)
            served.started_at = time.monotonic()
            return _url(served.process)

    def running_url(self, config: RemoteLLMConfig) -> str | None:
        """Address of the server of ``config.serve`` if it runs now; returns at once."""
        served = self._served.get(config.serve or "")
        return served.url if served is not None else None

    def close(self) -> None:
        """End all servers, also those that are being started. May be called again."""
        if os.getpid() != self._owner:  # a fork of the owner
            return
        with self._lock:
            all_served, self._served = list(self._served.values()), {}
        for served in all_served:
            served.is_closed.set()
        for served in all_served:
            with served.lock:
                if served.process is not None:
                    served.process.end()

    def _allow_restart(self, served: _Served, dead: ServerProcess, config: RemoteLLMConfig) -> None:
        """Clear away a dead server, unless its restarts are used up."""
        if time.monotonic() - served.started_at > STABLE_S:
            served.n_restarts = 0
        dead.end()  # its children may still hold the accelerator's memory
        if served.n_restarts >= self._max_restarts:
            what = f"ended by itself {served.n_restarts + 1} times ({_exit(dead)} at last)"
            raise _failure(config, dead, what)
        served.n_restarts += 1
        logger.warning(
            "the server of %s ended by itself (%s); starting it again (%d of %d times). Log: %s",
            config.model,
            _exit(dead),
            served.n_restarts,
            self._max_restarts,
            dead.log,
        )

    def _start(self, served: _Served, config: RemoteLLMConfig, log_dir: Path) -> ServerProcess:
        """A server that answers; a second port is tried if somebody took the first."""
        deadline = time.monotonic() + config.serve_timeout_s
        for is_last in (False, True):
            process = self._launch(config, log_dir)
            try:
                problem = self._wait(served, process, config, deadline)
                if problem is None:
                    return process
            except BaseException:
                process.end()
                raise
            process.end()
            if is_last or not _lost_its_port(process):
                break
            logger.warning("port %d was taken meanwhile; trying another.", process.port.number)
        raise _failure(config, process, problem)

    def _launch(self, config: RemoteLLMConfig, log_dir: Path) -> ServerProcess:
        port = Port()
        name = re.sub(r"[^\w.-]+", "-", config.model).strip("-.")[:80]
        log = log_dir.absolute() / f"{name}-{port.number}-{os.getpid()}.log"
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            process = ServerProcess(arguments_of(config, port.number), port, log, self._grace_s)
        except OSError as error:
            port.release()
            raise LLMError(f"serve: the server of {config.model!r}: {error}.") from error
        command = _redacted(config, config.serve or "")
        logger.info("starting %s on port %d; its log: %s", command, port.number, log)
        return process

    def _wait(
        self, served: _Served, process: ServerProcess, config: RemoteLLMConfig, deadline: float
    ) -> str | None:
        """Why the server does not answer; null once it does."""
        started = said = time.monotonic()
        while not served.is_closed.wait(POLL_S):
            if not process.is_running():
                return f"ended by itself ({_exit(process)})"
            health = _probe(_url(process), config)
            now = time.monotonic()
            if health.status == 200 and process.is_running():
                logger.info("the server of %s is ready after %.0f s.", config.model, now - started)
                _compare(config, health.models)
                return None
            if health.status in (401, 403):
                return (
                    f"answers HTTP {health.status}: it wants a key, or another one. {_hint(config)}"
                )
            if now > deadline:
                answer = f"HTTP {health.status}" if health.status else "nothing"
                return f"answered {answer} for {config.serve_timeout_s:g} s (serve_timeout_s)"
            if now - said >= self._progress_s:
                said = now
                last = _redacted(config, "".join(process.last_lines(1)))
                logger.info(
                    "waiting for the server of %s (%.0f s): %s", config.model, now - started, last
                )
        return "was told to end while it started"


def program_of(config: RemoteLLMConfig) -> Path:
    """The program that serves a model.

    Raises:
        LLMError: If there is none, or the variable that should hold the key is not set.
    """
    program = arguments_of(config, 0)[0]
    found = shutil.which(program)
    if found is None:
        hint = "Install it, or give its path."
        if "=" in program:
            hint = f"No shell reads the command: write `env {program} ...`."
        raise LLMError(f"serve: {program!r} is not a program on this machine. {hint}")
    name = config.api_key_env
    if name is not None and not os.environ.get(name):
        raise LLMError(
            f"serve: environment variable {name} is not set, wanted the key of the server. "
            f"Set it (export {name}=...) or remove api_key_env from the study."
        )
    return Path(found)


def arguments_of(config: RemoteLLMConfig, port: int) -> list[str]:
    """The command as a program and its arguments, at least one.

    Raises:
        LLMError: If there is no command, or a quotation mark in it is never closed.
    """
    try:
        words = shlex.split(config.serve or "")
    except ValueError as error:
        raise LLMError(f"serve: {error} in {config.serve!r}. Correct the command.") from None
    if not words:
        raise LLMError("serve: got no command, wanted one that starts a server.")
    # Not str.format: arguments may be JSON.
    return [word.replace("{port}", str(port)) for word in words]


class _Health(NamedTuple):
    status: int | None
    """Of the list of models; null if nothing listens."""
    models: tuple[str, ...] = ()


def _probe(url: str, config: RemoteLLMConfig) -> _Health:
    """What the server says when asked for its models."""
    key = _key(config)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"{url}/models", headers=headers)
    # Without the proxies of the environment: the server is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=PROBE_TIMEOUT_S) as response:
            status, content = response.status, response.read()
    except urllib.error.HTTPError as error:
        error.close()
        return _Health(error.code)
    except (OSError, HTTPException):
        return _Health(None)
    names = []
    with contextlib.suppress(ValueError, KeyError, TypeError):  # a server without such a list
        names = [str(model["id"]) for model in json.loads(content)["data"]]
    return _Health(status, tuple(names))


def _compare(config: RemoteLLMConfig, models: tuple[str, ...]) -> None:
    if models and config.model not in models:
        logger.warning(
            "the server knows the models %s, not %r; it may take any name. "
            "If calls fail, correct model in the study, or name it in the command.",
            ", ".join(models),
            config.model,
        )


def _lost_its_port(process: ServerProcess) -> bool:
    said = "\n".join(process.last_lines(N_LOG_LINES)).lower()
    return "address already in use" in said or is_taken(process.port.number)


def _failure(config: RemoteLLMConfig, process: ServerProcess, problem: str) -> LLMError:
    lines = [line[:LONGEST_LINE] for line in process.last_lines(N_LOG_LINES)]
    said = "".join(f"\n  | {line}" for line in lines) or " nothing."
    message = (
        f"serve: the server of {config.model!r} {problem}, wanted an answer at "
        f"{_url(process)}/models. Read its log, correct the command (or serve_timeout_s), and run "
        f"again.\n  command: {config.serve}\n  log: {process.log}\n  It said at last:{said}"
    )
    return LLMError(_redacted(config, message))


def _hint(config: RemoteLLMConfig) -> str:
    if config.api_key_env is None:
        return "Name the key's environment variable in api_key_env"
    return f"Start it with the key in {config.api_key_env}"


def _exit(process: ServerProcess) -> str:
    code = process.exit_code
    if code is None:
        return "exit code unknown: its guard was killed"
    return f"exit code {code}" + (f", killed by signal {code - 128}" if code > 128 else "")


def _url(process: ServerProcess) -> str:
    return f"http://{HOST}:{process.port.number}/v1"


def _key(config: RemoteLLMConfig) -> str | None:
    return os.environ.get(config.api_key_env) if config.api_key_env else None


def _redacted(config: RemoteLLMConfig, text: str) -> str:
    """Without the key, which some servers repeat."""
    key = _key(config)
    return text.replace(key, "<key>") if key else text
