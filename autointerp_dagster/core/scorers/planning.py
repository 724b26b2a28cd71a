"""Which explanations are tested on which latents: each on its own, and the floors."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import polars as pl

from autointerp_dagster.core.latent_records import LatentRecord
from autointerp_dagster.core.scorers.tasks import ScoringTask
from autointerp_dagster.core.types import LatentId


class Job(NamedTuple):
    """One latent with the explanations to be tested on its windows."""

    record: LatentRecord
    tasks: tuple[ScoringTask, ...]
    """Its own explanation first."""


def scoring_tasks(
    layer_latents: Iterable[LatentId], explanations: pl.DataFrame, donors: pl.DataFrame
) -> dict[int, tuple[ScoringTask, ...]]:
    """The tasks of each latent under one explainer.

    A floor latent gets a second task: the explanation of its first donor (by rank) that has one
    with another text.

    Args:
        layer_latents: Latents that may be scored, of one layer.
        explanations: ``schemas.EXPLANATIONS`` of one explainer; only selected rows with status
            ``ok`` are used.
        donors: ``schemas.DONORS`` of the same layer.

    Returns:
        By latent index; a latent without an explanation is absent.
    """
    usable = explanations.filter((pl.col("status") == "ok") & pl.col("selected"))
    rows = {row["latent"]: row for row in usable.iter_rows(named=True)}
    candidates: dict[int, list[int]] = {}
    for row in donors.sort("latent", "rank").iter_rows(named=True):
        candidates.setdefault(row["latent"], []).append(row["donor"])
    tasks: dict[int, tuple[ScoringTask, ...]] = {}
    for latent in layer_latents:
        if latent.index not in rows:
            continue
        own = ScoringTask.of_row(rows[latent.index], latent, "own")
        explained = [d for d in candidates.get(latent.index, []) if d in rows]
        donor = next((d for d in explained if rows[d]["text"] != own.text), None)
        floor = () if donor is None else (ScoringTask.of_row(rows[donor], latent, "other"),)
        tasks[latent.index] = (own, *floor)
    return tasks


def jobs_of(
    records: Iterable[LatentRecord], tasks: dict[int, tuple[ScoringTask, ...]]
) -> Iterator[Job]:
    """Each record that has tasks, with them, in the order of the records."""
    for record in records:
        if record.latent.index in tasks:
            yield Job(record, tasks[record.latent.index])
