"""How far a long loop is: a bar in a terminal, now and then a line in Dagster's log."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeVar

import dagster as dg
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
        if self._style == "bar":
            return _bar(items, total, description, unit, note or str)
        return self._lines(items, total, description, unit, note or str)

    def _lines(
        self, items: Iterable[T], total: int, description: str, unit: str, note: Callable[[], str]
    ) -> Iterator[T]:
        started = last = time.monotonic()
        for done, item in enumerate(items, start=1):
            yield item
            now = time.monotonic()
            if now - last >= LOG_EVERY_S and done < total:
                last = now
                left = (now - started) / done * (total - done)
                self._context.log.info(
                    "%s: %d/%d %s, %.0f s left %s", description, done, total, unit, left, note()
                )


def _bar(
    items: Iterable[T], total: int, description: str, unit: str, note: Callable[[], str]
) -> Iterator[T]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(description, total=total, note="")
        for item in items:
            yield item
            progress.update(task, advance=1, note=note())
