"""An asyncio event loop in a thread of its own, for callers that are not asynchronous."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs what it is given in a background thread, which is started by the first of it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start ``coroutine``; cancelling the future cancels it."""
        with self._lock:
            return asyncio.run_coroutine_threadsafe(coroutine, self._running_loop())

    def post(self, callback: Callable[..., None], *args: Any) -> None:
        """Have ``callback(*args)`` called by the loop."""
        with self._lock:
            self._running_loop().call_soon_threadsafe(callback, *args)

    def post_if_running(self, callback: Callable[..., None], *args: Any) -> None:
        """Likewise, but do nothing if there is no loop."""
        with self._lock:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(callback, *args)

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Cancel what still runs, run ``last``, and end the thread. Without effect if idle."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            last.close()
            return
        asyncio.run_coroutine_threadsafe(_finish(last), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """The loop; starts it if need be. Called with the lock held."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(
                target=self._loop.run_forever, name=self._name, daemon=True
            )
            self._thread.start()
        return self._loop


async def _finish(last: Coroutine[Any, Any, None]) -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await last
