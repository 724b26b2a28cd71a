"""The activation cache as its asset stores it: whole cells, also after a stop while storing."""

import shutil
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl
import pytest
from bench import Bench
from safetensors.numpy import load_file, save_file

from autointerp_dagster.adapters.manifests import Manifest
from autointerp_dagster.adapters.shards import ActivationShard
from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.types import LatentRange

BLOBS = {"activations", "activation_offsets", "firing_counts", "latent_statistics"}


def cells_of(bench: Bench) -> dict[str, Manifest]:
    heads = bench.heads().items()
    return {place: head for (asset, place), head in heads if asset == "activation_cache"}


def stop_at_the_second_cell(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves a spool with all but one or two cells in it."""
    set_head, n_cells = Store.set_head, 0

    def fails_at_the_second(store: Store, study: str, asset: str, *rest: object) -> None:
        nonlocal n_cells
        n_cells += asset == "activation_cache"
        if asset == "activation_cache" and n_cells == 2:
            raise StoreError("the disk is full")
        set_head(store, study, asset, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Store, "set_head", fails_at_the_second)
        with pytest.raises(StoreError, match="the disk is full"):
            bench.run(until="activation_cache")


@pytest.mark.parametrize("change", ["coder", "dataset", "dtype", "compiled"])
def test_a_spool_of_another_coder_dataset_dtype_or_compiler_is_not_gone_on_with(
    world: Path,
    instance: dg.DagsterInstance,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    monkeypatch.setenv("AUTOINTERP_SPOOL", str(tmp_path / "spool"))
    bench = Bench(tmp_path / "a", world, "http://127.0.0.1:9", instance)
    stop_at_the_second_cell(bench, monkeypatch)
    kept = list((tmp_path / "spool").iterdir())
    if change == "dtype":
        bench.overrides = {"models": {"subject": {"dtype": "bfloat16"}}}
    elif change == "dataset":
        bench.overrides = {"tokens": {"n_tokens": 8_000}}
    elif change == "compiled":
        bench.overrides = {"coders": {"sae": {"compiled": True}}}
    else:
        coders = shutil.copytree(world / "coders", tmp_path / "coders")
        for path in coders.glob("*/sae.safetensors"):
            tensors = load_file(path)
            tensors["encoder.bias"] = tensors["encoder.bias"] + np.float32(0.125)
            save_file(tensors, path)
        bench.overrides = {"coders": {"sae": {"path": str(coders)}}}
    bench.run(until="activation_cache")
    cells = cells_of(bench)
    assert len(cells) > 2
    assert not any("resumed_at_chunk" in m.provenance.execution for m in cells.values())
    assert list((tmp_path / "spool").iterdir()) == kept  # for the pass that it is of


def test_a_cell_stopped_while_it_was_stored_is_sorted_from_the_spool(
    world: Path,
    instance: dg.DagsterInstance,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AUTOINTERP_SPOOL", str(tmp_path / "spool"))
    bench = Bench(tmp_path / "a", world, "http://127.0.0.1:9", instance)
    stop_at_the_second_cell(bench, monkeypatch)
    assert len(list((tmp_path / "spool").iterdir())) == 1
    bench.run(until="activation_cache")
    assert list((tmp_path / "spool").iterdir()) == []

    cells = cells_of(bench)
    resumed = [m.provenance.execution.get("resumed_at_chunk") for m in cells.values()]
    n_chunks = {m.provenance.execution["n_chunks"] for m in cells.values()}
    assert resumed.count(None) == 2  # stored by the first run, though only one got its head
    assert set(resumed) - {None} <= n_chunks  # nothing was computed again
    inside = {place: manifest for place, manifest in cells.items() if manifest.status == "ok"}
    assert len(inside) > 2
    for place, manifest in inside.items():
        assert {blob.name for blob in manifest.blobs} == BLOBS
        shard = ActivationShard(bench.store, manifest)
        latents = LatentRange.parse(place.rsplit("/", maxsplit=1)[1])
        assert shard.latents == range(latents.start, latents.stop)
        rows = pl.concat(shard.frames())
        counts = np.bincount(rows["latent"], minlength=latents.stop)[latents.start :]
        statistics = bench.store.table(manifest.blob("latent_statistics"))
        assert statistics["n_tokens"].to_list() == counts.tolist() == shard.n_rows.tolist()
