"""A whole pass over a tiny subject model, each cell committed: for tests that stop it and go on.

Run as a program it forks a pass again and again and kills each at a random moment.
"""

import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from autointerp_dagster.adapters.cache import (
    CachedLayers,
    PassIdentity,
    SpoolSettings,
    cache_layers,
)
from autointerp_dagster.adapters.coder_files import open_coder
from autointerp_dagster.adapters.manifests import (
    Manifest,
    Provenance,
    content_hash_of,
    fingerprint_of,
)
from autointerp_dagster.adapters.shards import write_shard
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.adapters.subject_models import SubjectModel, open_subject_model
from autointerp_dagster.core.config import FileCoderConfig, SubjectModelConfig, TokenConfig
from autointerp_dagster.core.schemas import FIRING_COUNTS
from autointerp_dagster.core.tokens import Document, TokenDataset, build_token_dataset
from autointerp_dagster.core.types import Cell, LatentRange, LayerKey, Progress, silent

LAYER, OTHER = LayerKey("sae", "layers.0"), LayerKey("sae", "layers.1")
WHOLE = LatentRange(0, 64)
QUARTERS = [LatentRange(i, i + 16) for i in range(0, 64, 16)]
WORDS = ["river", "mill", "cat", "naïve", "中文", "🙂", "two hundred"]
CAREFUL = SpoolSettings(buffer_bytes=2000, block_keys=200, checkpoint_s=0.0)
"""Everything goes through every path of a large pass."""


class StoppedError(Exception):
    """What stops a pass in these tests."""


class StopsAfter:
    """A progress display that stops the pass, and remembers what it was told."""

    def __init__(self, n_chunks: int | None = None) -> None:
        self.n_chunks = n_chunks
        self.told: list[tuple[str, int]] = []

    def __call__(self, items, *, total, description, unit="it", note=None) -> Iterator:
        self.told.append((description, total))
        yield from items if self.n_chunks is None else itertools.islice(items, self.n_chunks)
        if self.n_chunks is not None and self.n_chunks < total:
            raise StoppedError


def subject_model_at(folder: Path, batch_size: int = 3) -> SubjectModel:
    return open_subject_model(
        SubjectModelConfig(source=str(folder), dtype="float32", device="cpu", batch_size=batch_size)
    )


def dataset_of(model: SubjectModel, n_documents: int = 9) -> TokenDataset:
    rng = np.random.default_rng(0)
    documents = [
        Document(f"d{i}", " ".join(rng.choice(WORDS, size=8 + 5 * (i % 9))))
        for i in range(n_documents)
    ]
    return build_token_dataset(
        documents, model.encode, model.bos_id, TokenConfig(context_len=16, min_visible=4)
    )


def coders_in(folder: Path) -> dict[LayerKey, object]:
    config = FileCoderConfig(path=folder)
    return {layer: open_coder(config, layer.hookpoint).placed for layer in (LAYER, OTHER)}


def fingerprint(cell: Cell) -> str:
    return fingerprint_of("activation_cache", "2", str(cell), {}, ())


def identity_of(*layers: LayerKey, **more: object) -> PassIdentity:
    return PassIdentity({"subject_model": "tiny", **more}, {layer: "coder" for layer in layers})


class Pass:
    """One set of inputs and places; may be run again and again."""

    def __init__(self, model_dir: Path, coders_dir: Path, root: Path, n_documents: int = 9) -> None:
        self.model = subject_model_at(model_dir)
        self.dataset = dataset_of(self.model, n_documents)
        self.coders = coders_in(coders_dir)
        self.store, self.spools = Store(root / "store"), root / "spools"

    def caching(
        self,
        layers: Iterable[LayerKey] = (LAYER, OTHER),
        ranges: Iterable[LatentRange] | Mapping[LayerKey, list[LatentRange]] = tuple(QUARTERS),
        *,
        progress: Progress = silent,
        settings: SpoolSettings = CAREFUL,
        identity: PassIdentity | None = None,
    ) -> CachedLayers:
        layers = list(layers)
        coders = {layer: self.coders[layer] for layer in layers}
        of_layer = ranges if isinstance(ranges, Mapping) else {key: list(ranges) for key in layers}
        identity = identity or identity_of(*layers)
        return cache_layers(
            self.model, self.dataset, coders, of_layer, self.spools, progress, identity, settings
        )

    def commit(self, cached: CachedLayers, cell: Cell) -> Manifest:
        counts = cached.firing_counts(cell.layer)
        mine = counts["n_tokens"].to_numpy()[cell.range.start : cell.range.stop]
        frames = cached.frames(cell.layer, cell.range)
        blobs = write_shard(self.store, frames, mine.astype(np.int64))
        blobs.append(self.store.put_table(FIRING_COUNTS, counts))
        return self.store.commit(
            Manifest(
                stage="activation_cache",
                stage_version="2",
                cell=str(cell),
                input_fingerprint=fingerprint(cell),
                content_hash=content_hash_of(tuple(blobs), "ok"),
                complete=True,
                parameters={},
                upstream=(),
                blobs=tuple(blobs),
                provenance=Provenance(study="s", run_id="r", started="", finished="", seconds=1.0),
            )
        )

    def manifest(self, cell: Cell) -> Manifest | None:
        return self.store.find("activation_cache", fingerprint(cell))

    def run(self, **how: object) -> None:
        """Everything that is not committed yet."""
        cells = [Cell(layer, latents) for layer in (LAYER, OTHER) for latents in QUARTERS]
        pending = [cell for cell in cells if self.manifest(cell) is None]
        layers = sorted({cell.layer for cell in pending})
        if not pending:
            return
        ranges = {layer: [c.range for c in pending if c.layer == layer] for layer in layers}
        with self.caching(layers, ranges, **how) as cached:
            for cell in pending:
                self.commit(cached, cell)
                cached.discard([cell])
            cached.discard([cell for cell in cached.cells() if self.manifest(cell) is not None])

    def blobs(self) -> dict[str, str]:
        """What each cell's files are called, which is what their bytes hash to."""
        cells = [Cell(layer, latents) for layer in (LAYER, OTHER) for latents in QUARTERS]
        made = {str(cell): self.manifest(cell) for cell in cells}
        return {
            f"{cell} {blob.name}": blob.path
            for cell, manifest in made.items()
            if manifest is not None
            for blob in manifest.blobs
        }


def _noting(path: Path) -> Progress:
    """Writes down what a run says that it does, so that the one who kills it knows."""

    def note(items, *, total, description, unit="it", note=None) -> Iterator:
        with path.open("a") as file:
            file.write(f"{description}\n")
        yield from items

    return note


def _forked(model_dir: Path, coders_dir: Path, root: Path) -> int:
    """A process that runs the pass. The parent only imports: threads do not survive a fork.

    Comes back when the model is loaded and the pass begins.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            work = Pass(model_dir, coders_dir, root, n_documents=24)
            _ = work.model.base_model
            os.write(writer, b"x")
            work.run(progress=_noting(root.parent / "said"))
            os._exit(0)
        except BaseException as error:  # noqa: BLE001  # the fork of a test must end here
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    return child


def _files(root: Path) -> dict[str, str]:
    """What each committed cell's files are called, from the manifests."""
    paths = (root / "store" / "activation_cache").glob("*/*.json")
    made = [json.loads(path.read_text()) for path in paths]
    return {f"{m['cell']} {blob['name']}": blob["path"] for m in made for blob in m["blobs"]}


def kill_again_and_again(model_dir: Path, coders_dir: Path, root: Path, n_kills: int) -> dict:
    """Kills forks at random moments until ``n_kills`` were hit; what is left must be the same.

    Every third starts anew and is killed at its first checkpoint, so that there is one to go on
    from.
    """
    rng = np.random.default_rng(0)
    child, started = _forked(model_dir, coders_dir, root / "whole"), time.monotonic()
    _finish(child)
    seconds, expected = time.monotonic() - started, _files(root / "whole")
    again = root / "again"
    spools = again / "spools"
    hit, finished = 0, 0
    while hit < n_kills:
        if hit % 3 == 2:
            shutil.rmtree(again, ignore_errors=True)
            child = _forked(model_dir, coders_dir, again)
            while not any(spools.glob("*/checkpoint.json")):
                time.sleep(0.001)
        else:
            child = _forked(model_dir, coders_dir, again)
            time.sleep(rng.uniform(0.0, seconds))
        done, _ = os.waitpid(child, os.WNOHANG)
        if done == 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            hit += 1
            if hit % 5 and hit < n_kills:  # after every fifth kill it may end
                continue
            _finish(_forked(model_dir, coders_dir, again))
        if _files(again) != expected:
            sys.exit(f"after {hit} kills the blobs differ")
        finished += 1
        shutil.rmtree(again)
    resumed = (root / "said").read_text().count("cache from")
    return {"killed": hit, "finished": finished, "resumed": resumed, "n_blobs": len(expected)}


def _finish(child: int) -> None:
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"a pass failed with status {status}")


if __name__ == "__main__":
    model_dir, coders_dir, root = map(Path, sys.argv[1:4])
    sys.stdout.write(
        json.dumps(kill_again_and_again(model_dir, coders_dir, root, int(sys.argv[4])))
    )
