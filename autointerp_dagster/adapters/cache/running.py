"""One pass of the subject model over the dataset, for many layers, coders and ranges.

A pass goes on where a killed one with the same identity stopped, and what a finished one found
stays on disk until every cell that needs it is stored.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import polars as pl

from autointerp_dagster.adapters.cache.folders import sweep
from autointerp_dagster.adapters.cache.merging import BLOCK_KEYS
from autointerp_dagster.adapters.cache.opening import OpenSpool, open_spool
from autointerp_dagster.adapters.cache.plan import PassIdentity, PassPlan
from autointerp_dagster.adapters.cache.spool import BUFFER_BYTES
from autointerp_dagster.adapters.coder_files import check_width
from autointerp_dagster.adapters.subject_models import SubjectModel
from autointerp_dagster.core.activations import Chunk, FiringCounts, chunks_of
from autointerp_dagster.core.schemas import ACTIVATIONS
from autointerp_dagster.core.sparse_coders import PlacedCoder
from autointerp_dagster.core.tokens import TokenDataset, context_batches
from autointerp_dagster.core.types import Cell, LatentRange, LayerKey, Progress


@dataclass(frozen=True, slots=True)
class SpoolSettings:
    """Sizes and times that change no result."""

    buffer_bytes: int = BUFFER_BYTES
    """Memory for non-zeros not yet on disk, all cells together."""
    block_keys: int = BLOCK_KEYS
    """Non-zeros sorted at once."""
    checkpoint_s: float = 30.0
    """Seconds of work that a kill may cost; 0: a checkpoint after every chunk."""


class CachedLayers:
    """The activation cache of some layers, readable cell by cell until it is closed."""

    def __init__(
        self,
        opened: OpenSpool,
        settings: SpoolSettings,
        engines: Mapping[LayerKey, dict[str, object]],
        *,
        resumed_at: int,
        is_kept: bool,
    ) -> None:
        self._opened, self._settings, self._is_kept = opened, settings, is_kept
        self._engines = engines
        self.resumed_at = resumed_at
        """Chunks that an earlier, killed pass had done; 0 if there was none."""

    def execution(self, layer: LayerKey) -> dict[str, object]:
        """How a layer was computed, to be recorded.

        Its coder; the contexts that ran at once, also after a lack of memory had halved them; and
        where the pass went on.
        """
        about: dict[str, object] = {"n_chunks": self._opened.plan.n_chunks}
        if self._opened.batch_size is not None:
            about["batch_size"] = self._opened.batch_size
        if layer in self._engines:
            about["coder"] = self._engines[layer]
        if self.resumed_at:
            about["resumed_at_chunk"] = self.resumed_at
        return about

    def firing_counts(self, layer: LayerKey) -> pl.DataFrame:
        """``schemas.FIRING_COUNTS`` of a whole layer, also of latents outside its ranges.

        Raises:
            StoreError: If the spool is damaged.
        """
        counts = self._opened.firing_counts(layer)
        assert counts is not None  # a pass ends with a checkpoint
        return counts

    def frames(self, layer: LayerKey, latents: LatentRange) -> Iterator[pl.DataFrame]:
        """``schemas.ACTIVATIONS`` of one cell in order, in frames cut anywhere; can be asked again.

        Raises:
            ValueError: If the cell was not asked for.
            StoreError: If the spool cannot be read or is damaged.
        """
        return self._opened.spool.frames(Cell(layer, latents), self._settings.block_keys)

    def cell(self, layer: LayerKey, latents: LatentRange) -> pl.DataFrame:
        """:meth:`frames` as one table: for cells that fit into memory."""
        return pl.concat([ACTIVATIONS.empty(), *self.frames(layer, latents)], rechunk=True)

    @property
    def folder(self) -> Path:
        """The spool's, to be named where something is wrong with it."""
        return self._opened.folder.path

    def discard(self, cells: Iterable[Cell]) -> None:
        """Removes what was spooled of cells that are stored now."""
        for cell in cells:
            self._opened.spool.discard(cell)

    def cells(self) -> list[Cell]:
        """The cells that can be read, also those that only an earlier run asked for."""
        return self._opened.spool.cells()

    def close(self) -> None:
        """Lets other processes use the spool; removes it if no cell is left to be stored."""
        self._opened.close(is_kept=self._is_kept and bool(self.cells()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def cache_layers(
    subject_model: SubjectModel,
    dataset: TokenDataset,
    coders: Mapping[LayerKey, PlacedCoder],
    ranges: Mapping[LayerKey, Sequence[LatentRange]],
    spool_dir: Path,
    progress: Progress,
    identity: PassIdentity | None = None,
    settings: SpoolSettings | None = None,
) -> CachedLayers:
    """Run the subject model once over the dataset and keep what every latent does.

    Use it as ``with cache_layers(...) as cached:``, store the cells, and ``discard`` those that are
    stored. With an identity the spool outlives a kill, and the same pass, also over fewer of its
    layers, goes on from its last checkpoint; a spool that another process uses is left alone.

    Args:
        subject_model: Runs ``config.batch_size`` contexts at a time.
        dataset: Tokens of this subject model's tokenizer.
        coders: Layers to cache; all share the pass.
        ranges: Cells to keep of each of these layers. Firing counts are of all latents anyway.
        spool_dir: Local folder for spools. Those untouched for a week are removed.
        progress: Shown per chunk of contexts.
        identity: What decides the result; null: nothing is ever gone on with, and all files are
            removed at the end.
        settings: Sizes and times.

    Raises:
        ModelError: If the model gives NaN or infinity, or a hookpoint is unknown.
        CoderError: If a coder's width is not that of its hookpoint.
        StudyError: If there are too many latents, contexts and positions for a key.
        StoreError: If the spool cannot be written, e.g. a full disk.
    """
    settings = settings or SpoolSettings()
    identity, is_kept = identity or PassIdentity.private(coders), identity is not None
    n_chunks = len(context_batches(dataset, subject_model.config.batch_size))
    wanted = PassPlan.of(identity, ranges, n_chunks)
    sweep(spool_dir)
    opened = open_spool(spool_dir, wanted, dataset, settings.buffer_bytes)
    resumed_at, engines = opened.n_done, {}
    try:
        if not opened.is_finished:
            mine = {layer: coders[layer] for layer in opened.plan.coders}
            engines = _run(subject_model, dataset, mine, opened, progress, settings)
    except BaseException:
        opened.close(is_kept=is_kept)
        raise
    return CachedLayers(opened, settings, engines, resumed_at=resumed_at, is_kept=is_kept)


def _run(
    subject_model: SubjectModel,
    dataset: TokenDataset,
    coders: Mapping[LayerKey, PlacedCoder],
    opened: OpenSpool,
    progress: Progress,
    settings: SpoolSettings,
) -> dict[LayerKey, dict[str, object]]:
    """The chunks that are not done yet; gives how each coder says that it computed."""
    for layer, placed in coders.items():
        check_width(placed, subject_model, layer)
    device, n_chunks = subject_model.device, opened.plan.n_chunks
    on_device = {
        layer: placed._replace(coder=placed.coder.to(device)) for layer, placed in coders.items()
    }
    chunks = chunks_of(
        subject_model.base_model,
        dataset,
        on_device,
        subject_model.config.batch_size,
        device,
        first_chunk=opened.n_done,
    )
    resumed = f" from {opened.n_done} of {n_chunks}" if opened.n_done else ""
    shown = progress(
        chunks,
        total=n_chunks - opened.n_done,
        description=f"activation cache{resumed}",
        unit="chunk",
    )
    _spool_chunks(shown, opened, coders, settings)
    return {layer: getattr(placed.coder, "describe", dict)() for layer, placed in on_device.items()}


def _spool_chunks(
    chunks: Iterable[Chunk],
    opened: OpenSpool,
    coders: Mapping[LayerKey, PlacedCoder],
    settings: SpoolSettings,
) -> None:
    counts, last = _no_counts(coders), time.monotonic()
    for n_done, chunk in enumerate(chunks, start=opened.n_done + 1):
        for layer, nonzeros in chunk.nonzeros.items():
            counts[layer].add(nonzeros)
            opened.spool.append(layer, nonzeros)
        is_last = n_done == opened.plan.n_chunks
        if is_last or time.monotonic() - last >= settings.checkpoint_s:
            opened.advance(n_done, counts, chunk.batch_size)  # never grows: the least since then
            counts, last = _no_counts(coders), time.monotonic()
    if opened.checkpoint is None:  # there was no chunk
        opened.advance(0, counts, None)
    opened.spool.free()  # sorting needs the room


def _no_counts(coders: Mapping[LayerKey, PlacedCoder]) -> dict[LayerKey, FiringCounts]:
    return {layer: FiringCounts(placed.coder.num_latents) for layer, placed in coders.items()}
