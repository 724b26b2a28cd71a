"""Where the time of a run goes: seconds inside some functions, by name."""

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


class Stopwatch:
    """Seconds and calls by name. Time inside a nested watched function counts for both."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Adds the seconds of the block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started
            self.calls[name] += 1

    @contextmanager
    def watching(self, *watched: tuple[Any, str, str]) -> Iterator[None]:
        """Counts calls of some functions until the block ends.

        Args:
            watched: Class or module, the function's name there, and the name to count under.
        """
        with ExitStack() as undo:
            for owner, attribute, name in watched:
                original = getattr(owner, attribute)
                setattr(owner, attribute, self._timed(original, name))
                undo.callback(setattr, owner, attribute, original)
            yield

    def _timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.timing(name):
                return function(*args, **kwargs)

        return timed
