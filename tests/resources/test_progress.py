"""Whoever waits for a long loop sees how far it is; the items pass unchanged."""

import io
import sys
from collections.abc import Iterator

import dagster as dg
import pytest
import rich

from autointerp_dagster.core.types import Progress
from autointerp_dagster.resources import progress as progress_module
from autointerp_dagster.resources.progress import ProgressDisplay, ShownProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(
    instance: dg.DagsterInstance, style: str, items: list[int], note: str | None = None
) -> tuple[list[int], list[str]]:
    """What comes out of the loop, and the lines in the run's log."""
    seen: list[int] = []

    @dg.asset
    def counting(context: dg.AssetExecutionContext, progress: ProgressDisplay) -> None:
        bar = progress.on(context)
        assert isinstance(bar, Progress)
        notes = {} if note is None else {"note": lambda: note}
        seen.extend(bar(iter(items), total=len(items), description="h.0", unit="rows", **notes))

    result = dg.materialize(
        [counting],
        instance=instance,
        resources={"progress": ProgressDisplay(style=style)},  # type: ignore[arg-type]
        run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
    )
    entries = [entry.user_message for entry in instance.all_logs(result.run_id)]
    return seen, [line for line in entries if line.startswith("counting h.0")]


@pytest.mark.parametrize("style", ["bar", "log"])
def test_the_items_come_out_in_order_and_unchanged(
    instance: dg.DagsterInstance, style: str
) -> None:
    items, _ = shown(instance, style, [3, 1, 2])
    assert items == [3, 1, 2]


@pytest.mark.parametrize("style", ["bar", "log"])
def test_no_items_are_no_items(instance: dg.DagsterInstance, style: str) -> None:
    assert shown(instance, style, []) == ([], [])


def test_the_runs_log_says_how_far_it_is_now_and_then(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "LOG_EVERY_S", 0.0)
    _, lines = shown(instance, "log", [1, 2, 3], note="$0.25")
    assert [line.split(",")[0] for line in lines] == [
        "counting h.0: 1/3 rows",
        "counting h.0: 2/3 rows",
    ]
    assert all(line.endswith("s left $0.25") for line in lines)


def test_a_short_loop_says_nothing(instance: dg.DagsterInstance) -> None:
    _, lines = shown(instance, "log", [1, 2, 3])
    assert lines == []


def test_a_terminal_gets_a_bar_with_counts_and_note(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rich, "_console", None)
    assert not rich.get_console().is_interactive  # somebody asked while there was no terminal
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    items, lines = shown(instance, "bar", [1, 2, 3], note="5k tokens")
    assert (items, lines) == ([1, 2, 3], [])
    for part in ("counting h.0", "3/3", "rows", "5k tokens"):
        assert part in terminal.getvalue()


def test_items_are_taken_one_at_a_time(instance: dg.DagsterInstance) -> None:
    """A loop that is stopped in the middle has taken no more than it was given."""
    taken: list[int] = []

    def source() -> Iterator[int]:
        for item in range(5):
            taken.append(item)
            yield item

    @dg.asset
    def counting(context: dg.AssetExecutionContext) -> None:
        loop = ShownProgress(context, "log")(source(), total=5, description="h.0")
        assert [next(loop), next(loop)] == [0, 1]

    dg.materialize(
        [counting],
        instance=instance,
        run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
    )
    assert taken == [0, 1]
