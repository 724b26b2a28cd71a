"""The cache holds exactly what a plain loop with dense encoding finds."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn

from autointerp_dagster.core import activations
from autointerp_dagster.core.activations import (
    Chunk,
    FiringCounts,
    Nonzeros,
    nonzeros_of,
)
from autointerp_dagster.core.config import TokenConfig
from autointerp_dagster.core.errors import CoderError, ModelError, StudyError
from autointerp_dagster.core.sparse_coders import LinearCoder, SparseActivations, TopK
from autointerp_dagster.core.sparse_coders.protocol import PlacedCoder, SparseCoder
from autointerp_dagster.core.tokens import Document, TokenDataset, build_token_dataset
from autointerp_dagster.core.types import LatentRange, LayerKey

CPU = torch.device("cpu")


def chunks_of(
    model: nn.Module, dataset: TokenDataset, coders: Mapping[LayerKey, SparseCoder], *how, **more
) -> Iterator[Chunk]:
    """With each coder at the hookpoint that its layer names."""
    placed = {x: PlacedCoder(coder, x.hookpoint, x.hookpoint) for x, coder in coders.items()}
    return activations.chunks_of(model, dataset, placed, *how, **more)


D_IN, VOCAB = 6, 128


class Mixer(nn.Module):
    """Adds the running mean of the context: a position's output depends on those before it."""

    def forward(self, x: Tensor) -> Tensor:
        counts = torch.arange(1, x.shape[1] + 1)[None, :, None]
        return torch.tanh(x + x.cumsum(1) / counts)


class TinyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding.from_pretrained(torch.randn(VOCAB, D_IN, generator=generator))
        self.layers = nn.ModuleList(Mixer() for _ in range(3))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        assert not use_cache
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def coder_of(seed: int, num_latents: int = 20, k: int = 4) -> LinearCoder:
    generator = torch.Generator().manual_seed(seed)
    return LinearCoder(
        encoder=torch.randn(num_latents, D_IN, generator=generator),
        bias=torch.zeros(num_latents),
        decoder=torch.zeros(num_latents, D_IN),
        b_dec=torch.zeros(D_IN),
        activation=TopK(k),
    )


A, B, C = LayerKey("sae", "layers.0"), LayerKey("sae", "layers.1"), LayerKey("wide", "layers.1")
CODERS = {A: coder_of(1), B: coder_of(2), C: coder_of(3, num_latents=40)}


def dataset_of(bos_id: int | None = 0) -> TokenDataset:
    letters = np.random.default_rng(0).integers(97, 123, size=400)
    text = "".join(map(chr, letters))
    documents = [Document(f"d{i}", text[i * 20 : i * 20 + 11 + 3 * i]) for i in range(12)]
    config = TokenConfig(context_len=8, min_visible=2)
    return build_token_dataset(
        documents, lambda texts: [[ord(c) for c in t] for t in texts], bos_id, config
    )


def run(
    dataset: TokenDataset, coders: dict[LayerKey, LinearCoder] = CODERS, batch_size: int = 3
) -> list[Chunk]:
    return list(chunks_of(TinyModel(), dataset, coders, batch_size, CPU))


def frame_of(chunks: list[Chunk], layer: LayerKey) -> pl.DataFrame:
    frames = [pl.DataFrame(chunk.nonzeros[layer]._asdict()) for chunk in chunks]
    return pl.concat(frames).sort("latent", "context", "position")


def by_plain_loop(dataset: TokenDataset, layer: LayerKey) -> pl.DataFrame:
    """One context and one token at a time, dense, with every layer of the model run."""
    model, coder, rows = TinyModel(), CODERS[layer], []
    for context in range(dataset.contexts.height):
        tokens = torch.from_numpy(dataset.context_tokens(context)).long()
        x = model.embed(tokens[None])
        for module in model.layers[: int(layer.hookpoint[-1]) + 1]:
            x = module(x)
        for position in range(dataset.first_visible, len(tokens)):
            dense = coder.encode_dense(x[0, position : position + 1])[0].to(torch.bfloat16)
            rows += [
                (latent, context, position, float(dense[latent]))
                for latent in range(coder.num_latents)
                if dense[latent] > 0
            ]
    names = ["latent", "context", "position", "activation"]
    schema = dict(zip(names, [pl.UInt32, pl.UInt32, pl.UInt16, pl.Float32], strict=True))
    return pl.DataFrame(rows, schema=schema, orient="row").sort(names[:3])


def assert_same(a: pl.DataFrame, b: pl.DataFrame) -> None:
    """The same non-zeros; values may differ by one rounding step of bfloat16."""
    place = ["latent", "context", "position"]
    assert a.select(place).equals(b.select(place))
    np.testing.assert_allclose(a["activation"], b["activation"], rtol=2**-7)


@pytest.mark.parametrize("bos_id", [0, None])
@pytest.mark.parametrize("layer", [A, B, C], ids=str)
def test_nonzeros_equal_a_plain_loop_with_dense_encoding(
    layer: LayerKey, bos_id: int | None
) -> None:
    dataset = dataset_of(bos_id)
    found = frame_of(run(dataset), layer)
    assert found.height > 100
    assert_same(found, by_plain_loop(dataset, layer))


def test_bos_is_in_the_models_input_but_not_in_the_cache() -> None:
    with_bos, without = dataset_of(0), dataset_of(None)
    positions = frame_of(run(with_bos), A)["position"]
    assert positions.min() == 1
    assert frame_of(run(without), A)["position"].min() == 0
    # The model mixes the context, so BOS changes what every later position says.
    other_bos = replace(with_bos, tokens=np.where(with_bos.tokens == 0, 1, with_bos.tokens))
    assert not frame_of(run(other_bos), A).equals(frame_of(run(with_bos), A))


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_batch_size_changes_nothing(batch_size: int) -> None:
    dataset = dataset_of()
    for layer in CODERS:
        expected = frame_of(run(dataset), layer)
        assert_same(frame_of(run(dataset, batch_size=batch_size), layer), expected)


def test_other_layers_and_their_order_change_nothing() -> None:
    dataset = dataset_of()
    together = run(dataset)
    backwards = run(dataset, dict(reversed(CODERS.items())))
    for layer in CODERS:
        expected = frame_of(run(dataset, {layer: CODERS[layer]}), layer)
        assert frame_of(together, layer).equals(expected)
        assert frame_of(backwards, layer).equals(expected)


def test_columns_of_a_chunk_are_sorted_and_rounded_to_bfloat16() -> None:
    for chunk in run(dataset_of()):
        nonzeros = chunk.nonzeros[C]
        frame = pl.DataFrame(nonzeros._asdict())
        assert frame.equals(frame.sort("latent", "context", "position"))
        assert (nonzeros.activation.view(np.uint32) & 0xFFFF == 0).all()
        assert (nonzeros.activation > 0).all()


def test_activations_beyond_float16_stay_finite() -> None:
    loud = replace(CODERS[A], encoder=CODERS[A].encoder * 1e8)
    activation = frame_of(run(dataset_of(), {A: loud}), A)["activation"]
    assert activation.max() > 1e8  # type: ignore[operator]
    assert activation.is_finite().all()


def test_ranges_cut_a_chunk_into_disjoint_parts() -> None:
    nonzeros = run(dataset_of())[0].nonzeros[C]
    parts = [nonzeros.within(LatentRange(i, i + 10)) for i in range(0, 40, 10)]
    for whole, *of_parts in zip(nonzeros, *parts, strict=True):
        assert np.array_equal(np.concatenate(of_parts), whole)
    assert nonzeros.within(LatentRange(40, 80)).latent.size == 0


def test_firing_counts_equal_a_group_by_and_list_every_latent() -> None:
    chunks = run(dataset_of())
    counts = FiringCounts(41)  # one latent more than fires
    for chunk in chunks:
        counts.add(chunk.nonzeros[C])
    expected = (
        frame_of(chunks, C)
        .group_by("latent")
        .agg(
            n_tokens=pl.len().cast(pl.UInt64),
            n_contexts=pl.col("context").n_unique().cast(pl.UInt64),
            max_activation=pl.col("activation").max(),
        )
    )
    table = counts.table()
    assert table["latent"].to_list() == list(range(41))
    assert table.filter(pl.col("n_tokens") > 0).equals(expected.sort("latent"))
    assert table.row(40) == (40, 0, 0, None)


def test_firing_counts_by_hand() -> None:
    counts = FiringCounts(4)
    # Latent 1 fires in contexts 5, 5 and 6; latent 2 begins in context 6, where 1 ended.
    counts.add(
        Nonzeros(
            np.array([1, 1, 1, 2], dtype=np.uint32),
            np.array([5, 5, 6, 6], dtype=np.uint32),
            np.array([1, 2, 1, 1], dtype=np.uint16),
            np.array([1.0, 3.0, 2.0, 0.5], dtype=np.float32),
        )
    )
    assert counts.table().rows() == [
        (0, 0, 0, None),
        (1, 3, 2, 3.0),
        (2, 1, 1, 0.5),
        (3, 0, 0, None),
    ]


def test_nan_from_the_model_is_an_error_that_names_hookpoint_and_context() -> None:
    dataset, model = dataset_of(), TinyModel()
    bad = int(dataset.context_tokens(4)[2])
    model.embed.weight.data[bad] = torch.nan
    first = min(
        i for i in range(dataset.contexts.height) if bad in dataset.context_tokens(i)[1:].tolist()
    )
    with pytest.raises(ModelError, match=rf"'layers\.0', context {first}:"):
        list(chunks_of(model, dataset, {A: CODERS[A]}, 1, CPU))


def test_an_unknown_token_is_an_error_before_the_first_forward_pass() -> None:
    dataset = dataset_of()
    tokens = dataset.tokens.copy()
    tokens[dataset.offsets[5] + 3] = VOCAB
    spy = EncodeSpy(CODERS[A], [])
    chunks = chunks_of(TinyModel(), replace(dataset, tokens=tokens), {A: spy}, 1, CPU)
    with pytest.raises(ModelError, match=r"context 5, position 3: token 128, .* has 128\."):
        next(chunks)
    assert spy.sizes == []


def test_an_activation_beyond_bfloat16_is_an_error_that_names_layer_latent_and_context() -> None:
    # float32 ends a little above bfloat16: the largest value of float32 rounds to infinity.
    largest = torch.finfo(torch.float32).max
    coder = LinearCoder(
        encoder=torch.tensor([[0.0, 0.0], [1.0, 0.0]]),
        bias=torch.zeros(2),
        decoder=torch.zeros(2, 2),
        b_dec=torch.zeros(2),
        activation=TopK(1),
    )
    hidden = torch.tensor([[[1.0, 0.0]], [[largest, 0.0]]])
    with pytest.raises(ModelError, match=r"sae@layers\.0, latent 1, context 9: .*bfloat16"):
        nonzeros_of(coder, hidden, np.array([4, 9]), 0, A)


def test_an_activation_below_bfloat16_does_not_fire() -> None:
    coder = replace(CODERS[A], encoder=torch.full((20, D_IN), 1e-42), activation=TopK(1))
    hidden = torch.ones(1, 1, D_IN)
    assert coder.encode(hidden[0]).value.tolist() == [pytest.approx(6e-42, rel=0.1)]
    assert nonzeros_of(coder, hidden, np.array([0]), 0).latent.size == 0


def test_a_coder_that_fires_nowhere_gives_empty_columns() -> None:
    silent = replace(CODERS[A], bias=torch.full((20,), -1e6))
    counts = FiringCounts(20)
    for chunk in run(dataset_of(), {A: silent}):
        assert all(column.size == 0 for column in chunk.nonzeros[A])
        counts.add(chunk.nonzeros[A])
    assert counts.table()["n_tokens"].sum() == 0


def test_a_latent_that_fires_on_every_token_is_counted_on_every_token() -> None:
    dataset = dataset_of()
    bias = torch.zeros(20)
    bias[3] = 1e6
    chunks = run(dataset, {A: replace(CODERS[A], bias=bias)})
    n_visible = len(dataset.tokens) - dataset.contexts.height
    rows = frame_of(chunks, A).filter(pl.col("latent") == 3)
    assert rows.height == n_visible
    assert rows.select("context", "position").is_unique().all()


def test_a_run_that_goes_on_gives_the_chunks_that_were_left() -> None:
    whole = run(dataset_of())
    rest = list(chunks_of(TinyModel(), dataset_of(), CODERS, 3, CPU, first_chunk=2))
    assert len(rest) == len(whole) - 2
    for a, b in zip(rest, whole[2:], strict=True):
        assert np.array_equal(a.contexts, b.contexts)
        assert pl.DataFrame(a.nonzeros[C]._asdict()).equals(pl.DataFrame(b.nonzeros[C]._asdict()))


@dataclass(frozen=True)
class EncodeSpy:
    """A coder that notes how many tokens it was given at once."""

    coder: LinearCoder
    sizes: list[int]

    @property
    def num_latents(self) -> int:
        return self.coder.num_latents

    @property
    def d_in(self) -> int:
        return self.coder.d_in

    def encode(self, x: Tensor) -> SparseActivations:
        self.sizes.append(len(x))
        return self.coder.encode(x)

    @property
    def d_out(self) -> int:
        return self.coder.d_out

    def encode_dense(self, x: Tensor) -> Tensor:
        return self.coder.encode_dense(x)

    def decode(self, found: SparseActivations, x: Tensor) -> Tensor:
        return self.coder.decode(found, x)

    def describe(self) -> dict[str, object]:
        return self.coder.describe()

    def encoder_rows(self, latents: list[int]) -> Tensor:
        return self.coder.encoder_rows(latents)

    def decoder_rows(self, latents: list[int]) -> Tensor:
        return self.coder.decoder_rows(latents)

    def to(self, device: torch.device) -> "EncodeSpy":
        return self


class WideCoder(EncodeSpy):
    """One that says it has more latents than a key holds."""

    @property
    def num_latents(self) -> int:
        return (1 << 23) + 1


def test_chunks_come_one_at_a_time() -> None:
    spy = EncodeSpy(CODERS[A], [])
    chunks = chunks_of(TinyModel(), dataset_of(), {A: spy}, 3, CPU)
    next(chunks)
    assert spy.sizes == [3 * 7]  # 3 contexts of 7 visible tokens


def test_more_latents_than_a_key_holds_are_an_error_before_the_first_forward_pass() -> None:
    spy = WideCoder(CODERS[A], [])
    with pytest.raises(CoderError, match=r"sae@layers\.0: .* 8388609 latents, .* at most 8388608"):
        next(chunks_of(TinyModel(), dataset_of(), {A: spy}, 1, CPU))
    assert spy.sizes == []


def test_more_positions_than_a_key_holds_are_an_error_before_the_first_forward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(activations, "_MAX_TOKENS", 20)
    spy = EncodeSpy(CODERS[A], [])
    with pytest.raises(StudyError, match=r"batch_size: 3 contexts with 7 .* Lower it to 2 or less"):
        next(chunks_of(TinyModel(), dataset_of(), {A: spy}, 3, CPU))
    assert spy.sizes == []
    assert next(chunks_of(TinyModel(), dataset_of(), {A: spy}, 2, CPU)).contexts.size == 2


class LittleMemory(TinyModel):
    """Has room for a few contexts at once."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.sizes = room, list[int]()

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        self.sizes.append(len(input_ids))
        if len(input_ids) > self.room:
            raise torch.OutOfMemoryError("no room")
        return super().forward(input_ids, use_cache)


def test_lack_of_memory_halves_the_batch_and_leaves_the_chunks_as_they_are() -> None:
    dataset, model = dataset_of(), LittleMemory(2)
    found = list(chunks_of(model, dataset, CODERS, 5, CPU))
    whole = run(dataset, batch_size=5)
    assert [c.contexts.tolist() for c in found] == [c.contexts.tolist() for c in whole]
    for layer in CODERS:
        assert_same(frame_of(found, layer), frame_of(whole, layer))
    # 5 are too many; then 2, 2 and the one that is left. It is never tried with more again.
    assert model.sizes[:4] == [5, 2, 2, 1]
    assert max(model.sizes[1:]) == 2
    assert {chunk.batch_size for chunk in found} == {2}
    assert {chunk.batch_size for chunk in whole} == {5}


class Widening(nn.Module):
    """A layer with an MLP that is wider inside, so that vectors of two widths stand in it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.norm = nn.LayerNorm(D_IN)
        self.up, self.down = nn.Linear(D_IN, 11, bias=False), nn.Linear(11, D_IN, bias=False)
        self.norm.weight.data.normal_(generator=generator)
        self.up.weight.data.normal_(generator=generator)
        self.down.weight.data.normal_(generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def test_coders_of_different_widths_read_different_sides_in_one_pass() -> None:
    """Defect 15: one ``transcode`` flag and one width for all hookpoints."""
    dataset, model = dataset_of(), TinyModel()
    model.layers[1] = Widening()
    layer = model.layers[1]
    generator = torch.Generator().manual_seed(6)
    wide = LinearCoder(
        torch.randn(30, 11, generator=generator), torch.zeros(30), torch.zeros(30, 11),
        torch.zeros(11), TopK(5),
    )  # fmt: skip
    reads = {
        "layers.1": coder_of(1),
        "layers.1.input": coder_of(2, num_latents=33),
        "layers.1.norm.normalized": coder_of(3, k=2),
        "layers.1.down.input": wide,
        "layers.1.down": coder_of(4, num_latents=9, k=9),
    }
    coders = {
        LayerKey(f"c{i}", "layers.1"): PlacedCoder(coder, name, "layers.1")
        for i, (name, coder) in enumerate(reads.items())
    }
    found = list(activations.chunks_of(model, dataset, coders, 3, CPU))
    for context in range(dataset.contexts.height):
        tokens = torch.from_numpy(dataset.context_tokens(context)).long()
        with torch.inference_mode():
            x = model.layers[0](model.embed(tokens[None]))[0]
            normalized = nn.functional.layer_norm(x, (D_IN,))
            hidden = torch.tanh(layer.up(layer.norm(x)))
            by_hand = [layer(x), x, normalized, hidden, layer.down(hidden)]
        for (key, placed), vectors in zip(coders.items(), by_hand, strict=True):
            dense = placed.coder.encode_dense(vectors[1:]).T  # latent, position; without BOS
            rows = frame_of(found, key).filter(pl.col("context") == context)
            at = (
                torch.tensor(rows["latent"].to_list()),
                torch.tensor(rows["position"].to_list()) - 1,
            )
            sparse = torch.zeros_like(dense)
            sparse[at] = torch.tensor(rows["activation"].to_list())
            assert torch.allclose(sparse, dense, rtol=2**-7, atol=1e-5), placed.reads


def test_no_memory_for_one_context_is_an_error() -> None:
    chunks = chunks_of(LittleMemory(0), dataset_of(), CODERS, 4, CPU)
    with pytest.raises(ModelError, match=r"context 0: .* cpu for its 8 tokens, .*batch_size 1\."):
        next(chunks)
