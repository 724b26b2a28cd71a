"""Whether results are fit to build on: from tables to findings to what was found and wanted."""

from autointerp_dagster.core.checks.answers import (
    failed_counts,
    failed_rate,
    failed_reasons,
    floor_counts,
    judge_floor,
    scored_counts,
    share_scored,
)
from autointerp_dagster.core.checks.findings import Findings, Rebuilt
from autointerp_dagster.core.checks.outcome import CheckName, Outcome
from autointerp_dagster.core.checks.reconstruction import reconstruction
from autointerp_dagster.core.checks.shares import Bounds, Counts
from autointerp_dagster.core.checks.tables import (
    schema,
    schema_fault,
    split_faults,
    splits_disjoint,
)

__all__ = [
    "Bounds",
    "CheckName",
    "Counts",
    "Findings",
    "Outcome",
    "Rebuilt",
    "failed_counts",
    "failed_rate",
    "failed_reasons",
    "floor_counts",
    "judge_floor",
    "reconstruction",
    "schema",
    "schema_fault",
    "scored_counts",
    "share_scored",
    "split_faults",
    "splits_disjoint",
]
