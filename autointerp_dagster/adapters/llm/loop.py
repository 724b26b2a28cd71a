"""An asyncio event loop in a thread of its own, for callers that are not asynchronous."""

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE_S = 10.0
"""How long cancelled tasks, and then the last one, may take at the end."""

logger = logging.getLogger(__name__)


class LoopThread:
    """Runs what it is given in a background thread, which is started by the first of it."""

    def __init__(self, name: str, patience_s: float = PATIENCE_S) -> None:
        self._name = name
        self._patience_s = patience_s
        self._is_closed = False
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start ``coroutine``; cancelling the future cancels it.

        Raises:
            RuntimeError: If the loop was closed.
        """
        with self._lock:
            return asyncio.run_coroutine_threadsafe(coroutine, self._running_loop())

    def post(self, callback: Callable[..., None], *args: Any) -> None:
        """Have ``callback(*args)`` called by the loop.

        Raises:
            RuntimeError: If the loop was closed.
        """
        with self._lock:
            self._running_loop().call_soon_threadsafe(callback, *args)

    def post_if_running(self, callback: Callable[..., None], *args: Any) -> None:
        """Likewise, but do nothing if there is no loop."""
        with self._lock:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(callback, *args)

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Cancel what still runs, run ``last``, and end the thread, for good; ``last`` may raise.

        What takes too long is left behind. Nothing is run, ``last`` included, if nothing ever was.
        """
        with self._lock:
            self._is_closed = True
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            last.close()
            return
        finishing = asyncio.run_coroutine_threadsafe(self._finish(last), loop)
        try:
            finishing.result(3 * self._patience_s)
        except TimeoutError:
            if finishing.done():  # it is an error of the last one's
                raise
            logger.warning("%s: the thread does not end and is left behind.", self._name)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(self._patience_s)
            if not thread.is_alive():
                loop.close()

    async def _finish(self, last: Coroutine[Any, Any, None]) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=self._patience_s)
        limit = asyncio.timeout(self._patience_s)
        try:
            async with limit:
                await last
        except TimeoutError:
            if not limit.expired():
                raise
            logger.warning("%s: not closed within %g s.", self._name, self._patience_s)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """The loop; starts it if need be. Called with the lock held."""
        if self._is_closed:
            raise RuntimeError(f"{self._name}: the loop was closed.")
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(
                target=self._loop.run_forever, name=self._name, daemon=True
            )
            self._thread.start()
        return self._loop
