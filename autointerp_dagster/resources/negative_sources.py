"""What the negatives of a block of latents are drawn from, as the store has it."""

from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b

import polars as pl

from autointerp_dagster.adapters.manifests import Blob
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.adapters.subject_models import choose_device
from autointerp_dagster.adapters.window_vectors import NearestWindows
from autointerp_dagster.core.negatives import NegativeSources, TokenWindows, token_windows
from autointerp_dagster.core.schemas import NEIGHBOUR_WINDOWS, NEIGHBOURS
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import Cell, WholeStudy
from autointerp_dagster.core.windows import WindowGrid
from autointerp_dagster.resources.stage_inputs import StageInputs
from autointerp_dagster.study import Study


@dataclass(frozen=True, slots=True)
class _Corpus:
    """A corpus and its windows; two are equal if their identities are."""

    store: Store
    identity: tuple[str, ...]
    dataset: TokenDataset = field(compare=False)
    grid: WindowGrid = field(compare=False)


def negative_sources(
    stage: StageInputs,
    study: Study,
    cell: Cell,
    latents: range,
    grid: WindowGrid,
    dataset: TokenDataset,
) -> NegativeSources:
    """The sources of a block of latents; nothing is read that no kind of the study needs.

    Vectors and the index of tokens are read once for all blocks, cells and layers of a corpus.

    Args:
        stage: A run of ``latent_records``.
        study: Says which kinds.
        cell: Whose latents.
        latents: The block, absolute.
        grid: Of ``dataset`` and the study's sampling.
        dataset: The corpus that ``stage`` reads.

    Raises:
        StoreError: If an input was never materialized, or is damaged.
    """
    kinds = study.sampling.negative_kinds
    neighbours = windows = similar = tokens = None
    if "neighbour" in kinds:
        neighbours, windows = _neighbours(stage, study, cell, latents)
    source = stage.input("token_dataset", WholeStudy())
    splits = blake2b(grid.split.tobytes(), digest_size=16).hexdigest()
    identity = (source.content_hash, str(grid.window_len), splits)
    corpus = _Corpus(stage.store, identity, dataset, grid)
    if "similar" in kinds:
        embedder = study.models.embedder
        device = "cpu" if embedder is None else choose_device(embedder.device)
        embedded = stage.input("window_embeddings", WholeStudy())
        similar = _nearest_windows(corpus, embedded.path or "", device)
    if "same_token" in kinds:
        tokens = _token_windows(corpus)
    return NegativeSources(neighbours, windows, similar, tokens, latents.start)


def _neighbours(
    stage: StageInputs, study: Study, cell: Cell, latents: range
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Neighbours of the block by the study's first measure, and the windows where they fire."""
    found, manifest = study.finds_neighbours, stage.input("neighbours", cell)
    assert found is not None, study.name  # a kind asks for them
    blobs = (manifest.blob(NEIGHBOURS.name), manifest.blob(NEIGHBOUR_WINDOWS.name))
    neighbours, windows = _neighbours_of_cell(stage.store, blobs)
    is_mine = pl.col("latent").is_between(latents.start, latents.stop, closed="left")
    mine = neighbours.filter(is_mine, measure=found.measures[0])
    return mine, windows.filter(pl.col("latent").is_in(mine["neighbour"].unique().implode()))


@lru_cache(maxsize=1)
def _neighbours_of_cell(
    store: Store, blobs: tuple[Blob, Blob]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Both tables of a cell, kept for all of its blocks: 4 bytes per position of each window."""
    return store.table(blobs[0]), store.table(blobs[1])


@lru_cache(maxsize=1)
def _nearest_windows(corpus: _Corpus, manifest: str, device: str) -> NearestWindows:
    store = corpus.store
    return NearestWindows.read(store, store.manifest(manifest), corpus.grid, device)


@lru_cache(maxsize=1)
def _token_windows(corpus: _Corpus) -> TokenWindows:
    return token_windows(corpus.dataset, corpus.grid)
