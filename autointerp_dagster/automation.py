"""What runs by itself for studies with ``layers: discover``: a sensor and a nightly schedule.

Both look for coders, register what is new, and ask for one run per new layer over all its ranges,
up to ``latent_metrics``; the schedule also goes on with what a budget cut short. Layer and study
metrics follow by themselves, see ``definitions``. Both are off until somebody switches them on.
"""

import os
from datetime import datetime

import dagster as dg

from autointerp_dagster.adapters.found_layers import By, Look
from autointerp_dagster.core.listing import first_few
from autointerp_dagster.partitions import partitions_of
from autointerp_dagster.resources.events import asset_key
from autointerp_dagster.resources.launching import Night, stages_of_new_layers
from autointerp_dagster.resources.llms import BUDGET_LIMIT_TAGS, BUDGET_TAG
from autointerp_dagster.resources.registering import look
from autointerp_dagster.resources.store import StoreResource
from autointerp_dagster.study import Study

_SHOWN = 5
"""Names with their reasons in a tick's text; the store has all."""


def build_automation(study: Study) -> dg.Definitions:
    """The sensor ``<study>_new_coders``, the schedule ``<study>_nightly``, and the job of both."""
    keys = [asset_key(study, stage) for stage in stages_of_new_layers(study)]
    job = dg.define_asset_job(
        f"{study.name}_new_layers",
        dg.AssetSelection.assets(*keys),
        partitions_def=partitions_of(study, "cell"),
        description="All stages of a layer, up to the metrics of its latents.",
    )
    nightly = study.discovery.nightly

    @dg.sensor(
        name=f"{study.name}_new_coders",
        job=job,
        minimum_interval_seconds=study.discovery.every_s,
        description="Looks for new sparse coders, and explains and scores each.",
    )
    def new_coders(
        context: dg.SensorEvaluationContext, store: StoreResource
    ) -> dg.SensorResult | dg.SkipReason:
        seen, runs = _looked(context, study, store, "sensor")
        return dg.SensorResult(run_requests=runs) if runs else dg.SkipReason(_said(seen))

    @dg.schedule(
        name=f"{study.name}_nightly",
        job=job,
        cron_schedule=nightly.cron,
        execution_timezone=nightly.timezone,
        description="Looks for new sparse coders by the clock; all its runs share one budget.",
    )
    def new_coders_by_night(
        context: dg.ScheduleEvaluationContext, store: StoreResource
    ) -> list[dg.RunRequest] | dg.SkipReason:
        night = _night(study, context.scheduled_execution_time)
        seen, runs = _looked(context, study, store, "schedule", night)
        return runs or dg.SkipReason(_said(seen))

    return dg.Definitions(jobs=[job], sensors=[new_coders], schedules=[new_coders_by_night])


def _night(study: Study, when: datetime) -> Night:
    """A night whose runs count against its limits, all together."""
    nightly = study.discovery.nightly
    limits = {"usd": nightly.usd, "tokens": nightly.tokens}
    tags = {BUDGET_LIMIT_TAGS[k]: str(limit) for k, limit in limits.items() if limit is not None}
    name = f"{study.name}_nightly_{when:%Y%m%dT%H%M}"
    return Night(name, {BUDGET_TAG: name, **tags})


def _looked(
    context: dg.SensorEvaluationContext | dg.ScheduleEvaluationContext,
    study: Study,
    store: StoreResource,
    by: By,
    night: Night | None = None,
) -> tuple[Look, list[dg.RunRequest]]:
    seen, runs = look(
        context.instance, study, store.of(study), by, seconds=_seconds(by), night=night
    )
    context.log.info("%s: %s", study.name, _said(seen))
    return seen, runs


def _seconds(by: By) -> float:
    """Half of what Dagster gives a tick; the other half is for a coder that was begun in time."""
    name = "SENSOR" if by == "sensor" else "SCHEDULE"
    return float(os.environ.get(f"DAGSTER_{name}_GRPC_TIMEOUT_SECONDS", "60")) / 2


def _said(seen: Look) -> str:
    """A look in words, with what waits and what is broken."""
    lines = [seen.line]
    for what, reasons in (("waiting", seen.waiting), ("broken", seen.broken)):
        if reasons:
            said = [f"{what}: {name}: {reason}" for name, reason in reasons.items()]
            lines.append(first_few(said, _SHOWN, "\n"))
    return "\n".join(lines)
