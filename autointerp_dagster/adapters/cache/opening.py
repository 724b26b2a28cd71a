"""Finding the spool of a pass: a killed one's, a finished one's, or a new one."""

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from autointerp_dagster.adapters.cache.checkpoint import Checkpoint, added
from autointerp_dagster.adapters.cache.folders import SpoolFolder, folders_of
from autointerp_dagster.adapters.cache.packing import KeyLayout
from autointerp_dagster.adapters.cache.plan import PassPlan
from autointerp_dagster.adapters.cache.spool import Spool, unwritable
from autointerp_dagster.adapters.local_files import write_whole
from autointerp_dagster.core.activations import FiringCounts
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import Cell, LayerKey

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class OpenSpool:
    """A spool that this process has locked, and how far it is."""

    folder: SpoolFolder
    plan: PassPlan
    spool: Spool
    checkpoint: Checkpoint | None
    """Null before the first."""

    @property
    def n_done(self) -> int:
        """Chunks that are in it and need not be computed again."""
        return 0 if self.checkpoint is None else self.checkpoint.n_chunks

    @property
    def is_finished(self) -> bool:
        """Whether every chunk is in it."""
        return self.checkpoint is not None and self.n_done == self.plan.n_chunks

    @property
    def batch_size(self) -> int | None:
        """See :attr:`Checkpoint.batch_size`."""
        return None if self.checkpoint is None else self.checkpoint.batch_size

    def firing_counts(self, layer: LayerKey) -> pl.DataFrame | None:
        """``schemas.FIRING_COUNTS`` of a layer after ``n_done`` chunks; null after none."""
        return None if self.checkpoint is None else self.checkpoint.table(self.folder.path, layer)

    def advance(
        self, n_done: int, since: Mapping[LayerKey, FiringCounts], batch_size: int | None
    ) -> None:
        """Brings everything to disk, then says so.

        Args:
            n_done: Chunks that are in it now.
            since: Counts of each layer in the chunks since the last time.
            batch_size: Most contexts that ran at once in each of these, at the least.
        """
        files = self.spool.sync()
        tables = ((k, added(self.firing_counts(k), of.table())) for k, of in since.items())
        least = min((n for n in (self.batch_size, batch_size) if n is not None), default=None)
        try:
            self.checkpoint = Checkpoint.make(self.folder.path, n_done, files, tables, least)
        except OSError as error:
            raise unwritable(self.folder.path, error) from error

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
    if found is None:
        return _new(root, wanted, dataset, buffer_bytes)
    path, n_chunks = found.folder.path, found.plan.n_chunks
    _logger.info("the spool %s goes on from chunk %d of %d", path, found.n_done, n_chunks)
    left_out = found.plan.coders.keys() - wanted.coders.keys()
    if left_out and not found.is_finished:
        try:
            _set_aside(found, root, left_out)
        except BaseException:
            found.folder.release()
            raise
    return found


def _resumable(
    folder: SpoolFolder, wanted: PassPlan, dataset: TokenDataset, buffer_bytes: int
) -> OpenSpool | None:
    """The spool in a locked folder; null if it is none, or not of this pass."""
    plan, checkpoint = PassPlan.read(folder.path), Checkpoint.read(folder.path)
    if plan is None or checkpoint is None:  # damaged, or killed with nothing to keep
        folder.remove()
        return None
    if not plan.covers(wanted, folder.path):
        folder.release()
        return None
    there = {cell: file for cell, file in plan.files.items() if (folder.path / file).exists()}
    spool = Spool(folder.path, there, _layouts(there, dataset), buffer_bytes)
    if (
        spool.truncate(checkpoint.files)
        and spool.is_intact(wanted.files)
        and checkpoint.has_counts(folder.path, wanted.coders)
    ):
        return OpenSpool(folder, plan, spool, checkpoint)
    _logger.warning("%s: a file is not what its checkpoint says; removed", folder.path)
    folder.remove()
    return None


def _new(root: Path, plan: PassPlan, dataset: TokenDataset, buffer_bytes: int) -> OpenSpool:
    layouts = _layouts(plan.files, dataset)
    try:
        folder = SpoolFolder.new(root, plan.key)
    except OSError as error:
        raise unwritable(root, error) from error
    spool = Spool(folder.path, plan.files, layouts, buffer_bytes)
    opened = OpenSpool(folder, plan, spool, None)
    try:
        spool.create()
        _write_plan(folder.path, plan)
    except BaseException:
        folder.remove()
        raise
    return opened


def _set_aside(opened: OpenSpool, root: Path, layers: Collection[LayerKey]) -> None:
    """Moves layers that are not wanted now to a spool of their own, which can be gone on with.

    Killed in the middle, these layers begin anew and the others do not notice.
    """
    assert opened.checkpoint is not None
    here, aside = opened.folder.path, opened.plan.only(layers)
    checkpoint = opened.checkpoint.only(layers, aside.files.values())
    _write_plan(here, opened.plan.only(opened.plan.coders.keys() - set(layers)))
    opened.plan = opened.plan.only(opened.plan.coders.keys() - set(layers))
    for cell in aside.files:
        opened.spool.forget(cell)
    try:
        folder = SpoolFolder.new(root, opened.plan.key)
        for file in checkpoint.files:
            if (here / file).exists():
                (here / file).rename(folder.path / file)
        checkpoint.write(folder.path)
    except OSError as error:
        raise unwritable(root, error) from error
    _write_plan(folder.path, aside)
    _logger.info("%s go on another time, from %s", ", ".join(map(str, layers)), folder.path)
    folder.release()


def _write_plan(folder: Path, plan: PassPlan) -> None:
    try:
        write_whole(PassPlan.path_in(folder), plan.to_json())
    except OSError as error:
        raise unwritable(folder, error) from error


def _layouts(cells: Iterable[Cell], dataset: TokenDataset) -> dict[Cell, KeyLayout]:
    return {cell: KeyLayout.of(dataset, cell.range) for cell in cells}
