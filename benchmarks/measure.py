"""What every benchmark needs: a result with its bar, and two versions of the work side by side."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Result:
    """One figure and the bar that it must reach."""

    bench: str
    value: float
    bar: float
    unit: str
    """Of both, e.g. ``x latents per CPU-second``; what the figure is a ratio to is in ``bench``."""
    is_cost: bool = False
    """Whether less is better."""

    @property
    def ok(self) -> bool:
        """Whether the bar is reached."""
        return self.value <= self.bar if self.is_cost else self.value >= self.bar

    def line(self) -> dict[str, Any]:
        """As it is printed."""
        return {
            "bench": self.bench,
            "value": round(self.value, 2),
            "bar": self.bar,
            "unit": self.unit,
            "ok": self.ok,
        }


@dataclass(frozen=True)
class Pair(Generic[T, U]):
    """Two versions of one piece of work, run by turns."""

    ours: T
    """What ours gave, the first time."""
    plain: U
    ratio: float
    """CPU seconds of the plain version over those of ours: the median over the repeats."""


def by_turns(ours: Callable[[], T], plain: Callable[[], U], repeats: int = 3) -> Pair[T, U]:
    """Runs both versions ``repeats`` times, one after the other."""
    ratios: list[float] = []
    pairs: list[tuple[T, U]] = []
    for _ in range(repeats):
        found, ours_s = cpu_seconds(ours)
        expected, plain_s = cpu_seconds(plain)
        ratios.append(plain_s / ours_s)
        pairs.append((found, expected))
    found, expected = pairs[0]
    return Pair(found, expected, statistics.median(ratios))


def cpu_seconds(work: Callable[[], T]) -> tuple[T, float]:
    """What the work gave, and the CPU seconds of this process that it took."""
    started = time.process_time()
    result = work()
    return result, time.process_time() - started


@dataclass(frozen=True)
class NotMeasured:
    """A figure that could not be had here, and why; neither reached nor missed."""

    bench: str
    reason: str
    ok: bool = True

    def line(self) -> dict[str, Any]:
        """As it is printed."""
        return {"bench": self.bench, "not measured": self.reason}
