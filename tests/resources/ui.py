"""What the UI asks Dagster's webserver, answered in this process by the same GraphQL."""

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from dagster._core.test_utils import in_process_test_workspace
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster_graphql.schema import create_schema
from toy import Name, Toy

from autointerp_dagster.partitions import partition_key
from autointerp_dagster.study.stages import places_of, stages_of

SCHEMA = create_schema()
ORIGIN = LoadableTargetOrigin(
    executable_path=sys.executable, module_name="autointerp_dagster.definitions"
)
CAUSE = "category key { path } partitionKey"
STALE = f"""
query ($key: AssetKeyInput!) {{ assetNodeOrError(assetKey: $key) {{ ... on AssetNode {{
  staleStatus staleCauses {{ {CAUSE} }} }} }} }}"""
STALE_PARTITIONS = f"""
query ($key: AssetKeyInput!, $partitions: [String!]) {{
  assetNodeOrError(assetKey: $key) {{ ... on AssetNode {{
    staleStatus: staleStatusByPartition(partitions: $partitions)
    staleCauses: staleCausesByPartition(partitions: $partitions) {{ {CAUSE} }} }} }} }}"""


@dataclass(frozen=True, slots=True)
class Badge:
    """Of one place."""

    status: str
    """FRESH, STALE or MISSING."""
    causes: frozenset[tuple[str, ...]] = frozenset()
    """(category, asset, place)."""


def badges(toy: Toy, folder: Path, patch: pytest.MonkeyPatch) -> dict[Name, Badge]:
    """Of every place of the study, as a code location shows it that was loaded just now.

    Args:
        toy: The study; its instance must be one on disk.
        folder: Where its file goes.
        patch: Sets where studies are.
    """
    folder.mkdir(exist_ok=True)
    (folder / f"{toy.name}.yaml").write_text(yaml.safe_dump(toy.content))
    patch.setenv("AUTOINTERP_STUDIES", str(folder))
    study = toy.study
    found: dict[Name, Badge] = {}
    with in_process_test_workspace(toy.instance, ORIGIN) as context:
        for stage in stages_of(study):
            if not stage.is_external:
                places = list(places_of(study, stage.scope))
                keys = [partition_key(place) for place in places]
                shown = _badges(context, {"path": [study.name, stage.name]}, keys)
                found |= {(stage.name, str(p)): b for p, b in zip(places, shown, strict=True)}
    return found


def _badges(context: Any, key: dict[str, list[str]], partitions: list[str | None]) -> list[Badge]:
    is_whole = partitions == [None]
    variables = {"key": key} if is_whole else {"key": key, "partitions": partitions}
    query = STALE if is_whole else STALE_PARTITIONS
    asked = SCHEMA.execute_async(query, context_value=context, variable_values=variables)
    answer = asyncio.run(asked)
    assert answer.errors is None, answer.errors
    node = answer.data["assetNodeOrError"]
    statuses, causes = node["staleStatus"], node["staleCauses"]
    pairs = [(statuses, causes)] if is_whole else zip(statuses, causes, strict=True)
    return [Badge(status, frozenset(map(_cause, found))) for status, found in pairs]


def _cause(cause: dict[str, Any]) -> tuple[str, ...]:
    place = (cause["partitionKey"] or "all").replace("|", "/")
    return cause["category"], cause["key"]["path"][-1], place
