"""What of a study is out of date and why, as a table or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autointerp_dagster.resources.staleness import Cause, OutOfDate
from autointerp_dagster.study import Study
from autointerp_dagster.study.stages import places_of, stages_of

_SHOWN = 4
"""Places that a row names; ``--json`` has all."""


def print_stale(study: Study, found: Sequence[OutOfDate], console: Console) -> None:
    """Prints a row for each stage and reason, with the places that it holds for."""
    n_places = _n_places(study)
    if not found:
        console.print(f"{study.name}: nothing is out of date ({n_places} places).")
        return
    table = Table("stage", "places", "why", title=f"{study.name}: out of date", show_lines=True)
    for stage in dict.fromkeys(one.asset for one in found):
        mine = [one for one in found if one.asset == stage]
        groups: dict[tuple[str, ...], list[str]] = {}
        for one in mine:
            groups.setdefault(tuple(map(_reason, one.causes)), []).append(one.cell)
        for reasons, cells in groups.items():
            table.add_row(stage, escape(_named(cells)), escape("\n".join(reasons)))
    console.print(table)
    n_direct = sum(one.is_direct for one in found)
    console.print(
        f"{len(found)} of {n_places} places: {n_direct} by themselves, "
        f"{len(found) - n_direct} because an input will change. "
        f"`autointerp run {study.name} --stale` makes these and nothing else."
    )


def stale_as_json(study: Study, found: Sequence[OutOfDate]) -> str:
    """The same as JSON, for scripts."""
    places = [{**asdict(one), "is_direct": one.is_direct} for one in found]
    content = {"study": study.name, "n_places": _n_places(study), "out_of_date": places}
    return json.dumps(content, indent=1, ensure_ascii=False)


def _n_places(study: Study) -> int:
    made = [stage for stage in stages_of(study) if not stage.is_external]
    return sum(1 for stage in made for _ in places_of(study, stage.scope))


def _reason(cause: Cause) -> str:
    """In words that are the same for the places of a stage."""
    return f"follows {cause.asset}" if cause.kind == "follows" else cause.text


def _named(cells: Sequence[str]) -> str:
    shown = "\n".join(cells[:_SHOWN])
    return shown if len(cells) <= _SHOWN else f"{shown}\nand {len(cells) - _SHOWN} more"
