"""What a look found, told to Dagster: layers and versions; and said in the store and the log.

Everything here may be done again at any time, and is: a look that was cut short, a Dagster
instance that is new, or a store that a command wrote to are put right by the next one.
"""

import logging
from collections.abc import Mapping
from datetime import UTC, datetime

import dagster as dg

from autointerp_dagster.adapters.found_layers import By, FoundLayer, FoundLayers, Look
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.partitions import layers_name
from autointerp_dagster.resources.discovering import Findings, look_for_coders
from autointerp_dagster.resources.events import asset_key, observe_outside_runs
from autointerp_dagster.resources.launching import Night, wanted_runs
from autointerp_dagster.study import Study
from autointerp_dagster.study.stages import STAGES

logger = logging.getLogger(__name__)


def register(instance: dg.DagsterInstance, study: Study, records: FoundLayers) -> Study:
    """Makes Dagster's layers of a study those on record, and returns it with them in its order.

    Versions of their coders that Dagster does not know are observed, so that what was made of
    another version is stale.

    Raises:
        StoreError: If the store cannot be read.
    """
    name = layers_name(study)
    before = instance.get_dynamic_partitions(name)  # read first: a layer is on record before here
    found = {one.layer: one for one in records.layers() if one.key.coder in study.coders}
    for layer in before:
        if layer not in found:
            instance.delete_dynamic_partition(name, layer)
    instance.add_dynamic_partitions(name, [layer for layer in found if layer not in before])
    for one in found.values():
        if one.identity is not None:
            shown = _shown(one)
            stage = STAGES["sparse_coders"]
            observe_outside_runs(instance, study, stage, one.key, one.identity, shown)
    ordered = [found[key] for key in instance.get_dynamic_partitions(name) if key in found]
    return study.with_found({one.key: one.address for one in ordered})


def look(
    instance: dg.DagsterInstance,
    study: Study,
    store: Store,
    by: By,
    *,
    seconds: float,
    night: Night | None = None,
) -> tuple[Look, list[dg.RunRequest]]:
    """Looks once for coders, tells Dagster, and says in the store and in the log what was found.

    Args:
        instance: Where layers, versions and runs are.
        study: One with ``layers: discover``.
        store: Where results and records are.
        by: Who looks. A command asks for no runs.
        seconds: As in ``look_for_coders``.
        night: Of the schedule.

    Raises:
        StoreError: If the store cannot be read or written.
    """
    records = FoundLayers(store, study.name)
    findings = look_for_coders(study, store, seconds)
    study = register(instance, study, records)
    runs = [] if by == "command" else wanted_runs(instance, study, store, records, night)
    seen = Look(
        by=by,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        n_layers=len(study.layer_keys),
        found=tuple(one.layer for one in findings.new),
        changed=tuple(one.layer for one in findings.changed),
        launched=tuple(layer for _, layers in runs for layer in layers),
        waiting=findings.waiting,
        broken=findings.broken,
    )
    if by != "sensor" or seen.is_news or _differs(seen, records):
        records.put_look(seen)
    if seen.found or seen.changed or findings.newly_broken:
        _show(instance, study, seen, findings.newly_broken)
    _log(study, findings)
    return seen, [request for request, _ in runs]


def _differs(seen: Look, records: FoundLayers) -> bool:
    """Whether the sensor's last look said something else; a store need not hear it each minute."""
    last = next((look for look in records.looks() if look.by == seen.by), None)
    return last is None or (last.waiting, last.broken) != (seen.waiting, seen.broken)


def _show(
    instance: dg.DagsterInstance, study: Study, seen: Look, newly_broken: Mapping[str, str]
) -> None:
    """Shows in the UI, among the events of ``sparse_coders``, what is new."""
    shown: dict[str, dg.MetadataValue] = {"look": dg.MetadataValue.text(seen.line)}
    lists = {"new": seen.found, "changed": seen.changed, "launched": seen.launched}
    shown |= {name: dg.MetadataValue.text(", ".join(names)) for name, names in lists.items()}
    texts = {"waiting": seen.waiting, "broken": newly_broken}
    shown |= {name: dg.MetadataValue.json(dict(said)) for name, said in texts.items()}
    key = asset_key(study, STAGES["sparse_coders"])
    instance.report_runless_asset_event(dg.AssetObservation(key, metadata=shown))


def _log(study: Study, findings: Findings) -> None:
    for one in findings.new:
        logger.info("%s: new layer %s: %s", study.name, one.layer, one.about)
    for one in findings.changed:
        logger.info("%s: %s is another coder now: %s", study.name, one.layer, one.about)
    for name, reason in findings.newly_broken.items():
        logger.warning("%s: %s cannot be used: %s", study.name, name, reason)


def _shown(found: FoundLayer) -> dict[str, dg.MetadataValue]:
    shown: dict[str, dg.MetadataValue] = {"about": dg.MetadataValue.text(found.about)}
    if found.num_latents is not None:
        shown["num_latents"] = dg.MetadataValue.int(found.num_latents)
    return shown
