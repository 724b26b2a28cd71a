"""The checks of a stage: what was measured of its places, held against the study's bounds.

A run judges the places that it made and those that it linked, and before that what it reads:
results that a study refuses are built on by nothing, whoever made them and whenever.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import isfinite
from typing import Any

import dagster as dg

from autointerp_dagster.adapters.manifests import Manifest
from autointerp_dagster.core.checks import (
    Bounds,
    CheckName,
    Findings,
    Outcome,
    failed_rate,
    judge_floor,
    reconstruction,
    schema,
    share_scored,
    splits_disjoint,
)
from autointerp_dagster.core.errors import CheckError
from autointerp_dagster.core.listing import first_few
from autointerp_dagster.core.types import Place
from autointerp_dagster.study import Study
from autointerp_dagster.study.checking import checks_of
from autointerp_dagster.study.stages import Stage

_SHOWN = 20
"""Offenders in the metadata of a check."""


def check_results(
    study: Study, stage: Stage, key: dg.AssetKey, made: Mapping[Place, Manifest]
) -> Iterator[dg.AssetCheckResult]:
    """What each check of a stage says of some places, and then an error if one refuses them.

    Args:
        study: Whose bounds these are.
        stage: Whose places these are.
        key: Of its asset.
        made: What each place holds now. Those outside of a coder, and those that a version without
            checks made, are passed over.

    Raises:
        CheckError: After the last result: what was found, wanted, and what to do, in one line.
    """
    outcomes = outcomes_of(study, stage, made)
    for outcome in outcomes:
        metadata: dict[str, Any] = {
            "found": outcome.found,
            "wanted": outcome.wanted,
            "n_places": len(made),
            **{name: number for name, number in outcome.numbers.items() if isfinite(number)},
        }
        if not outcome.passed:
            metadata["what to do"] = outcome.advice
        if outcome.offenders:
            metadata["places"] = dg.MetadataValue.md(_listed(outcome.offenders))
        yield dg.AssetCheckResult(
            passed=outcome.passed,
            asset_key=key,
            check_name=outcome.name,
            description=f"Found {outcome.found}; wanted {outcome.wanted}.",
            metadata=metadata,
        )
    _refuse(f"{study.name}: {stage.name}", outcomes)


def refuse_to_read(
    study: Study, stage: Stage, upstream: Stage, read: Mapping[Place, Manifest]
) -> None:
    """Raise CheckError if a check of an input refuses what a stage is about to be made from."""
    outcomes = outcomes_of(study, upstream, read)
    _refuse(f"{study.name}: {stage.name} is not made from {upstream.name}", outcomes)


def outcomes_of(study: Study, stage: Stage, made: Mapping[Place, Manifest]) -> list[Outcome]:
    """What each check says of some places; nothing is read."""
    places: dict[Any, Findings] = {
        place: manifest.findings
        for place, manifest in made.items()
        if manifest.status == "ok" and manifest.findings is not None
    }
    paths = {str(place): manifest.path for place, manifest in made.items()}
    outcomes = [_outcome(name, study, places) for name in checks_of(study, stage)]
    return [_with_manifests(outcome, paths) for outcome in outcomes]


def _with_manifests(outcome: Outcome, paths: Mapping[str, str | None]) -> Outcome:
    named = {
        place: f"{found} (manifest {paths[place]})" if place in paths else found
        for place, found in outcome.offenders.items()
    }
    return replace(outcome, offenders=named)


def _refuse(what: str, outcomes: list[Outcome]) -> None:
    refused = [outcome.line for outcome in outcomes if not outcome.passed]
    if refused:
        raise CheckError(f"{what}: {' '.join(refused)}")


def _listed(offenders: Mapping[str, str]) -> str:
    found = [f"{place}: {what}" for place, what in offenders.items()]
    return "- " + first_few(found, _SHOWN, between="\n- ")


def _outcome(name: CheckName, study: Study, places: Mapping[Any, Findings]) -> Outcome:
    bounds, n_compared = study.checks, len(study.cells) + len(study.layer_keys)
    if name == "schema":
        return schema(places)
    if name == "splits_disjoint":
        return splits_disjoint(places)
    if name == "reconstruction":
        return reconstruction(places, bounds.fvu, bounds.l0)
    if name == "failed_rate":
        return failed_rate(places, Bounds(0.0, bounds.failed_rate or 0.0, n_compared))
    if name == "share_scored":
        return share_scored(places, Bounds(bounds.share_scored or 0.0, 1.0, n_compared))
    off = bounds.judge_floor or 0.0
    return judge_floor(places, Bounds(0.5 - off, 0.5 + off, n_compared))
