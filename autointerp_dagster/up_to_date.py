"""What is out of date, as a check in the UI: the list of ``autointerp stale`` on ``study_metrics``.

It can be run by itself, by hand or by the clock: files are hashed, nothing is made or asked. It
blocks nothing.
"""

from collections.abc import Sequence

import dagster as dg

from autointerp_dagster.core.errors import AutoInterpError
from autointerp_dagster.core.listing import first_few
from autointerp_dagster.resources.events import asset_key
from autointerp_dagster.resources.plots import table
from autointerp_dagster.resources.staleness import (
    Alike,
    OutOfDate,
    alike,
    out_of_date,
    summary_of,
)
from autointerp_dagster.resources.store import StoreResource
from autointerp_dagster.study import Study
from autointerp_dagster.study.stages import STAGES

_SHOWN_ROWS = 50
_SHOWN_PLACES = 4
_KEPT_PLACES = 100
"""Of a row, in the JSON."""
_EVERY_MORNING = "0 6 * * *"


def build_up_to_date(study: Study) -> dg.Definitions:
    """The check of one study, and a schedule for it, off until somebody switches it on."""

    @dg.asset_check(
        asset=asset_key(study, STAGES["study_metrics"]),
        name="up_to_date",
        description="Places that a run would not skip, and why: what `autointerp stale` lists.",
    )
    def up_to_date(store: StoreResource) -> dg.AssetCheckResult:
        warn = dg.AssetCheckSeverity.WARN
        try:
            found = out_of_date(study, store.of(study))
        except AutoInterpError as error:  # e.g. a local model that is gone; no run fails for that
            said = f"{study.name}: cannot be told: {error}"
            return dg.AssetCheckResult(passed=False, severity=warn, description=said)
        said = summary_of(study, found)
        return dg.AssetCheckResult(
            passed=not found, severity=warn, description=said, metadata=_metadata(found)
        )

    daily = dg.ScheduleDefinition(
        name=f"{study.name}_up_to_date",
        target=dg.AssetSelection.checks(up_to_date),
        cron_schedule=_EVERY_MORNING,
        description="Looks every morning (UTC) for what is out of date; makes nothing.",
    )
    return dg.Definitions(asset_checks=[up_to_date], schedules=[daily])


def _metadata(found: Sequence[OutOfDate]) -> dict[str, dg.MetadataValue]:
    groups, n_direct = alike(found), sum(one.is_direct for one in found)
    counts = {"n_out_of_date": len(found), "n_by_themselves": n_direct}
    shown: dict[str, dg.MetadataValue] = {k: dg.MetadataValue.int(n) for k, n in counts.items()}
    if groups:
        shown["out_of_date"] = table([_row(one) for one in groups[:_SHOWN_ROWS]])
        shown["places"] = dg.MetadataValue.json([_content(one) for one in groups[:_SHOWN_ROWS]])
    if len(groups) > _SHOWN_ROWS:
        shown["n_rows_not_shown"] = dg.MetadataValue.int(len(groups) - _SHOWN_ROWS)
    return shown


def _row(one: Alike) -> dict[str, str]:
    places = first_few(one.cells, _SHOWN_PLACES)
    return {"stage": one.asset, "places": places, "why": "; ".join(one.reasons)}


def _content(one: Alike) -> dict[str, object]:
    places = list(one.cells[:_KEPT_PLACES])
    return {"stage": one.asset, "n": len(one.cells), "places": places, "why": list(one.reasons)}
