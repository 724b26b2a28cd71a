"""A model behind a server that the run starts by itself, and starts again if it dies."""

import asyncio
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from autointerp_dagster.adapters.llm.backend import CallError, Reply
from autointerp_dagster.adapters.llm.managed.servers import ManagedServers, program_of
from autointerp_dagster.adapters.llm.remote.backend import OpenAIBackend
from autointerp_dagster.core.config.models import RemoteLLMConfig
from autointerp_dagster.core.llm import Request

LAST_BREATH_S = 2.0
"""How long a server that refuses connections may take to be known as dead."""
BROKEN_OFF_S = 0.1
"""Likewise one that broke off an exchange, or failed in another way."""
POLL_S = 0.05

_NOWHERE = "http://127.0.0.1/v1"
"""Stands for the address of a server that was not started; nothing is sent to it."""


class ManagedBackend:
    """An :class:`OpenAIBackend` whose server is started by the first call.

    A call that fails because the server died starts it again, and is retriable once it answers;
    after too many deaths in a row that is an :class:`LLMError`.
    """

    def __init__(self, config: RemoteLLMConfig, servers: ManagedServers, log_dir: Path) -> None:
        """Describe the model; nothing is started.

        Args:
            config: With a ``serve`` command.
            servers: Those of this process; they outlive the backend.
            log_dir: Where a server's output goes.
        """
        self._config = config
        self._servers = servers
        self._log_dir = log_dir
        self._url = _NOWHERE
        self._server = OpenAIBackend(config.at(_NOWHERE))
        self._dead: list[OpenAIBackend] = []
        """Of servers that ended; calls may still be failing on them."""
        self._starting: asyncio.Future[str] | None = None
        self.identity = self._server.identity
        self.max_in_flight = self._server.max_in_flight

    def __repr__(self) -> str:
        return f"ManagedBackend({self.identity!r})"

    @property
    def capabilities(self) -> Mapping[str, bool] | None:
        """See :class:`~autointerp_dagster.adapters.llm.backend.Backend`."""
        return self._server.capabilities

    def groups(self, requests: Iterable[Request]) -> Iterator[list[Request]]:
        """Each request by itself: the server batches."""
        return self._server.groups(requests)

    async def ask(self, group: Sequence[Request]) -> list[Reply]:
        """See :class:`~autointerp_dagster.adapters.llm.backend.Backend`.

        The first call waits for the server to start, up to ``serve_timeout_s``.
        """
        server = await self._running()
        url = self._url
        try:
            return await server.ask(group)
        except CallError as error:
            if not await self._has_ended(url, error):
                raise
        # Before the failure is told: else the minutes that a start takes would look like minutes
        # in which every call failed.
        await self._running()
        message = f"the server of {self._config.model!r} ended while it was asked; it runs again."
        raise CallError(message, retriable=True)

    async def check(self) -> None:
        """Find out whether the server's program exists and its key is set; starts nothing.

        Raises:
            LLMError: If not.
        """
        program_of(self._config)

    async def close(self) -> None:
        """Give connections back. The server keeps running, for the next step of the run."""
        if self._starting is not None:
            self._starting.cancel()
        for server in (*self._dead, self._server):
            await server.close()

    async def _running(self) -> OpenAIBackend:
        """The server, started if need be."""
        url = self._servers.running_url(self._config)
        if url is None:
            url = await self._start()
        if url != self._url:
            self._dead.append(self._server)
            self._url, self._server = url, OpenAIBackend(self._config.at(url))
        return self._server

    async def _start(self) -> str:
        """The address of a new server; all callers wait for the same start.

        A start that failed is not tried again by this backend.
        """
        if self._starting is None:
            self._starting = asyncio.wrap_future(self._start_in_thread())
            self._starting.add_done_callback(self._forget_success)
        return await asyncio.shield(self._starting)

    def _forget_success(self, started: "asyncio.Future[str]") -> None:
        if not started.cancelled() and started.exception() is None:
            self._starting = None

    def _start_in_thread(self) -> "Future[str]":
        # Not the loop's executor: the interpreter's exit would wait for its threads, and it is
        # the exit that ends a start that nobody wants any more.
        started: Future[str] = Future()

        def start() -> None:
            try:
                url = self._servers.url_of(self._config, self._log_dir)
            except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
                started.set_exception(error)
            else:
                started.set_result(url)

        started.set_running_or_notify_cancel()
        threading.Thread(target=start, name="llm-server", daemon=True).start()
        return started

    async def _has_ended(self, url: str, error: CallError) -> bool:
        """Whether a call to ``url`` failed because the server there ended.

        A closed connection may be noticed before the end of the process is.
        """
        if not error.retriable or error.busy or error.timed_out:
            longest_s = 0.0
        else:
            longest_s = LAST_BREATH_S if error.endpoint else BROKEN_OFF_S
        for _ in range(round(longest_s / POLL_S)):
            if self._servers.running_url(self._config) != url:
                return True
            await asyncio.sleep(POLL_S)
        return self._servers.running_url(self._config) != url
