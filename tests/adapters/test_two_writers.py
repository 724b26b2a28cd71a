"""Several who write one cell at the same time, and others who read it meanwhile."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import polars as pl
import pytest

from autointerp_dagster.adapters.bulk import list_files
from autointerp_dagster.adapters.heads import read_heads
from autointerp_dagster.adapters.manifests import (
    Manifest,
    Part,
    Provenance,
    content_hash_of,
    fingerprint_of,
)
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.adapters.verifying import verify
from autointerp_dagster.core.schemas import ACTIVATIONS

CELL = "sae@layers.1/0000000-0000003"
PLACE = ("study", "activation_cache", CELL)
FINGERPRINT = fingerprint_of("activation_cache", "1", CELL, {}, ())
N_WRITERS, N_ROUNDS = 4, 5


def rows(n: int) -> pl.DataFrame:
    frame = pl.DataFrame({"latent": range(n), "context": 1, "position": 2, "activation": 0.5})
    return ACTIVATIONS.conform(frame)


def write_cell(store: Store, run_id: str) -> str:
    """What a run does that found nothing; all runs make the same."""
    blobs = (
        store.put_frames(ACTIVATIONS, [rows(5000)], name="frames").blob,
        store.put_table(ACTIVATIONS, rows(3), name="table"),
    )
    store.put_part("explanations", Part(name="x", fingerprint="abc", blob=blobs[1]))
    manifest = store.commit(
        Manifest(
            stage="activation_cache",
            stage_version="1",
            cell=CELL,
            input_fingerprint=FINGERPRINT,
            content_hash=content_hash_of(blobs, "ok"),
            complete=True,
            parameters={},
            upstream=(),
            blobs=blobs,
            provenance=Provenance(
                study="study", run_id=run_id, started="", finished=run_id, seconds=1.0
            ),
        )
    )
    store.set_head(*PLACE, manifest)
    assert manifest.path is not None
    return manifest.path


def read_cell(store: Store) -> bool:
    """Reads all that is there, whole; whether there was anything."""
    heads = read_heads(store, "study")
    assert heads.damaged == {}
    found = [store.head(*PLACE), store.find("activation_cache", FINGERPRINT)]
    for manifest in found:
        if manifest is not None:
            assert store.table(manifest.blob("frames")).equals(rows(5000))
            assert store.table(manifest.blob("table")).equals(rows(3))
    part = store.find_part("explanations", "abc")
    assert part is None or part.blob.n_rows == 3
    return found[0] is not None


def until(stop: threading.Event, read: Callable[[], bool]) -> int:
    n_read = 0
    while not stop.is_set():
        n_read += read()
    return n_read


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_cell_that_several_runs_write_at_once_is_never_half_there(request, tmp_path, kind):
    root = tmp_path if kind == "local" else request.getfixturevalue("s3").new_root()
    start, stop = threading.Barrier(N_WRITERS), threading.Event()

    def write(writer: int) -> list[str]:
        store = Store(root)
        start.wait()
        return [write_cell(store, f"{writer}-{number}") for number in range(N_ROUNDS)]

    with ThreadPoolExecutor(N_WRITERS + 1) as threads:
        reading = threads.submit(until, stop, lambda: read_cell(Store(root)))
        try:
            written = [path for paths in threads.map(write, range(N_WRITERS)) for path in paths]
        finally:
            stop.set()
        assert reading.result() > 0
    store = Store(root)
    head = store.head(*PLACE)
    assert head is not None
    assert head.path in written
    assert verify(store, "study").faults == []
    files = list_files(store.root, "")
    assert len([path for path in files if path.startswith("blobs/")]) == 2
    assert {path for path in files if path.startswith("activation_cache/")} == set(written)
    assert len(files) == 2 + N_WRITERS * N_ROUNDS + 1 + 1  # blobs, manifests, part, head
