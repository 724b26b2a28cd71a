"""The latent records of a cell, made and stored block by block of its latents.

A row depends on its own latent, so blocks change no table. Of the activations one block is in
memory, of the windows what the writer holds; so neither tokens nor the range's size matter, but a
latent is never divided: the most frequent one decides.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import polars as pl

from autointerp_dagster.adapters.datasets import read_dataset
from autointerp_dagster.adapters.manifests import Blob
from autointerp_dagster.adapters.shards import ActivationShard
from autointerp_dagster.core.latent_records import RecordCounts, latent_records_of, record_counts
from autointerp_dagster.core.schemas import LATENTS, WINDOWS
from autointerp_dagster.core.types import Cell, WholeStudy
from autointerp_dagster.resources.negative_sources import RecordSources
from autointerp_dagster.resources.stage_inputs import StageInputs
from autointerp_dagster.study import Study

BLOCK_ROWS = 500_000
"""Non-zeros of one block, about 50 MB of arrays: the quickest of 0.1 to 1 million."""


class StoredRecords(NamedTuple):
    """A cell's records, once they are stored."""

    blobs: list[Blob]
    """Of ``schemas.LATENTS`` and ``schemas.WINDOWS``."""
    latents: pl.DataFrame
    """``schemas.LATENTS``."""
    counts: RecordCounts


def stored_records(
    stage: StageInputs, study: Study, cells: Sequence[Cell]
) -> Iterator[tuple[Cell, StoredRecords]]:
    """The records of some cells, which share the corpus, its windows and what is found in them.

    Raises:
        StoreError: As :func:`store_records`.
        ValueError: As :func:`store_records`.
    """
    if cells:
        dataset = read_dataset(stage.store, stage.input("token_dataset", WholeStudy()))
        sources = RecordSources(stage, study, dataset)
        for cell in cells:
            yield cell, store_records(sources, cell)


def store_records(
    sources: RecordSources, cell: Cell, block_rows: int = BLOCK_ROWS
) -> StoredRecords:
    """Make the records of a cell and store both tables; the same ones for any ``block_rows``.

    Args:
        sources: Of a run of ``latent_records``.
        cell: Whose activation cache is read.
        block_rows: Non-zeros in memory at a time, or those of one latent if it has more.

    Raises:
        StoreError: If an input was never materialized or is damaged, or the store cannot be
            written.
        ValueError: If the cache holds what cannot be (see ``latent_records_of``).
    """
    stage = sources.stage
    shard = ActivationShard(stage.store, stage.input("activation_cache", cell))
    latents: list[pl.DataFrame] = [LATENTS.empty()]

    def windows() -> Iterator[pl.DataFrame]:
        for block in shard.blocks(block_rows):
            tables = latent_records_of(
                shard.read(block),
                shard.firing_counts,
                sources.dataset,
                cell.layer,
                block,
                sources.study.sampling,
                sources.grid,
                sources.of(cell, block),
            )
            latents.append(tables.latents)
            yield tables.windows

    stored = stage.store.put_frames(WINDOWS, windows()).blob
    whole = pl.concat(latents)
    blobs = [stage.store.put_table(LATENTS, whole), stored]
    return StoredRecords(blobs, whole, record_counts(whole, stored.n_rows or 0))
