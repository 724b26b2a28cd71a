"""What a score was made from, as a table in the UI: the walk of ``autointerp why``, manifests only.

One row per asset, so that its size does not grow with the grid; nothing but manifests is read.
"""

from collections.abc import Iterable, Mapping

import dagster as dg

from autointerp_dagster.adapters.lineage import Known, Lineage, Made, manifests_below
from autointerp_dagster.adapters.manifests import Manifest
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.types import Place
from autointerp_dagster.resources.events import Finished
from autointerp_dagster.resources.plots import table
from autointerp_dagster.study.stages import SCORE_STAGES, STAGES, Stage

_SHOWN_HASH = 12
_SHOWN_TIME = len("2026-11-30T07:12:45")
_SHOWN_TEXT = 300
_STAGES = {*SCORE_STAGES, "latent_metrics"}


def with_lineage(
    store: Store,
    stage: Stage,
    done: Mapping[Place, Finished],
    known: Iterable[Manifest],
) -> Mapping[Place, Finished]:
    """What was made, with a table of its origins where scores are.

    Args:
        store: Where the manifests are.
        stage: What was made; stages before the scores are left as they are.
        done: By place.
        known: Manifests that were read already, such as the stage's inputs.
    """
    if stage.name not in _STAGES or not done:
        return done
    try:
        below: Known = manifests_below(store, [m for m, _ in done.values()], list(known))
    except StoreError as error:  # what was made is reported all the same
        shown = dg.MetadataValue.text(f"cannot be read: {error}")
        return {place: (m, {**more, "lineage": shown}) for place, (m, more) in done.items()}
    return {
        place: (manifest, {**more, "lineage": _shown(manifest, below)})
        for place, (manifest, more) in done.items()
    }


def _shown(manifest: Manifest, known: Known) -> dg.MetadataValue:
    try:
        rows = lineage_rows(Lineage.of(manifest, known))
    except StoreError as error:
        return dg.MetadataValue.text(f"cannot be read: {error}")
    return table(rows)


def lineage_rows(lineage: Lineage) -> list[dict[str, str]]:
    """A walk as rows of a table, against the way of the data; a row per asset, the result's first.

    Of an asset with several manifests, such as a layer's ranges, the own one is shown, and how many
    more there are.
    """
    found = {
        asset: (own, len(lineage.made_from[asset])) for asset, own in lineage.ancestors.items()
    }
    rows = {asset: _row(Made.of(own), n) for asset, (own, n) in found.items()}
    text = ", ".join(f"{key} {value}" for key, value in lineage.text.items())
    for name, version in lineage.external.items():
        asset, _, place = name.partition(" ")
        read = text if asset == "corpus" else ""
        rows.setdefault(asset, _named(asset, place, "", version, read, "", ""))
    known = list(STAGES)
    order = sorted(rows, key=lambda asset: -known.index(asset) if asset in known else 1)
    return [_row(Made.of(lineage.manifest), 1), *(rows[asset] for asset in order)]


def _row(made: Made, n_manifests: int) -> dict[str, str]:
    more = f" and {n_manifests - 1} more" if n_manifests > 1 else ""
    asked = [f"{part} {identity}" for part, identity in made.models.items()]
    asked += [f"prompt {key} {version}" for key, version in made.prompts.items()]
    return _named(
        made.asset,
        made.cell + more,
        made.version,
        made.content_hash,
        ", ".join(asked),
        made.run_id,
        made.finished[:_SHOWN_TIME].replace("T", " "),
    )


def _named(
    asset: str, place: str, version: str, content: str, asked: str, run: str, finished: str
) -> dict[str, str]:
    return {
        "made from": asset,
        "place": place,
        "version": version,
        "content": content[:_SHOWN_HASH],
        "asked, read": asked if len(asked) <= _SHOWN_TEXT else f"{asked[:_SHOWN_TEXT]}…",
        "run": run,
        "finished": finished,
    }
