"""One pass caches many layers; it goes on after a stop, and nothing but the inputs matters."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from cache_pass import (
    CAREFUL,
    LAYER,
    OTHER,
    QUARTERS,
    WHOLE,
    Pass,
    StoppedError,
    StopsAfter,
    identity_of,
    subject_model_at,
)

from autointerp_dagster.adapters.cache import CachedLayers, SpoolSettings, cache_layers
from autointerp_dagster.core.errors import CoderError, ModelError
from autointerp_dagster.core.schemas import ACTIVATIONS
from autointerp_dagster.core.types import Cell, LatentRange, LayerKey, silent

CELLS = [Cell(layer, latents) for layer in (LAYER, OTHER) for latents in QUARTERS]


@pytest.fixture
def make(
    tmp_path: Path, tiny_subject_model_dir: Path, tiny_sparsify_dir: Path
) -> Callable[..., Pass]:
    def make(name: str = "a", n_documents: int = 9) -> Pass:
        return Pass(tiny_subject_model_dir, tiny_sparsify_dir, tmp_path / name, n_documents)

    return make


def rows(cached: CachedLayers, ranges: list[LatentRange] = QUARTERS) -> list[pl.DataFrame]:
    layers = (LAYER, OTHER)
    return [cached.cell(layer, latents) for layer in layers for latents in ranges]


def folders(work: Pass) -> list[str]:
    return sorted(path.name for path in work.spools.iterdir())


def test_the_cache_equals_a_plain_loop_with_dense_encoding(make):
    work = make()
    with work.caching(ranges=[WHOLE]) as cached:
        cells = {layer: cached.cell(layer, WHOLE) for layer in (LAYER, OTHER)}
    expected: dict[LayerKey, list[tuple[int, int, int, float]]] = {LAYER: [], OTHER: []}
    for context in range(work.dataset.contexts.height):
        ids = torch.from_numpy(work.dataset.context_tokens(context)).long()[None]
        with torch.no_grad():
            states = work.model.model(input_ids=ids, output_hidden_states=True).hidden_states
        for layer, hidden in ((LAYER, states[1]), (OTHER, states[2])):
            dense = work.coders[layer].coder.encode_dense(hidden[0]).to(torch.bfloat16)
            for position in range(1, ids.shape[1]):
                for latent in torch.nonzero(dense[position] > 0)[:, 0].tolist():
                    value = float(dense[position, latent])
                    expected[layer].append((latent, context, position, value))
    for layer, found in cells.items():
        frame = pl.DataFrame(expected[layer], schema=list(ACTIVATIONS.columns), orient="row")
        assert_same(found, ACTIVATIONS.conform(frame))


def assert_same(a: pl.DataFrame, b: pl.DataFrame) -> None:
    """The same non-zeros; values may differ by one rounding step of bfloat16."""
    assert a.select(ACTIVATIONS.key).equals(b.select(ACTIVATIONS.key))
    np.testing.assert_allclose(a["activation"], b["activation"], rtol=2**-7)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_batch_size_and_order_of_layers_change_nothing(make, batch_size):
    work, other = make("a"), make("b")
    other.model = subject_model_at(other.model.folder, batch_size)
    with work.caching() as one, other.caching((OTHER, LAYER)) as two:
        for a, b in zip(rows(one), rows(two), strict=True):
            assert_same(a, b)
        for layer in (LAYER, OTHER):
            a, b = one.firing_counts(layer), two.firing_counts(layer)
            assert a.drop("max_activation").equals(b.drop("max_activation"))


def test_ranges_cut_the_same_rows_and_counts_are_of_the_whole_layer(make):
    beyond = LatentRange(64, 128)
    with (
        make("a").caching(ranges=[WHOLE, beyond]) as whole,
        make("b").caching() as cut,
        make("c").caching(ranges=[]) as none,
    ):
        parts = pl.concat([cut.cell(LAYER, latents) for latents in QUARTERS])
        assert parts.equals(whole.cell(LAYER, WHOLE))
        assert whole.cell(LAYER, beyond).equals(ACTIVATIONS.empty())
        counts = whole.firing_counts(LAYER)
        assert counts.height == 64
        assert none.firing_counts(LAYER).equals(counts)
        assert counts["n_tokens"].sum() == parts.height


@pytest.mark.parametrize(
    "settings",
    [
        SpoolSettings(),
        SpoolSettings(buffer_bytes=1, block_keys=13, checkpoint_s=0.0),
        SpoolSettings(buffer_bytes=3000, block_keys=1 << 20, checkpoint_s=1e9),
    ],
)
def test_buffers_blocks_and_checkpoints_change_no_byte(make, settings):
    work, plain = make("a"), make("b")
    work.run(settings=settings)
    plain.run()
    assert work.blobs() == plain.blobs()
    assert len(plain.blobs()) == len(CELLS) * 3
    assert folders(work) == []


@pytest.mark.parametrize("n_chunks", [1, 4, 7])
def test_a_stopped_pass_goes_on_from_its_last_checkpoint(make, n_chunks):
    work, plain = make("a"), make("b")
    with pytest.raises(StoppedError):
        work.run(progress=StopsAfter(n_chunks))
    progress = StopsAfter()
    work.run(progress=progress)
    plain.run()
    assert work.blobs() == plain.blobs()
    (description, left), *_ = progress.told
    assert f"from {n_chunks} of {left + n_chunks}" in description
    assert folders(work) == []


def test_a_pass_stopped_twice_and_before_its_first_checkpoint_loses_nothing_but_that(make):
    work, plain = make("a"), make("b")
    with pytest.raises(StoppedError):
        work.run(progress=StopsAfter(2), settings=SpoolSettings(buffer_bytes=1, checkpoint_s=1e9))
    assert folders(work) == []
    for _ in range(2):
        with pytest.raises(StoppedError):
            work.run(progress=StopsAfter(2))
    progress = StopsAfter()
    work.run(progress=progress)
    assert "from 4 of" in progress.told[0][0]
    plain.run()
    assert work.blobs() == plain.blobs()


def test_rows_behind_the_last_checkpoint_are_not_counted_twice(make):
    work, plain = make("a"), make("b")
    with pytest.raises(StoppedError):
        work.run(progress=StopsAfter(3))
    with pytest.raises(StoppedError):  # goes on, and is stopped with rows behind the checkpoint
        work.run(progress=StopsAfter(2), settings=SpoolSettings(buffer_bytes=1, checkpoint_s=1e9))
    work.run()
    plain.run()
    assert work.blobs() == plain.blobs()


def test_an_unfinished_pass_goes_on_with_the_layer_that_is_still_wanted(make):
    work, plain = make("a"), make("b")
    with pytest.raises(StoppedError), work.caching(progress=StopsAfter(4)):
        pass
    progress = StopsAfter()
    with work.caching([OTHER], progress=progress) as cached, plain.caching() as whole:
        assert "from 4 of" in progress.told[0][0]
        assert {cell.layer for cell in cached.cells()} == {OTHER}
        for latents in QUARTERS:
            assert cached.cell(OTHER, latents).equals(whole.cell(OTHER, latents))
        assert cached.firing_counts(OTHER).equals(whole.firing_counts(OTHER))


def test_layers_left_out_of_an_unfinished_pass_go_on_another_time(make):
    work, plain = make("a"), make("b")
    with pytest.raises(StoppedError):
        work.run(progress=StopsAfter(4))
    again = [StopsAfter() for _ in range(2)]
    with plain.caching() as whole:
        for layer, progress in zip((LAYER, OTHER), again, strict=True):
            with work.caching([layer], progress=progress) as cached:
                assert "from 4 of" in progress.told[0][0]
                assert cached.firing_counts(layer).equals(whole.firing_counts(layer))
                for latents in QUARTERS:
                    assert cached.cell(layer, latents).equals(whole.cell(layer, latents))
                cached.discard(cached.cells())
    assert folders(work) == []


def test_layers_put_aside_are_stopped_and_gone_on_with_by_themselves(make):
    work, plain = make("a"), make("b")
    with pytest.raises(StoppedError):
        work.run(progress=StopsAfter(3))
    for layer in (LAYER, OTHER, LAYER, OTHER):
        with pytest.raises(StoppedError):
            work.caching([layer], progress=StopsAfter(1))
    assert len(folders(work)) == 2
    for layer in (LAYER, OTHER):
        progress = StopsAfter()
        with work.caching([layer], progress=progress) as cached:
            assert "from 5 of" in progress.told[0][0]
            for latents in QUARTERS:
                work.commit(cached, Cell(layer, latents))
            cached.discard(cached.cells())
    plain.run()
    assert work.blobs() == plain.blobs()


def test_a_pass_with_a_layer_more_begins_anew(make):
    work = make()
    with pytest.raises(StoppedError):
        work.caching([LAYER], progress=StopsAfter(3))
    progress = StopsAfter()
    work.caching(progress=progress).close()
    assert progress.told[0][0] == "activation cache"


def store_some(work: Pass) -> None:
    with work.caching() as cached:
        for cell in CELLS[:5]:  # all of the first layer, one of the second
            work.commit(cached, cell)
            cached.discard([cell])
        raise StoppedError


def test_a_pass_killed_while_it_stored_is_not_run_again_for_the_rest(make):
    work, plain = make("a"), make("b")
    with pytest.raises(StoppedError):
        store_some(work)
    progress = StopsAfter()
    work.run(progress=progress)
    assert progress.told == []  # no chunk was run
    plain.run()
    assert work.blobs() == plain.blobs()
    assert folders(work) == []


def test_a_spool_whose_cells_were_taken_is_no_cache_of_empty_cells(make):
    work = make()
    with work.caching() as cached:
        cached.discard(CELLS[:1])
        before = cached.cell(LAYER, QUARTERS[1])
    progress = StopsAfter()
    with work.caching([LAYER], progress=progress) as again:
        assert len(progress.told) == 1
        assert again.cell(LAYER, QUARTERS[1]).equals(before)
        assert again.cell(LAYER, QUARTERS[0]).height > 0


@pytest.mark.parametrize(
    "other",
    [
        {"batch_size": 8},
        {"dataset": "other"},
        {"torch": "9"},
    ],
)
def test_another_pass_begins_anew(make, other):
    work = make()
    with pytest.raises(StoppedError):
        work.run(progress=StopsAfter(3))
    progress = StopsAfter()
    identity = identity_of(LAYER, OTHER, **other)
    work.run(progress=progress, identity=identity)
    assert progress.told[0][0] == "activation cache"
    assert len(folders(work)) == 1  # the stopped one is left for its own kind


def test_a_spool_in_use_is_left_alone(make):
    work, plain = make("a"), make("b")
    with work.caching() as first:
        progress = StopsAfter()
        with work.caching(progress=progress) as second:
            assert progress.told[0][0] == "activation cache"
            assert len(folders(work)) == 2
            for a, b in zip(rows(first), rows(second), strict=True):
                assert a.equals(b)
    work.run()
    plain.run()
    assert work.blobs() == plain.blobs()


def test_a_spool_shorter_than_its_checkpoint_says_is_not_used(make, caplog):
    work, plain = make("a"), make("b")
    with pytest.raises(StoppedError):
        work.run(progress=StopsAfter(5))
    largest = max(work.spools.glob("*/*.keys"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-8])
    work.run()
    assert "not what its checkpoint says" in caplog.text
    plain.run()
    assert work.blobs() == plain.blobs()


def no_room(module: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
    if len(kwargs["input_ids"]) > 1:
        raise torch.OutOfMemoryError("no room")


def test_a_batch_halved_for_lack_of_memory_is_recorded_also_when_the_pass_goes_on(make):
    work = make()
    with work.caching(identity=identity_of(LAYER, OTHER, plain=True)) as cached:
        assert cached.execution(LAYER)["batch_size"] == 3
        plain = rows(cached)
    handle = work.model.base_model.register_forward_pre_hook(no_room, with_kwargs=True)
    try:
        with pytest.raises(StoppedError):
            work.caching(progress=StopsAfter(2))
    finally:
        handle.remove()
    with work.caching() as cached:  # with room for three again
        assert cached.resumed_at == 2
        assert cached.execution(OTHER)["batch_size"] == 1
        assert all(a.equals(b) for a, b in zip(rows(cached), plain, strict=True))


def test_without_an_identity_nothing_is_left(make):
    work = make()
    coders, ranges = {LAYER: work.coders[LAYER]}, {LAYER: [WHOLE]}
    inputs = (work.model, work.dataset, coders, ranges, work.spools)
    with cache_layers(*inputs, silent, settings=CAREFUL) as cached:
        assert cached.cell(LAYER, WHOLE).height > 0
        assert cached.execution(LAYER)["n_chunks"] > 1
    assert folders(work) == []
    with pytest.raises(StoppedError):
        cache_layers(*inputs, StopsAfter(2), settings=CAREFUL)
    assert folders(work) == []


def test_a_coder_of_another_width_and_nan_from_the_model_are_named(make):
    work = make()
    wrong = LayerKey("sae", "layers.0.mlp.up_proj")
    there = work.coders[LAYER]._replace(reads="layers.0.mlp.up_proj")
    with pytest.raises(CoderError, match="width 32"):
        cache_layers(
            work.model, work.dataset, {wrong: there}, {wrong: [WHOLE]}, work.spools, silent,
        )  # fmt: skip
    weight = work.model.model.get_parameter("model.layers.1.mlp.down_proj.weight")
    saved = weight.detach().clone()
    weight.data.fill_(torch.nan)
    with pytest.raises(ModelError, match=r"'layers\.1', context 0"):
        work.caching()
    weight.data.copy_(saved)
    assert folders(work) == []


def test_memory_and_tokens_on_disk_do_not_grow_with_the_dataset(make):
    """Defect 13: all in memory until the end, a crash lost all, tokens copied into each shard."""
    work = make(n_documents=40)
    settings = SpoolSettings(buffer_bytes=2000, block_keys=100, checkpoint_s=0.0)
    with work.caching(ranges=[WHOLE], settings=settings) as cached:
        largest = max(frame.height for frame in cached.frames(LAYER, WHOLE))
        n_rows = cached.cell(LAYER, WHOLE).height
        manifest = work.commit(cached, Cell(LAYER, WHOLE))
        spooled = sum(file.stat().st_size for file in work.spools.glob("*/*.keys"))
        assert spooled == 8 * (n_rows + cached.cell(OTHER, WHOLE).height)
    assert n_rows > 20 * largest
    assert largest <= 100
    names = {blob.name for blob in manifest.blobs}
    assert names == {"activations", "activation_offsets", "firing_counts"}  # and no tokens
