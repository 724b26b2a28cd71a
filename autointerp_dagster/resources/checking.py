"""The checks of a stage, over the places of one run: those it made and those it linked.

A place's tables are read back from the store, each once and without its lists, so what is judged is
what the next stage will read. What was counted is judged in ``core/checks``.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from math import isfinite
from typing import NamedTuple, Protocol

import dagster as dg
import numpy as np
import polars as pl
from jaxtyping import Int8

from autointerp_dagster.adapters.datasets import read_dataset
from autointerp_dagster.adapters.manifests import Manifest
from autointerp_dagster.adapters.parquet import flat_columns
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.checks import (
    CheckName,
    Counts,
    Outcome,
    Rebuilt,
    failed_counts,
    failed_rate,
    floor_counts,
    judge_floor,
    reconstruction,
    schema,
    schema_fault,
    scored_counts,
    share_scored,
    split_faults,
    splits_disjoint,
)
from autointerp_dagster.core.config import FileCoderConfig
from autointerp_dagster.core.errors import CheckError
from autointerp_dagster.core.schemas import (
    ACTIVATIONS,
    EXPLANATIONS,
    LATENT_METRICS,
    LATENTS,
    TABLES,
    VERDICTS,
    WINDOWS,
    Table,
)
from autointerp_dagster.core.types import Cell, Place, WholeStudy
from autointerp_dagster.core.windows import context_splits
from autointerp_dagster.resources.stage_inputs import StageInputs
from autointerp_dagster.study.checking import checks_of

_SHOWN = 20
"""Offenders in the metadata of a check."""
_TABLE_OF: Mapping[str, Table] = {table.name: table for table in TABLES if table != ACTIVATIONS}
"""Those that are looked at. Of the non-zeros every row is compared when it is written and every
block when it is read; they are most of a store, and not read once more."""


def check_results(
    stage: StageInputs, key: dg.AssetKey, made: Mapping[Place, Manifest]
) -> Iterator[dg.AssetCheckResult]:
    """What each check of a stage says of some places, and then an error if one refuses them.

    Args:
        stage: Whose places these are.
        key: Of its asset.
        made: What each place holds now. Those outside of a coder are passed over.

    Raises:
        CheckError: After the last result: what was found, wanted, and what to do, in one line.
        StoreError: If a table is missing or damaged.
    """
    outcomes = outcomes_of(stage, made)
    for outcome in outcomes:
        metadata = {
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
    refused = [outcome.line for outcome in outcomes if not outcome.passed]
    if refused:
        raise CheckError(f"{stage.study.name}: {stage.stage.name}: {' '.join(refused)}")


def outcomes_of(stage: StageInputs, made: Mapping[Place, Manifest]) -> list[Outcome]:
    """As :func:`check_results`, without Dagster."""
    checks = [_CHECKS[name](stage) for name in checks_of(stage.study, stage.stage)]
    for place, manifest in made.items() if checks else ():
        if manifest.status == "ok":
            tables = _Tables(stage.store, manifest)
            for check in checks:
                check.look(place, tables)
                if tables.has_fault:  # which the first check, of the tables themselves, found
                    break
    return [check.outcome() for check in checks]


def _listed(offenders: Mapping[str, str]) -> str:
    lines = [f"- {place}: {found}" for place, found in list(offenders.items())[:_SHOWN]]
    if (more := len(offenders) - _SHOWN) > 0:
        lines.append(f"- and {more} more")
    return "\n".join(lines)


class _Stored(NamedTuple):
    table: Table
    columns: pl.Schema
    """All of them."""
    rows: pl.DataFrame
    """Without the columns of lists."""


class _Tables:
    """The tables of one place, read when they are asked for, and once."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self._store, self.manifest = store, manifest
        self.has_fault = False
        """Whether one is not as declared, so that nothing can be read from them."""

    @cached_property
    def all(self) -> list[_Stored]:
        """Every table, of several explainers one after another."""
        return [
            _Stored(table, *flat_columns(self._store.verified_bytes(blob)))
            for blob in self.manifest.blobs
            if (table := _TABLE_OF.get(blob.name.split("/")[0])) is not None
        ]

    def rows(self, table: Table) -> pl.DataFrame:
        """One table, of all explainers together; empty if there is none."""
        found = [stored.rows for stored in self.all if stored.table == table]
        return pl.concat(found) if found else table.empty()


class _Check(Protocol):
    def look(self, place: Place, tables: _Tables) -> None:
        """Takes in one place."""
        ...

    def outcome(self) -> Outcome:
        """Over all places that were looked at."""
        ...


class _Schema:
    def __init__(self, stage: StageInputs) -> None:
        del stage
        self._n_tables = 0
        self._faults: dict[str, str] = {}

    def look(self, place: Place, tables: _Tables) -> None:
        for table, columns, rows in tables.all:
            self._n_tables += 1
            if (fault := schema_fault(table, columns, rows)) is not None:
                self._faults.setdefault(str(place), f"{fault} (manifest {tables.manifest.path})")
                tables.has_fault = True

    def outcome(self) -> Outcome:
        return schema(self._n_tables, self._faults)


class _SplitsDisjoint:
    def __init__(self, stage: StageInputs) -> None:
        self._stage = stage
        self._n_windows = self._n_wrong = 0
        self._faults: dict[str, str] = {}

    @cached_property
    def _split_of(self) -> Int8[np.ndarray, " context"]:
        dataset = read_dataset(self._stage.store, self._stage.input("token_dataset", WholeStudy()))
        return context_splits(dataset, self._stage.study.sampling)

    def look(self, place: Place, tables: _Tables) -> None:
        windows = tables.rows(WINDOWS)
        n_wrong, fault = split_faults(windows, self._split_of) if windows.height else (0, None)
        self._n_windows += windows.height
        self._n_wrong += n_wrong
        if fault is not None:
            self._faults[str(place)] = f"{fault} (manifest {tables.manifest.path})"

    def outcome(self) -> Outcome:
        return splits_disjoint(self._n_windows, self._n_wrong, self._faults)


class _FailedRate:
    def __init__(self, stage: StageInputs) -> None:
        self._most = stage.study.checks.failed_rate or 0.0
        self._table = EXPLANATIONS if stage.stage.name == "explanations" else VERDICTS
        self._places: dict[str, Counts] = {}
        self._reasons: Counter[str] = Counter()

    def look(self, place: Place, tables: _Tables) -> None:
        rows = tables.rows(self._table)
        self._places[str(place)] = failed_counts(rows)
        self._reasons.update(rows.filter(status="failed")["reason"])

    def outcome(self) -> Outcome:
        return failed_rate(self._places, self._reasons, self._most)


class _ShareScored:
    def __init__(self, stage: StageInputs) -> None:
        self._stage, self._least = stage, stage.study.checks.share_scored or 0.0
        self._places: dict[str, dict[str, Counts]] = {}

    def look(self, place: Place, tables: _Tables) -> None:
        explained, recorded = (
            _Tables(self._stage.store, self._stage.input(name, place))
            for name in ("explanations", "latent_records")
        )
        counts = scored_counts(
            tables.rows(LATENT_METRICS), explained.rows(EXPLANATIONS), recorded.rows(LATENTS)
        )
        for scorer, of_scorer in counts.items():
            self._places.setdefault(scorer, {})[str(place)] = of_scorer

    def outcome(self) -> Outcome:
        return share_scored(self._places, self._least)


class _JudgeFloor:
    def __init__(self, stage: StageInputs) -> None:
        self._most = stage.study.checks.judge_floor or 0.0
        self._places: dict[str, Counts] = {}

    def look(self, place: Place, tables: _Tables) -> None:
        self._places[str(place)] = floor_counts(tables.rows(VERDICTS))

    def outcome(self) -> Outcome:
        return judge_floor(self._places, self._most)


class _Reconstruction:
    def __init__(self, stage: StageInputs) -> None:
        self._study = stage.study
        self._layers: dict[str, Rebuilt] = {}

    def look(self, place: Place, tables: _Tables) -> None:
        """Every cell of a layer says the same; one that an older version made says nothing."""
        assert isinstance(place, Cell)
        coder = self._study.coders[place.layer.coder]
        manifest = tables.manifest
        if isinstance(coder, FileCoderConfig) and "l0" in manifest.summary:
            files = manifest.provenance.execution.get("coder_files", {})
            known = (manifest.summary["l0"], files.get("expected_l0"), manifest.summary.get("fvu"))
            self._layers[str(place.layer)] = Rebuilt(*known)

    def outcome(self) -> Outcome:
        bounds = self._study.checks
        return reconstruction(self._layers, bounds.fvu, bounds.l0)


_CHECKS: Mapping[CheckName, Callable[[StageInputs], _Check]] = {
    "schema": _Schema,
    "splits_disjoint": _SplitsDisjoint,
    "failed_rate": _FailedRate,
    "share_scored": _ShareScored,
    "judge_floor": _JudgeFloor,
    "reconstruction": _Reconstruction,
}
