"""The layers that a study discovered, and what the last looks found."""

from collections.abc import Iterator, Mapping, Sequence

import dagster as dg
from rich.console import Console

from autointerp_dagster.adapters.found_layers import FoundLayers, Look
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.cli.report import printable
from autointerp_dagster.core.errors import StudyError
from autointerp_dagster.resources.registering import look, register
from autointerp_dagster.study import Study

_UNHURRIED_S = 24 * 3600.0
"""A look by hand goes on until everything is checked."""


def look_by_hand(
    study: Study, store: Store, instance: dg.DagsterInstance, forget: Sequence[str]
) -> Look | None:
    """Looks for coders, or takes layers out of the study instead.

    Args:
        study: The study.
        store: Its store.
        instance: Where its layers and versions are told.
        forget: Layers to be taken out; they are found again if their files are still there.

    Raises:
        StudyError: If its layers are not discovered, or it has no such layer.
    """
    if not study.discovers:
        raise StudyError(
            f"study {study.name}: its layers are written in it. Write `layers: discover` to have "
            "them found."
        )
    if not forget:
        seen, _ = look(instance, study, store, "command", seconds=_UNHURRIED_S)
        return seen
    records = FoundLayers(store, study.name)
    known = {one.layer: one for one in records.layers()}
    for name in forget:
        if name not in known:
            raise StudyError(f"study {study.name}: no layer {name!r}. It has: {list(known)}.")
        records.forget(known[name])
    register(instance, study, records)
    return None


def print_look(study: Study, seen: Look, console: Console) -> None:
    """Prints what a look found."""
    console.print(f"{study.name}: {seen.line}")
    for line in _details(seen):
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
    if seen.found:
        console.print(f"`autointerp run {study.name}` explains and scores them.")


def print_discovered(study: Study, store: Store, console: Console) -> None:
    """Prints, of a study that discovers its layers, the last looks; nothing of another."""
    if not study.discovers:
        return
    looks = FoundLayers(store, study.name).looks()
    if not looks:
        console.print(
            "Waits for coders: nobody has looked yet. In the UI switch on the sensor "
            f"{study.name}_new_coders or the schedule {study.name}_nightly, or look by hand: "
            f"`autointerp discover {study.name}`."
        )
    for seen in looks:
        console.print(f"Last look by {seen.by}, {seen.time}: {seen.line}", highlight=False)
    for line in _details(looks[0]) if looks else ():
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def _details(seen: Look) -> Iterator[str]:
    for what, names in (
        ("new", seen.found),
        ("changed", seen.changed),
        ("launched", seen.launched),
    ):
        if names:
            yield f"  {what}: {', '.join(names)}"
    yield from _reasons("waiting", seen.waiting)
    yield from _reasons("broken", seen.broken)


def _reasons(what: str, reasons: Mapping[str, str]) -> Iterator[str]:
    for name, reason in reasons.items():
        yield f"  {what}: {name}: {reason}"
