"""The neighbours asset on the planted world: what sets of tokens say, and stale with them."""

import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
import torch
from bench import SMALL, Bench
from planted import DIM_OF, NUM_LATENTS, WINDOW_LEN, build_world
from polars.testing import assert_frame_equal
from safetensors.torch import load_file, save_file

from autointerp_dagster.adapters.llm.fake.server import FakeLLMServer
from autointerp_dagster.core.errors import StoreError
from autointerp_dagster.core.schemas import ACTIVATIONS

N, N_WINDOWS = 4, 6
NEIGHBOURS: dict[str, Any] = {
    "measures": ["cofiring", "decoder", "encoder"],
    "n_neighbours": N,
    "n_windows": N_WINDOWS,
}
OVERRIDES = {**SMALL, "neighbours": NEIGHBOURS}
WEIGHTS = "sae.safetensors"


@pytest.fixture(scope="module")
def made(server: FakeLLMServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Both layers up to their neighbours, of coders that have more than orthogonal directions."""
    folder = tmp_path_factory.mktemp("neighbours")
    world = build_world(folder / "world")
    for number, hookpoint in enumerate(NUM_LATENTS):
        path = world / "coders" / hookpoint / WEIGHTS
        tensors = load_file(path)
        generator = torch.Generator().manual_seed(number)
        dead = tensors["encoder.bias"] < -1
        for name, rows in (("W_dec", slice(None)), ("encoder.weight", dead)):
            shape = tensors[name][rows].shape  # rows of dead latents: what fires stays
            tensors[name][rows] = 1e-3 * torch.randn(shape, generator=generator)
        save_file(tensors, path)
    with dg.DagsterInstance.ephemeral() as kept:
        bench = Bench(folder, world, server.base_url, kept, OVERRIDES)
        bench.run(until="neighbours")
        yield bench


@pytest.fixture
def linked(made: Bench, instance: dg.DagsterInstance, tmp_path: Path) -> Bench:
    """The same study over a copy of store and world, linked to what the store holds."""
    shutil.copytree(made.world, tmp_path / "world")
    bench = replace(made.copied_to(tmp_path, instance), world=tmp_path / "world")
    bench.run(until="neighbours")
    assert {name: head.path for name, head in bench.heads().items()} == {
        name: head.path for name, head in made.heads().items()
    }
    return bench


def fired_on(bench: Bench, hookpoint: str) -> dict[int, set[tuple[int, int]]]:
    fired = defaultdict(set)
    heads = bench.heads()
    for cell in bench.study.cells:
        head = heads["activation_cache", str(cell)]
        if cell.layer.hookpoint == hookpoint and head.status == "ok":
            frame = bench.store.table(head.blob(ACTIVATIONS.name))
            for latent, context, position in frame.drop("activation").iter_rows():
                fired[latent].add((context, position))
    return fired


def stale_neighbours(bench: Bench) -> set[str]:
    return {place for asset, place in bench.stale() if asset == "neighbours"}


def test_cofiring_neighbours_of_every_range_are_those_of_sets_of_tokens(made: Bench) -> None:
    found = made.table("neighbours", "neighbours").filter(measure="cofiring")
    for hookpoint in NUM_LATENTS:
        fired = fired_on(made, hookpoint)
        expected = []
        for f, mine in sorted(fired.items()):
            pairs = [(-len(mine & o) / len(mine | o), g) for g, o in fired.items() if g != f]
            best = sorted(pair for pair in pairs if pair[0] < 0)[:N]
            expected += [(f, rank, g, -minus) for rank, (minus, g) in enumerate(best)]
        assert len(expected) > 5
        rows = found.filter(hookpoint=hookpoint).select("latent", "rank", "neighbour", "value")
        assert rows.rows() == expected
    assert stale_neighbours(made) == set()


@pytest.mark.parametrize(("measure", "name"), [("decoder", "W_dec"), ("encoder", "encoder.weight")])
def test_cosines_are_those_of_the_coders_weights(made: Bench, measure: str, name: str) -> None:
    found = made.table("neighbours", "neighbours").filter(measure=measure)
    for hookpoint, n_latents in NUM_LATENTS.items():
        rows = load_file(made.world / "coders" / hookpoint / WEIGHTS)[name]
        cosine = torch.cosine_similarity(rows[:, None], rows[None], dim=-1).fill_diagonal_(-1)
        best = cosine.topk(N).values.tolist()
        mine = found.filter(hookpoint=hookpoint)
        assert mine["latent"].n_unique() >= n_latents - 1  # a latent of h.0 reads nothing
        for latent, rank, value in mine.select("latent", "rank", "value").iter_rows():
            assert value == pytest.approx(best[latent][rank], abs=1e-6)


def test_windows_are_those_in_which_neighbours_by_the_first_measure_fire(made: Bench) -> None:
    heads = made.heads()
    by_latent: dict[int, pl.DataFrame] = {}
    fired = fired_on(made, "h.1")
    for cell in made.study.cells[4:7]:
        head = heads["neighbours", str(cell)]
        near = made.store.table(head.blob("neighbours")).filter(measure="cofiring")
        windows = made.store.table(head.blob("neighbour_windows"))
        assert set(windows["latent"]) == set(near["neighbour"])
        for (latent,), rows in windows.partition_by("latent", as_dict=True).items():
            assert rows.height == N_WINDOWS
            assert_frame_equal(by_latent.setdefault(latent, rows), rows)  # whatever the cell
            for window, values in rows.select("window_id", "activations").iter_rows():
                context, start = window >> 16, window & 0xFFFF
                places = [(context, start + i) for i in range(WINDOW_LEN)]
                assert [value > 0 for value in values] == [p in fired[latent] for p in places]
    assert by_latent


def test_a_range_outside_of_the_coder_is_committed_empty(made: Bench) -> None:
    outside = made.heads()["neighbours", str(made.study.cells[-1])]
    assert (outside.status, outside.blobs) == ("outside_coder", ())


def test_the_size_of_a_range_changes_no_row(
    made: Bench, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    overrides = {**OVERRIDES, "range_size": 100, "layers": ["h.1"], "floors": {"donor_block": 20}}
    whole = Bench(tmp_path, made.world, made.base_url, instance, overrides)
    whole.run(until="neighbours")
    assert len(whole.study.cells) == 1
    parts = made.table("neighbours", "neighbours").filter(hookpoint="h.1")
    assert_frame_equal(parts, whole.table("neighbours", "neighbours"))
    windows = made.table("neighbours", "neighbour_windows").filter(hookpoint="h.1")
    once = windows.unique(["latent", "window_id"], maintain_order=True)
    assert_frame_equal(once, whole.table("neighbours", "neighbour_windows"))


def test_contexts_are_drawn_where_there_are_too_many_tokens(linked: Bench) -> None:
    few = {"measures": ["cofiring"], "max_tokens": 1000}
    drawn = replace(linked, overrides={**OVERRIDES, "neighbours": {**NEIGHBOURS, **few}})
    cells = drawn.study.cells
    assert stale_neighbours(drawn) == {str(cell) for cell in cells}
    drawn.run(layers=["sae@h.0"], until="neighbours")
    summary = drawn.heads()["neighbours", str(cells[0])].summary
    assert summary["n_tokens_counted"] == 15 * 63  # whole contexts
    assert set(summary["median_nearest"]) == {"cofiring"}
    event = drawn.instance.get_latest_materialization_event(
        dg.AssetKey([drawn.study.name, "neighbours"])
    )
    assert event is not None
    assert event.asset_materialization is not None
    assert {"preview", "nearest", "n_windows"} <= set(event.asset_materialization.metadata)


def test_a_change_in_one_range_makes_the_neighbours_of_its_whole_layer_stale(
    linked: Bench,
) -> None:
    cells, before = linked.study.cells, linked.heads()
    linked.run(layers=["sae@h.1"], ranges=[str(cells[6].range)], until="activation_cache")
    assert stale_neighbours(linked) == set()  # the same content, reported again

    path = linked.world / "coders" / "h.1" / WEIGHTS
    tensors = load_file(path)
    tensors["encoder.weight"][7] = 0.0
    tensors["encoder.weight"][7, DIM_OF["colour"]] = 1.0
    save_file(tensors, path)
    linked.observe("sparse_coders")
    linked.run(layers=["sae@h.1"], until="activation_cache")
    after = linked.heads()
    layer = {str(cell) for cell in cells if cell.layer.hookpoint == "h.1"}
    assert {
        place
        for asset, place in before
        if asset == "activation_cache"
        and before[asset, place].content_hash != after[asset, place].content_hash
    } < layer
    assert stale_neighbours(linked) == layer

    linked.run(layers=["sae@h.1"], ranges=[str(cells[5].range)], until="neighbours")
    assert stale_neighbours(linked) == layer - {str(cells[5])}
    linked.run(until="neighbours")
    assert stale_neighbours(linked) == set()


@pytest.mark.slow
def test_staleness_of_a_layer_does_not_need_the_coders(linked: Bench) -> None:
    """Without a cosine, only the activations of the layer decide."""
    only = {**OVERRIDES, "neighbours": {**NEIGHBOURS, "measures": ["cofiring"]}}
    bench = replace(linked, overrides=only)
    bench.run(until="neighbours")
    path = bench.world / "coders" / "h.0" / WEIGHTS
    tensors = load_file(path)
    tensors["encoder.weight"][50] = tensors["encoder.weight"][9]
    save_file(tensors, path)
    bench.observe("sparse_coders")
    assert stale_neighbours(bench) == set()
    bench.run(layers=["sae@h.0"], until="activation_cache")
    layer = {str(cell) for cell in bench.study.cells if cell.layer.hookpoint == "h.0"}
    assert stale_neighbours(bench) == layer
    bench.run(layers=["sae@h.0"], until="neighbours")
    assert stale_neighbours(bench) == set()


def test_a_damaged_shard_of_another_range_stops_the_run_and_is_named(linked: Bench) -> None:
    blob = linked.heads()["activation_cache", str(linked.study.cells[1])].blob(ACTIVATIONS.name)
    path = Path(linked.study.store) / blob.path
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(bytes(damaged))
    other = {**NEIGHBOURS, "n_neighbours": 2}
    bench = replace(linked, overrides={**OVERRIDES, "neighbours": other})
    ranges = [str(bench.study.cells[0].range)]
    with pytest.raises((dg.DagsterError, StoreError)) as raised:
        bench.run(layers=["sae@h.0"], ranges=ranges, until="neighbours")
    error = raised.value if isinstance(raised.value, StoreError) else raised.value.__cause__
    assert isinstance(error, StoreError)
    assert blob.path in str(error)
