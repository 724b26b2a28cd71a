"""Cells hold what the chunks held, however they are buffered, cut into ranges or batched."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from autointerp_dagster.adapters.coders import open_coder
from autointerp_dagster.adapters.spool import CachedLayers, Spool, cache_layers
from autointerp_dagster.adapters.subject_models import SubjectModel, open_subject_model
from autointerp_dagster.core.activations import Nonzeros
from autointerp_dagster.core.config import SparsifyCoderConfig, SubjectModelConfig, TokenConfig
from autointerp_dagster.core.errors import CoderError, ModelError, StoreError
from autointerp_dagster.core.schemas import ACTIVATIONS
from autointerp_dagster.core.sparse_coders import TopKCoder
from autointerp_dagster.core.tokens import Document, TokenDataset, build_token_dataset
from autointerp_dagster.core.types import LatentRange, LayerKey, silent

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


def expected(latents: LatentRange) -> pl.DataFrame:
    frame = pl.concat([pl.DataFrame(chunk._asdict()) for chunk in CHUNKS])
    of_range = pl.col("latent").is_between(latents.start, latents.stop - 1)
    return ACTIVATIONS.conform(frame.filter(of_range))


@pytest.mark.parametrize("buffer_bytes", [1, 5000, 1 << 20])
def test_a_cell_holds_its_nonzeros_bit_for_bit_whatever_the_buffer(
    tmp_path: Path, buffer_bytes: int
) -> None:
    with Spool(tmp_path, {LAYER: QUARTERS, OTHER: [WHOLE]}, buffer_bytes) as spool:
        for chunk in CHUNKS:
            spool.append(LAYER, chunk)
        for latents in QUARTERS:
            assert spool.merge(LAYER, latents).equals(expected(latents))
        assert spool.merge(OTHER, WHOLE).equals(ACTIVATIONS.empty())


def test_cells_read_while_the_spool_grows_hold_what_came_so_far(tmp_path: Path) -> None:
    with Spool(tmp_path, {LAYER: [WHOLE]}) as spool:
        spool.append(LAYER, CHUNKS[0])
        assert spool.merge(LAYER, WHOLE).height == 50
        spool.append(LAYER, CHUNKS[1])
        assert spool.merge(LAYER, WHOLE).height == 100


def test_memory_holds_no_more_than_the_buffer_and_one_chunk(tmp_path: Path) -> None:
    with Spool(tmp_path, {LAYER: QUARTERS}, buffer_bytes=2000) as spool:
        for chunk in CHUNKS * 10:
            spool.append(LAYER, chunk)
            held = sum(len(buffer) for buffer in spool._buffers.values())
            assert held < 2000 + 50 * 12
        on_disk = sum(file.stat().st_size for file in tmp_path.rglob("*.rows"))
        assert on_disk + held == 10 * 20 * 50 * 12


def test_a_closed_spool_leaves_nothing_also_after_an_error(tmp_path: Path) -> None:
    with Spool(tmp_path, {LAYER: [WHOLE]}, buffer_bytes=1) as spool:
        spool.append(LAYER, CHUNKS[0])
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(ValueError, match="was not asked for"),
        Spool(tmp_path, {LAYER: [WHOLE]}, buffer_bytes=1) as spool,
    ):
        spool.merge(OTHER, WHOLE)
    assert list(tmp_path.iterdir()) == []


def test_a_cell_that_was_not_asked_for_is_an_error(tmp_path: Path) -> None:
    spool = Spool(tmp_path, {LAYER: QUARTERS})
    with spool, pytest.raises(ValueError, match="was not asked for"):
        spool.merge(LAYER, WHOLE)


@pytest.fixture(scope="module")
def coders(tiny_sparsify_dir: Path) -> dict[LayerKey, TopKCoder]:
    config = SparsifyCoderConfig(path=tiny_sparsify_dir)
    return {layer: open_coder(config, layer.hookpoint).coder for layer in (LAYER, OTHER)}


def subject_model_at(folder: Path, batch_size: int = 3) -> SubjectModel:
    return open_subject_model(
        SubjectModelConfig(source=str(folder), dtype="float32", device="cpu", batch_size=batch_size)
    )


@pytest.fixture(scope="module")
def dataset(tiny_subject_model_dir: Path) -> TokenDataset:
    subject_model = subject_model_at(tiny_subject_model_dir)
    words = ["river", "mill", "cat", "naïve", "中文", "🙂", "two hundred"]
    rng = np.random.default_rng(0)
    documents = [Document(f"d{i}", " ".join(rng.choice(words, size=8 + 5 * i))) for i in range(9)]
    config = TokenConfig(context_len=16, min_visible=4)
    return build_token_dataset(documents, subject_model.encode, subject_model.bos_id, config)


def test_the_cache_equals_a_plain_loop_with_dense_encoding(
    tiny_subject_model_dir: Path,
    dataset: TokenDataset,
    coders: dict[LayerKey, TopKCoder],
    tmp_path: Path,
) -> None:
    subject_model = subject_model_at(tiny_subject_model_dir)
    ranges = {LAYER: [WHOLE], OTHER: [WHOLE]}
    with cache_layers(subject_model, dataset, coders, ranges, tmp_path, silent) as cached:
        cells = {layer: cached.cell(layer, WHOLE) for layer in coders}
    rows: dict[LayerKey, list[tuple[int, int, int, float]]] = {LAYER: [], OTHER: []}
    for context in range(dataset.contexts.height):
        ids = torch.from_numpy(dataset.context_tokens(context)).long()[None]
        with torch.no_grad():
            states = subject_model.model(input_ids=ids, output_hidden_states=True).hidden_states
        for layer, hidden in ((LAYER, states[1]), (OTHER, states[2])):
            dense = coders[layer].encode_dense(hidden[0]).to(torch.bfloat16)
            for position in range(1, ids.shape[1]):
                for latent in torch.nonzero(dense[position] > 0)[:, 0].tolist():
                    rows[layer].append((latent, context, position, float(dense[position, latent])))
    for layer, found in cells.items():
        frame = pl.DataFrame(rows[layer], schema=list(ACTIVATIONS.columns), orient="row")
        assert_same(found, ACTIVATIONS.conform(frame))


def assert_same(a: pl.DataFrame, b: pl.DataFrame) -> None:
    """The same non-zeros; values may differ by one rounding step of bfloat16."""
    assert a.select(ACTIVATIONS.key).equals(b.select(ACTIVATIONS.key))
    np.testing.assert_allclose(a["activation"], b["activation"], rtol=2**-7)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_batch_size_and_order_of_layers_change_nothing(
    batch_size: int,
    tiny_subject_model_dir: Path,
    dataset: TokenDataset,
    coders: dict[LayerKey, TopKCoder],
    tmp_path: Path,
) -> None:
    def run(
        batch_size: int, coders: dict[LayerKey, TopKCoder]
    ) -> tuple[list[pl.DataFrame], list[pl.DataFrame]]:
        subject_model = subject_model_at(tiny_subject_model_dir, batch_size)
        ranges = {layer: [WHOLE] for layer in coders}
        with cache_layers(subject_model, dataset, coders, ranges, tmp_path, silent) as cached:
            layers = sorted(coders)
            cells = [cached.cell(layer, WHOLE) for layer in layers]
            return cells, [cached.firing_counts(layer) for layer in layers]

    cells, counts = run(3, coders)
    other_cells, other_counts = run(batch_size, dict(reversed(coders.items())))
    for a, b in zip(cells, other_cells, strict=True):
        assert_same(a, b)
    for a, b in zip(counts, other_counts, strict=True):
        assert a.drop("max_activation").equals(b.drop("max_activation"))


def test_four_ranges_are_one_range_cut(
    tiny_subject_model_dir: Path,
    dataset: TokenDataset,
    coders: dict[LayerKey, TopKCoder],
    tmp_path: Path,
) -> None:
    subject_model = subject_model_at(tiny_subject_model_dir)

    def run(ranges: list[LatentRange]) -> CachedLayers:
        one = {LAYER: coders[LAYER]}
        return cache_layers(subject_model, dataset, one, {LAYER: ranges}, tmp_path, silent)

    # A range beyond the coder is empty; counts cover every latent also if only some are kept.
    with run([WHOLE, LatentRange(64, 128)]) as whole, run(QUARTERS) as cut, run([]) as none:
        parts = pl.concat([cut.cell(LAYER, latents) for latents in QUARTERS])
        assert parts.equals(whole.cell(LAYER, WHOLE))
        assert whole.cell(LAYER, LatentRange(64, 128)).is_empty()
        counts = whole.firing_counts(LAYER)
        assert counts.height == 64
        assert none.firing_counts(LAYER).equals(counts)
        assert counts["n_tokens"].sum() == parts.height
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_leaves_no_files(
    tiny_subject_model_dir: Path,
    dataset: TokenDataset,
    coders: dict[LayerKey, TopKCoder],
    tmp_path: Path,
) -> None:
    subject_model = subject_model_at(tiny_subject_model_dir)
    wrong = {LayerKey("sae", "layers.0.mlp.up_proj"): coders[LAYER]}
    with pytest.raises(CoderError, match="width 32"):
        cache_layers(
            subject_model, dataset, wrong, {layer: [WHOLE] for layer in wrong}, tmp_path, silent
        )
    weight = subject_model.model.get_parameter("model.layers.1.mlp.down_proj.weight")
    saved = weight.detach().clone()
    weight.data.fill_(torch.nan)
    with pytest.raises(ModelError, match=r"'layers\.1', context 0"):
        cache_layers(
            subject_model, dataset, coders, {layer: [WHOLE] for layer in coders}, tmp_path, silent
        )
    weight.data.copy_(saved)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_with_the_cell_and_what_to_do(tmp_path, monkeypatch):
    spool = Spool(tmp_path, {LAYER: [WHOLE]}, buffer_bytes=1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StoreError, match=r"layers.0/0000000-0000063.*No space left.*TMPDIR"):
        spool.append(LAYER, CHUNKS[0])
    monkeypatch.undo()
    spool.close()
    assert not list(tmp_path.iterdir())
