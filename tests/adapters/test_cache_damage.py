"""A spool that is damaged is never trusted, and never stands in the way."""

import json
import logging
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from cache_pass import LAYER, OTHER, QUARTERS, Pass, StoppedError, StopsAfter

from autointerp_dagster.core.errors import StoreError


@pytest.fixture
def make(
    tmp_path: Path, tiny_subject_model_dir: Path, tiny_sparsify_dir: Path
) -> Callable[..., Pass]:
    def make(name: str) -> Pass:
        return Pass(tiny_subject_model_dir, tiny_sparsify_dir, tmp_path / name)

    return make


def flip(path: Path, at: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def largest(work: Pass) -> Path:
    return max(work.spools.glob("*/*.keys"), key=lambda file: file.stat().st_size)


def without_chunks(path: Path) -> None:
    _, _, body = path.read_bytes().partition(b"\n")
    about = json.loads(body)
    about.pop("n_chunks")
    changed = json.dumps(about).encode()
    path.write_bytes(b"%08x\n%b" % (zlib.crc32(changed), changed))


DAMAGES = {
    "value": lambda work: flip(largest(work)),  # the lowest bit of an activation
    "context": lambda work: flip(largest(work), at=3),
    "no plan": lambda work: next(work.spools.glob("*/pass.json")).write_text(""),
    "other plan": lambda work: next(work.spools.glob("*/pass.json")).write_text("[]"),
    "poor plan": lambda work: next(work.spools.glob("*/pass.json")).write_text("{}"),
    "no checkpoint": lambda work: next(work.spools.glob("*/checkpoint.json")).write_text(""),
    "checkpoint": lambda work: flip(next(work.spools.glob("*/checkpoint.json")), at=-40),
    "poor checkpoint": lambda work: without_chunks(next(work.spools.glob("*/checkpoint.json"))),
    "counts": lambda work: flip(next(work.spools.glob("*/*.counts")), at=-1),
    "no counts": lambda work: next(work.spools.glob("*/*.counts")).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_spool_is_named_and_the_pass_begins_anew(make, caplog, damage):
    work, plain = make("a"), make("b")
    with pytest.raises(StoppedError):
        work.run(progress=StopsAfter(4))
    (folder,) = work.spools.iterdir()
    DAMAGES[damage](work)
    progress = StopsAfter()
    with caplog.at_level(logging.WARNING):
        work.run(progress=progress)
    assert progress.told[0][0] == "activation cache"  # from the first chunk
    assert str(folder) in caplog.text
    assert list(work.spools.iterdir()) == []
    plain.run()
    assert work.blobs() == plain.blobs()


def test_a_missing_file_of_a_layer_not_wanted_now_does_not_matter(make):
    work, plain = make("a"), make("b")
    with pytest.raises(StoppedError):
        work.run(progress=StopsAfter(4))
    next(work.spools.glob("*/000000.keys")).unlink()  # of the first layer
    progress = StopsAfter()
    with work.caching([OTHER], progress=progress) as cached, plain.caching() as whole:
        assert "from 4 of" in progress.told[0][0]
        for latents in QUARTERS:
            assert cached.cell(OTHER, latents).equals(whole.cell(OTHER, latents))
    progress = StopsAfter()
    work.caching([LAYER], progress=progress).close()
    assert progress.told[0][0] == "activation cache"


@pytest.mark.parametrize("block_keys", [7, 1 << 20])
def test_damage_after_the_pass_is_named_and_the_next_run_begins_anew(make, block_keys):
    work, plain = make("a"), make("b")
    with work.caching() as cached:
        for file in work.spools.glob("*/*.keys"):
            flip(file, at=8)
        frames = cached._opened.spool.frames(next(iter(cached.cells())), block_keys)
        with pytest.raises(StoreError, match=f"begins anew.*remove the folder {cached.folder}"):
            next(frames)  # before any row is given
    work.run()
    plain.run()
    assert work.blobs() == plain.blobs()


def test_damaged_counts_after_the_pass_are_named(make):
    work = make("a")
    with work.caching() as cached:
        for file in work.spools.glob("*/*.counts"):
            flip(file, at=-1)
        with pytest.raises(StoreError, match=f"remove the folder {cached.folder}"):
            cached.firing_counts(LAYER)
