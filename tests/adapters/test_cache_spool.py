"""Cells hold what the chunks held, however they are buffered; folders are locked and swept."""

import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from autointerp_dagster.adapters.cache.checkpoint import Checkpoint
from autointerp_dagster.adapters.cache.folders import SpoolFolder, default_spool_dir, sweep
from autointerp_dagster.adapters.cache.packing import KeyLayout
from autointerp_dagster.adapters.cache.spool import Spool
from autointerp_dagster.core.activations import FiringCounts, Nonzeros
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.schemas import ACTIVATIONS
from autointerp_dagster.core.types import Cell, LatentRange, LayerKey

LAYER, OTHER = LayerKey("sae", "layers.0"), LayerKey("sae", "layers.1")
WHOLE = LatentRange(0, 64)
QUARTERS = [LatentRange(i, i + 16) for i in range(0, 64, 16)]


def chunk_of(seed: int, contexts: range, n: int = 50) -> Nonzeros:
    """``n`` random places in some contexts, sorted, with bfloat16 values."""
    rng = np.random.default_rng(seed)
    places = rng.choice(64 * len(contexts) * 8, size=n, replace=False)
    places.sort()
    latent, rest = np.divmod(places, len(contexts) * 8)
    values = torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 1e6 + 1e-30
    return Nonzeros(
        latent.astype(np.uint32),
        (contexts.start + rest // 8).astype(np.uint32),
        (rest % 8).astype(np.uint16),
        values.to(torch.bfloat16).float().numpy(),
    )


CHUNKS = [chunk_of(i, range(i * 3, i * 3 + 3)) for i in range(20)]


def spool_of(folder: Path, cells: list[Cell], buffer_bytes: int = 1 << 20) -> Spool:
    files = {cell: f"{i}.keys" for i, cell in enumerate(cells)}
    layouts = {cell: KeyLayout(cell.range.start, 6, 3) for cell in cells}
    spool = Spool(folder, files, layouts, buffer_bytes)
    spool.create()
    return spool


def cells_of(layer: LayerKey, ranges: list[LatentRange]) -> list[Cell]:
    return [Cell(layer, latents) for latents in ranges]


def expected(latents: LatentRange) -> pl.DataFrame:
    frame = pl.concat([pl.DataFrame(chunk._asdict()) for chunk in CHUNKS])
    of_range = pl.col("latent").is_between(latents.start, latents.stop - 1)
    return ACTIVATIONS.conform(frame.filter(of_range))


def read(spool: Spool, cell: Cell, block_keys: int) -> pl.DataFrame:
    return pl.concat([ACTIVATIONS.empty(), *spool.frames(cell, block_keys)])


@pytest.mark.parametrize("block_keys", [7, 100, 1 << 20])
@pytest.mark.parametrize("buffer_bytes", [1, 3000, 1 << 20])
def test_a_cell_holds_its_nonzeros_bit_for_bit_whatever_the_buffers(
    tmp_path, buffer_bytes, block_keys
):
    cells = [*cells_of(LAYER, QUARTERS), Cell(OTHER, WHOLE)]
    spool = spool_of(tmp_path, cells, buffer_bytes)
    for chunk in CHUNKS:
        spool.append(LAYER, chunk)
    spool.flush()
    for cell in cells[:4]:
        assert read(spool, cell, block_keys).equals(expected(cell.range))
        assert read(spool, cell, block_keys).equals(expected(cell.range))  # again
    assert read(spool, cells[4], block_keys).equals(ACTIVATIONS.empty())


def test_memory_holds_no_more_than_the_buffer_and_disk_eight_bytes_per_nonzero(tmp_path):
    spool = spool_of(tmp_path, cells_of(LAYER, QUARTERS), buffer_bytes=2000)
    for chunk in CHUNKS * 10:
        spool.append(LAYER, chunk)
        assert spool.n_buffered <= 2000
    on_disk = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert on_disk + spool.n_buffered == 10 * 20 * 50 * 8


def test_what_came_after_a_checkpoint_is_cut_off(tmp_path):
    (cell,) = cells = cells_of(LAYER, [WHOLE])
    spool = spool_of(tmp_path, cells)
    spool.append(LAYER, CHUNKS[0])
    sizes = spool.sync()
    spool.append(LAYER, CHUNKS[1])
    spool.flush()
    assert spool.truncate(sizes)
    assert read(spool, cell, 100).height == 50
    (tmp_path / "0.keys").write_bytes(b"")
    assert not spool.truncate(sizes)


def test_a_cell_that_was_not_asked_for_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="was not asked for"):
        list(spool_of(tmp_path, cells_of(LAYER, QUARTERS)).frames(Cell(LAYER, WHOLE)))


def test_a_folder_that_cannot_be_written_is_named_with_what_to_do(tmp_path):
    spool = spool_of(tmp_path, cells_of(LAYER, [WHOLE]))
    (tmp_path / "0.keys").unlink()
    (tmp_path / "0.keys").mkdir()
    spool.append(LAYER, CHUNKS[0])
    with pytest.raises(StoreError, match=r"0\.keys: cannot be written.*AUTOINTERP_SPOOL"):
        spool.flush()


def test_a_locked_folder_is_not_claimed_by_another_until_it_is_released(tmp_path):
    folder = SpoolFolder.new(tmp_path, "0" * 16)
    assert SpoolFolder.claim(folder.path) is None
    folder.release()
    again = SpoolFolder.claim(folder.path)
    assert again is not None
    again.remove()
    assert list(tmp_path.iterdir()) == []
    assert SpoolFolder.claim(folder.path) is None


def test_spools_that_nobody_touched_for_a_week_are_swept(tmp_path, caplog):
    old, locked, fresh = (SpoolFolder.new(tmp_path, digit * 16) for digit in "abc")
    stranger = tmp_path / "a-folder-of-somebody-else"
    stranger.mkdir()
    week_ago = time.time() - 8 * 24 * 3600
    for path in (old.path, locked.path, stranger):
        for file in [path, *path.iterdir()]:
            os.utime(file, (week_ago, week_ago))
    old.release()
    fresh.release()
    with caplog.at_level(logging.INFO):
        sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        locked.path.name, fresh.path.name, stranger.name
    }  # fmt: skip
    assert str(old.path) in caplog.text
    assert caplog.text.count("removed the spool") == 1
    sweep(tmp_path / "missing")


def test_the_environment_names_the_folder_of_spools(monkeypatch, tmp_path):
    monkeypatch.setenv("AUTOINTERP_SPOOL", str(tmp_path))
    assert default_spool_dir() == tmp_path
    monkeypatch.delenv("AUTOINTERP_SPOOL")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = default_spool_dir()
    assert mine == tmp_path / f"autointerp-spool-{os.getuid()}"
    assert mine.stat().st_mode & 0o777 == 0o700
    mine.chmod(0o755)
    assert default_spool_dir().stat().st_mode & 0o777 == 0o700


def test_a_default_folder_that_is_a_link_or_of_another_user_is_refused(monkeypatch, tmp_path):
    monkeypatch.delenv("AUTOINTERP_SPOOL")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path, me = default_spool_dir(), os.getuid()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"or is a link.*AUTOINTERP_SPOOL"):
        default_spool_dir()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    (tmp_path / f"autointerp-spool-{me + 1}").mkdir()
    with pytest.raises(StoreError, match=f"belongs to user {me} .* of user {me + 1}"):
        default_spool_dir()


def test_a_forked_child_does_not_keep_its_parents_lock(tmp_path):
    folder = SpoolFolder.new(tmp_path, "0" * 16)
    (reader, writer), (is_up, up) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        folder.remove()  # is not the child's to remove
        os.write(up, b"x")
        os.read(reader, 1)  # lives on until it is told
        os._exit(0)
    os.read(is_up, 1)
    assert SpoolFolder.claim(folder.path) is None  # the parent has it all the same
    folder.release()
    again = SpoolFolder.claim(folder.path)
    os.write(writer, b"x")
    os.waitpid(child, 0)
    for end in (reader, writer, is_up, up):
        os.close(end)
    assert again is not None


def test_a_token_with_two_activations_of_one_latent_is_an_error_that_names_the_folder(tmp_path):
    (cell,) = cells = cells_of(LAYER, [WHOLE])
    spool = spool_of(tmp_path, cells)
    for chunk in (CHUNKS[0], CHUNKS[1], CHUNKS[0]):
        spool.append(LAYER, chunk)
    spool.flush()
    for block_keys in (1, 7, 1 << 20):
        with pytest.raises(StoreError, match=f"two activations.*remove the folder {tmp_path}"):
            read(spool, cell, block_keys)


def test_counts_are_written_layer_by_layer_and_only_the_last_are_kept(tmp_path):
    counts = FiringCounts(64)
    counts.add(CHUNKS[0])

    def tables(n_before: int) -> Iterator[tuple[LayerKey, pl.DataFrame]]:
        yield LAYER, counts.table()
        assert len(list(tmp_path.glob("*.counts"))) == n_before + 1  # written before the next
        yield OTHER, FiringCounts(7).table()

    for n_chunks, n_before in ((1, 0), (2, 2)):
        Checkpoint.make(tmp_path, n_chunks, {}, tables(n_before))
    assert len(list(tmp_path.glob("*.counts"))) == 2
    found = Checkpoint.read(tmp_path)
    assert found is not None
    assert found.n_chunks == 2
    assert found.table(tmp_path, LAYER).equals(counts.table())
    assert found.table(tmp_path, OTHER).equals(FiringCounts(7).table())
