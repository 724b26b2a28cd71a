"""What the tables of a place say to the checks, measured before its manifest is written.

Tables are read back from the store, each once and without its lists, so what is measured is what
the next stage will read.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Int8

from autointerp_dagster.adapters.datasets import read_dataset
from autointerp_dagster.adapters.manifests import Blob
from autointerp_dagster.adapters.parquet import flat_columns
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.checks import (
    Findings,
    failed_counts,
    failed_reasons,
    floor_counts,
    schema_fault,
    scored_counts,
    split_faults,
)
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
from autointerp_dagster.core.types import Place, WholeStudy
from autointerp_dagster.core.windows import context_splits
from autointerp_dagster.resources.stage_inputs import StageInputs
from autointerp_dagster.study.checking import LABELLED
from autointerp_dagster.study.stages import SCORE_STAGES, upstream_of

_TABLE_OF: Mapping[str, Table] = {table.name: table for table in TABLES if table != ACTIVATIONS}
"""Those that are looked at. Of the non-zeros every row is compared when it is written and every
block when it is read; they are most of a store, and not read once more."""


class Measuring:
    """The measurements of one stage; what several places need is read once."""

    def __init__(self, stage: StageInputs) -> None:
        self._stage, self._name = stage, stage.stage.name

    def findings(self, place: Place, blobs: Sequence[Blob]) -> Findings:
        """Of a place that holds these blobs.

        Raises:
            StoreError: If a table is missing or damaged.
        """
        tables = _Tables(self._stage.store, blobs)
        found = Findings(n_tables=len(tables.all))
        for table, columns, rows in tables.all:
            if (fault := schema_fault(table, columns, rows)) is not None:
                return found.model_copy(update={"table_fault": fault})
        return found.model_copy(update=self._measured(place, tables))

    def _measured(self, place: Place, tables: "_Tables") -> Mapping[str, object]:
        if self._name == "latent_records":
            windows = tables.rows(WINDOWS)
            n_wrong, fault = split_faults(windows, self._split_of) if windows.height else (0, None)
            return {"n_windows": windows.height, "n_wrong_splits": n_wrong, "split_fault": fault}
        if self._name == "latent_metrics":
            return {"scored": scored_counts(tables.rows(LATENT_METRICS), *self._scored(place))}
        if self._name != "explanations" and self._name not in SCORE_STAGES:
            return {}
        rows = tables.rows(EXPLANATIONS if self._name == "explanations" else VERDICTS)
        counted = {"failed": failed_counts(rows), "reasons": failed_reasons(rows)}
        return counted | ({"floor": floor_counts(rows)} if self._name in LABELLED else {})

    def _scored(self, place: Place) -> Iterable[pl.DataFrame]:
        """What says which latents were to be scored."""
        yield self._below("explanations", place).rows(EXPLANATIONS)
        yield self._below("latent_records", place).rows(LATENTS)
        asked = {stage.name for stage in upstream_of(self._stage.study, self._stage.stage)}
        has_steering = "score_intervention" in asked
        steering = self._below("score_intervention", place) if has_steering else None
        yield VERDICTS.empty() if steering is None else steering.rows(VERDICTS)

    def _below(self, asset: str, place: Place) -> "_Tables":
        return _Tables(self._stage.store, self._stage.input(asset, place).blobs)

    @cached_property
    def _split_of(self) -> Int8[np.ndarray, " context"]:
        dataset = read_dataset(self._stage.store, self._stage.input("token_dataset", WholeStudy()))
        return context_splits(dataset, self._stage.study.sampling)


class _Stored(NamedTuple):
    table: Table
    columns: pl.Schema
    """All of them."""
    rows: pl.DataFrame
    """Without the columns of lists."""


class _Tables:
    """The tables among some blobs, read when they are asked for, and once."""

    def __init__(self, store: Store, blobs: Sequence[Blob]) -> None:
        named = [(_TABLE_OF.get(blob.name.split("/")[0]), blob) for blob in blobs]
        self._blobs = [(table, blob) for table, blob in named if table is not None]
        self._store = store
        self._read: dict[str, _Stored] = {}

    @property
    def all(self) -> list[_Stored]:
        """Every table, of several explainers one after another."""
        return [self._stored(table, blob) for table, blob in self._blobs]

    def rows(self, table: Table) -> pl.DataFrame:
        """One table, of all explainers together; empty if there is none."""
        found = [self._stored(table, blob).rows for of, blob in self._blobs if of == table]
        return pl.concat(found) if found else table.empty()

    def _stored(self, table: Table, blob: Blob) -> _Stored:
        if blob.name not in self._read:
            columns = flat_columns(self._store.verified_bytes(blob))
            self._read[blob.name] = _Stored(table, *columns)
        return self._read[blob.name]
