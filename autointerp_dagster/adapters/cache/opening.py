"""Finding the spool of a pass: a killed one's, a finished one's, or a new one."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from autointerp_dagster.adapters.cache.checkpoint import Checkpoint
from autointerp_dagster.adapters.cache.folders import SpoolFolder, folders_of
from autointerp_dagster.adapters.cache.packing import KeyLayout
from autointerp_dagster.adapters.cache.plan import PassPlan
from autointerp_dagster.adapters.cache.spool import Spool, unwritable
from autointerp_dagster.adapters.storage import write_whole
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import Cell, LayerKey

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class OpenSpool:
    """A spool that this process has locked, and how far it is."""

    folder: SpoolFolder
    plan: PassPlan
    spool: Spool
    n_done: int
    """Chunks."""
    counts: dict[LayerKey, pl.DataFrame]
    """``schemas.FIRING_COUNTS`` of each layer after these chunks; none before the first."""

    @property
    def is_finished(self) -> bool:
        """Whether every chunk is in it."""
        return self.n_done == self.plan.n_chunks

    def checkpoint(self, n_done: int, counts: Mapping[LayerKey, pl.DataFrame]) -> None:
        """Brings everything to disk, then says so."""
        sizes = self.spool.sync()
        try:
            Checkpoint(n_done, sizes, counts).write(self.folder.path)
        except OSError as error:
            raise unwritable(self.folder.path, error) from error
        self.n_done, self.counts = n_done, dict(counts)

    def close(self, *, is_kept: bool) -> None:
        """Lets other processes use it; removes it unless it is kept and worth something."""
        if is_kept and self.n_done:
            self.folder.release()
        else:
            self.folder.remove()


def open_spool(root: Path, wanted: PassPlan, dataset: TokenDataset, buffer_bytes: int) -> OpenSpool:
    """The spool of the same pass that got furthest and that nobody uses, or a new one.

    Args:
        root: Folder of all spools; made if need be.
        wanted: What the spool must hold.
        dataset: Decides how non-zeros are packed.
        buffer_bytes: Memory for non-zeros not yet written.

    Raises:
        StoreError: If a folder cannot be made or cut back.
        StudyError: If there are too many latents, contexts and positions for a key.
    """
    found: OpenSpool | None = None
    for path in folders_of(root, wanted.key):
        folder = SpoolFolder.claim(path)
        other = None if folder is None else _resumable(folder, wanted, dataset, buffer_bytes)
        if other is not None and (found is None or other.n_done > found.n_done):
            found, other = other, found
        if other is not None:
            other.folder.release()
    return _new(root, wanted, dataset, buffer_bytes) if found is None else _narrowed(found, wanted)


def _resumable(
    folder: SpoolFolder, wanted: PassPlan, dataset: TokenDataset, buffer_bytes: int
) -> OpenSpool | None:
    """The spool in a locked folder; null if it is none, or not of this pass."""
    plan, checkpoint = PassPlan.read(folder.path), Checkpoint.read(folder.path)
    if plan is None or checkpoint is None:  # killed before there was anything to keep
        folder.remove()
        return None
    if not plan.covers(wanted, folder.path):
        folder.release()
        return None
    there = {cell: file for cell, file in plan.files.items() if (folder.path / file).exists()}
    spool = Spool(folder.path, there, _layouts(there, dataset), buffer_bytes)
    if not spool.truncate(checkpoint.sizes):
        _logger.warning("%s: a file is shorter than its checkpoint says; removed", folder.path)
        folder.remove()
        return None
    counts = {layer: checkpoint.counts[layer] for layer in plan.coders}
    return OpenSpool(folder, plan, spool, checkpoint.n_chunks, counts)


def _new(root: Path, plan: PassPlan, dataset: TokenDataset, buffer_bytes: int) -> OpenSpool:
    layouts = _layouts(plan.files, dataset)
    try:
        folder = SpoolFolder.new(root, plan.key)
    except OSError as error:
        raise unwritable(root, error) from error
    spool = Spool(folder.path, plan.files, layouts, buffer_bytes)
    opened = OpenSpool(folder, plan, spool, 0, {})
    try:
        spool.create()
        _write_plan(opened)
    except BaseException:
        folder.remove()
        raise
    return opened


def _narrowed(opened: OpenSpool, wanted: PassPlan) -> OpenSpool:
    """Strikes out layers that are not wanted now: going on without them leaves them behind."""
    left_out = opened.plan.coders.keys() - wanted.coders.keys()
    _logger.info(
        "the spool %s goes on from chunk %d of %d",
        opened.folder.path, opened.n_done, opened.plan.n_chunks,
    )  # fmt: skip
    if opened.is_finished or not left_out:
        return opened
    _logger.info("without %s", ", ".join(map(str, sorted(left_out))))
    dropped = [cell for cell in opened.plan.files if cell.layer in left_out]
    opened.plan = opened.plan.only(wanted.coders.keys())
    _write_plan(opened)
    for cell in dropped:
        opened.spool.drop(cell)
    return opened


def _write_plan(opened: OpenSpool) -> None:
    try:
        write_whole(PassPlan.path_in(opened.folder.path), opened.plan.to_json())
    except OSError as error:
        raise unwritable(opened.folder.path, error) from error


def _layouts(cells: Iterable[Cell], dataset: TokenDataset) -> dict[Cell, KeyLayout]:
    return {cell: KeyLayout.of(dataset, cell.range) for cell in cells}
