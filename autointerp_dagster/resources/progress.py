"""How far a long loop is: a bar in a terminal, now and then a line in Dagster's log."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import dagster as dg
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")

LOG_EVERY_S = 15.0

_logger = logging.getLogger(__name__)


class ProgressDisplay(dg.ConfigurableResource):
    """Shows long loops to whoever watches the run."""

    style: Literal["bar", "log"] = "log"
    """``bar`` for a terminal; ``log`` writes to the run's log."""

    def on(self, context: dg.AssetExecutionContext) -> "ShownProgress":
        """The ``core.types.Progress`` of one step."""
        return ShownProgress(context, self.style)


class ShownProgress:
    """A ``core.types.Progress`` that reports to a terminal or to a step's log."""

    def __init__(self, context: dg.AssetExecutionContext, style: Literal["bar", "log"]) -> None:
        self._context = context
        self._style = style

    def __call__(
        self,
        items: Iterable[T],
        *,
        total: int,
        description: str,
        unit: str = "it",
        note: Callable[[], str] | None = None,
    ) -> Iterator[T]:
        """The items, unchanged and in order."""
        task = _Task(f"{self._context.asset_key.path[-1]} {description}", total, unit, note or str)
        if self._style == "log":
            return _lines(items, task, self._context.log.info)
        if not sys.stdout.isatty():  # a log file or a pipe: a bar would be noise
            return _lines(items, task, _logger.info)
        return _bar(items, task, Console())


def on_terminal(
    items: Iterable[T],
    *,
    total: int,
    description: str,
    unit: str = "it",
    note: Callable[[], str] | None = None,
) -> Iterator[T]:
    """A ``core.types.Progress`` for commands whose output may be piped on: a bar on stderr."""
    if not sys.stderr.isatty():
        return iter(items)
    return _bar(items, _Task(description, total, unit, note or str), Console(stderr=True))


@dataclass(frozen=True, slots=True)
class _Task:
    description: str
    total: int
    unit: str
    note: Callable[[], str]


def _lines(items: Iterable[T], task: _Task, say: Callable[..., None]) -> Iterator[T]:
    started = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= LOG_EVERY_S and done < task.total:
            last = now
            left = (now - started) / done * (task.total - done)
            message = "%s: %d/%d %s, %.0f s left %s"
            say(message, task.description, done, task.total, task.unit, left, task.note())


def _bar(items: Iterable[T], task: _Task, console: Console) -> Iterator[T]:
    # A console of our own: rich's global one decides once, when anything first asks for it,
    # whether it may draw, and in a process that had no terminal then it never draws again.
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(task.unit),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, transient=True, console=console) as progress:
        shown = progress.add_task(task.description, total=task.total, note="")
        for item in items:
            yield item
            progress.update(shown, advance=1, note=task.note())
