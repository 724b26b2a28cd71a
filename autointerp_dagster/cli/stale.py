"""What of a study is out of date and why, as a table or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from autointerp_dagster.core.listing import first_few
from autointerp_dagster.resources.staleness import OutOfDate, alike, n_places, summary_of
from autointerp_dagster.study import Study

_SHOWN = 4
"""Places that a row names; ``--json`` has all."""


def print_stale(study: Study, found: Sequence[OutOfDate], console: Console) -> None:
    """Prints a row for each stage and reason, with the places that it holds for."""
    if found:
        columns = [Column(name, overflow="fold") for name in ("stage", "places", "why")]
        table = Table(*columns, title=f"{study.name}: out of date", show_lines=True)
        for one in alike(found):
            table.add_row(
                one.asset,
                escape(first_few(one.cells, _SHOWN, "\n")),
                escape("\n".join(one.reasons)),
            )
        console.print(table)
    console.print(summary_of(study, found))


def stale_as_json(study: Study, found: Sequence[OutOfDate]) -> str:
    """The same as JSON, for scripts."""
    places = [{**asdict(one), "is_direct": one.is_direct} for one in found]
    content = {"study": study.name, "n_places": n_places(study), "out_of_date": places}
    return json.dumps(content, indent=1, ensure_ascii=False)
