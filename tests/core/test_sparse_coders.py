"""A coder's sparse path equals the dense one, in any arithmetic, block and company."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autointerp_dagster.core.sparse_coders import (
    Activation,
    Computing,
    Gated,
    GroupMax,
    LinearCoder,
    ReLU,
    SparseActivations,
    Threshold,
    TopK,
)
from autointerp_dagster.core.sparse_coders.device import DeviceEncoder, block_encoder
from autointerp_dagster.core.sparse_coders.inputs import Inputs
from autointerp_dagster.core.sparse_coders.rule import rule_of

BFLOAT16, FLOAT32 = Computing(screen="bfloat16"), Computing(screen="float32")


def coder_of(num_latents: int = 50, d_in: int = 6, k: int = 5, seed: int = 0) -> LinearCoder:
    generator = torch.Generator().manual_seed(seed)
    encoder = torch.randn(num_latents, d_in, generator=generator)
    bias = torch.randn(num_latents, generator=generator)
    decoder = torch.randn(num_latents, d_in, generator=generator)
    b_dec = torch.randn(d_in, generator=generator)
    return LinearCoder(encoder, bias, decoder, b_dec, TopK(k), centre=b_dec)


def jump_relu_of(
    num_latents: int = 50, d_in: int = 6, threshold: float = 2.0, seed: int = 0
) -> LinearCoder:
    coder = coder_of(num_latents, d_in, seed=seed)
    spread = torch.rand(num_latents, generator=torch.Generator().manual_seed(seed))
    return replace(coder, activation=Threshold(threshold * spread), centre=None)


def coders_of(num_latents: int = 50, d_in: int = 6, seed: int = 0) -> list[LinearCoder]:
    """One of each kind."""
    coder = coder_of(num_latents, d_in, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(num_latents, generator=generator)
    n_groups = next(k for k in range(2, num_latents + 1) if num_latents % k == 0)
    kinds: list[Activation] = [
        TopK(5),
        TopK(num_latents),
        GroupMax(n_groups),
        GroupMax(num_latents // n_groups),
        Threshold(2 * spread),
        ReLU(),
        Gated(0.5 + spread, torch.randn(num_latents, generator=generator)),
    ]
    return [replace(coder, activation=activation) for activation in kinds]


def tokens_of(n: int, d_in: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


def dense(sparse: SparseActivations, n: int, num_latents: int) -> Tensor:
    zeros = torch.zeros(n, num_latents)
    zeros[sparse.token, sparse.latent] = sparse.value
    return zeros


def assert_sound(sparse: SparseActivations) -> None:
    """Ordered by token, no pair twice, and no zeros among the values."""
    assert (sparse.token.diff() >= 0).all()
    pairs = torch.stack([sparse.token, sparse.latent])
    assert pairs.unique(dim=1).shape == pairs.shape
    assert (sparse.value > 0).all()


def assert_equal(a: SparseActivations, b: SparseActivations) -> None:
    """To the last bit, in the same order."""
    for left, right in zip(a, b, strict=True):
        assert torch.equal(left, right)


def exact_topk(coder: LinearCoder, k: int, x: Tensor) -> Tensor:
    """Dense activations with sums in float64, which decides what float32 cannot."""
    centred = (x - coder.centre).double()
    found = centred @ coder.encoder.double().T + coder.bias.double()
    kept = found.relu().topk(k, dim=-1)
    return torch.zeros_like(found).scatter_(-1, kept.indices, kept.values)


def test_encode_by_hand() -> None:
    coder = LinearCoder(
        encoder=torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]]),
        bias=torch.tensor([0.0, 0.5, 0.0, 0.0]),
        decoder=torch.eye(4, 2),
        b_dec=torch.tensor([1.0, 1.0]),
        activation=TopK(2),
        centre=torch.tensor([1.0, 1.0]),
    )
    # x - centre = (2, -1): pre-activations 2, -0.5, 1, -2: the two largest are latents 0 and 2.
    # x - centre = (-1, -1): -1, -0.5, -2, 1: latent 3 fires; the second largest is below zero.
    # x - centre = (0, -1): 0, -0.5, -1, 0: nothing fires.
    x = torch.tensor([[3.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    found = coder.encode(x)
    assert sorted(zip(*(column.tolist() for column in found), strict=True)) == [
        (0, 0, 2.0),
        (0, 2, 1.0),
        (1, 3, 1.0),
    ]


def test_a_jump_relu_by_hand() -> None:
    coder = LinearCoder(
        encoder=torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
        bias=torch.tensor([0.0, 0.5, 0.0]),
        decoder=torch.eye(3, 2),
        b_dec=torch.tensor([1.0, 1.0]),
        activation=Threshold(torch.tensor([2.0, 0.0, 1.0])),
    )
    # Pre-activations of (2, -0.5): 2, 0, 1.5. Latent 0 only reaches its threshold; 0 is silent.
    # With (1, 1) taken off, (1, -1.5): 1, -1, -0.5.  Of (5, 5) it is (4, 4): 4, 4.5, 8.
    x = torch.tensor([[2.0, -0.5], [5.0, 5.0]])
    assert dense(coder.encode(x), 2, 3).tolist() == [[0, 0, 1.5], [5, 5.5, 10]]
    centred = replace(coder, centre=coder.b_dec)
    assert dense(centred.encode(x), 2, 3).tolist() == [[0, 0, 0], [4, 4.5, 8]]


@settings(max_examples=80, deadline=None)
@given(
    kind=st.integers(0, 6),
    n=st.integers(1, 300),
    num_latents=st.integers(5, 1500),
    block_elements=st.sampled_from([2000, 100_000, 10_000_000]),
    computing=st.sampled_from([BFLOAT16, FLOAT32]),
    has_bias=st.booleans(),
)
def test_blocked_encoding_equals_the_dense_path(
    kind: int, n: int, num_latents: int, block_elements: int, computing: Computing, has_bias: bool
) -> None:
    x = tokens_of(n)
    coder = coders_of(num_latents)[kind]
    coder = replace(
        coder,
        bias=coder.bias * has_bias,
        computing=replace(computing, block_elements=block_elements),
    )
    found = coder.encode(x)
    assert_sound(found)
    torch.testing.assert_close(dense(found, n, num_latents), coder.encode_dense(x))


def scaled(x: Tensor, factor: float) -> Tensor:
    return x * factor


def clustered(x: Tensor, factor: float) -> Tensor:
    """Rows that differ in the last bits only."""
    return x[:1] * (1 + 1e-7 * factor * torch.arange(len(x))[:, None])


def repeated(x: Tensor, factor: float) -> Tensor:
    return (x[:1] * factor).expand(len(x), -1)


def one_loud_dimension(x: Tensor, factor: float) -> Tensor:
    x = x.clone()
    x[:, 0] *= 1000 * factor
    return x


def with_zero_rows(x: Tensor, factor: float) -> Tensor:
    x = x * factor
    x[::2] = 0
    return x


Shape = Callable[[Tensor, float], Tensor]
SHAPES: list[Shape] = [scaled, clustered, repeated, one_loud_dimension, with_zero_rows]
FACTORS = st.sampled_from([1e-38, 1e-20, 1e-6, 1.0, 300.0, 1e6, 1e17])


@settings(max_examples=150, deadline=None)
@given(
    kind=st.integers(0, 4),
    shape_x=st.sampled_from(SHAPES),
    shape_encoder=st.sampled_from(SHAPES),
    x_factor=FACTORS,
    encoder_factor=FACTORS,
    bias_factor=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
    k=st.sampled_from([1, 8, 100]),
    seed=st.integers(0, 1000),
)
def test_both_screens_find_the_same_to_the_last_bit(
    kind: int,
    shape_x: Shape,
    shape_encoder: Shape,
    x_factor: float,
    encoder_factor: float,
    bias_factor: float,
    k: int,
    seed: int,
) -> None:
    coder = coder_of(num_latents=700, d_in=24, k=k, seed=seed)
    coder = replace(
        coder,
        encoder=shape_encoder(coder.encoder, encoder_factor),
        bias=coder.bias * bias_factor,
        computing=BFLOAT16,
    )
    x = shape_x(tokens_of(20, 24, seed), x_factor)
    gated = Gated(0.5 + torch.arange(700) / 700, coder.bias.roll(1))
    kinds = (coder.activation, GroupMax(20), Threshold(coder.bias.abs() / 2), ReLU(), gated)
    coder = replace(coder, activation=kinds[kind])
    found = coder.encode(x)
    assert_sound(found)
    assert_equal(found, replace(coder, computing=FLOAT32).encode(x))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.sampled_from([1, 5, 64]), scale=FACTORS)
def test_only_what_float32_cannot_tell_apart_differs_from_exact_arithmetic(
    seed: int, k: int, scale: float
) -> None:
    coder = replace(coder_of(900, 40, k, seed), computing=BFLOAT16)
    coder = replace(coder, bias=coder.bias * scale, centre=coder.b_dec * scale)
    x = tokens_of(10, 40, seed) * scale
    found, wanted = dense(coder.encode(x), 10, 900).double(), exact_topk(coder, k, x)
    # 43 terms, each rounded once: 43 * 2**-24 of the sum of their sizes.
    sizes = (x - coder.centre).abs() @ coder.encoder.abs().T + coder.bias.abs()
    assert ((found - wanted).abs() <= 43 * 2**-24 * sizes)[(found > 0) & (wanted > 0)].all()
    kth = wanted.sort(dim=1).values[:, -k, None]
    differs = (found > 0) != (wanted > 0)
    values = torch.maximum(found, wanted)
    assert ((values - kth).abs() <= 2 * 43 * 2**-24 * sizes)[differs].all()


def test_the_largest_is_found_where_bfloat16_rounds_it_down_and_another_up() -> None:
    # Next to 1 the steps of bfloat16 are 2**-7. Latent 0 reads 513 dimensions, latent 1 the other
    # 511, where vector and weights are a little below and above half a step: rounded, all are 1, or
    # 1 + 2**-7. So latent 1 scores 511 * (1 + 2**-7)**2 = 519 and latent 0 only 513, but in truth
    # it is 511 * (1 + 1.02 * 2**-8)**2 = 515.1 against 513 * (1 + 0.98 * 2**-8)**2 = 516.9.
    down, up = 1 + 0.98 * 2**-8, 1 + 1.02 * 2**-8
    x = torch.full((1, 1024), up)
    x[0, :513] = down
    encoder = torch.zeros(2, 1024)
    encoder[0, :513], encoder[1, 513:] = down, up
    bias, b_dec = torch.zeros(2), torch.zeros(1024)
    coder = LinearCoder(encoder, bias, encoder, b_dec, TopK(1), computing=BFLOAT16)
    rounded = x.bfloat16().float() @ encoder.bfloat16().float().T
    assert rounded[0, 1] > rounded[0, 0] + 4
    assert coder.encode(x).latent.tolist() == [0]
    # The same among more latents than groups, in several blocks.
    many = torch.zeros(2000, 1024)
    many[1700], many[3] = encoder
    blocks = replace(BFLOAT16, block_elements=256 * 600)
    coder = replace(coder, encoder=many, bias=torch.zeros(2000), decoder=many, computing=blocks)
    assert coder.encode(x).latent.tolist() == [1700]


def test_among_equal_activations_the_lowest_latents_are_kept() -> None:
    coder = coder_of(num_latents=600, k=4)
    same = replace(coder, encoder=coder.encoder[:1].expand(600, -1), bias=torch.ones(600))
    x = coder.b_dec + coder.encoder[:1]
    for computing in (BFLOAT16, FLOAT32):
        found = replace(same, computing=computing).encode(x)
        assert sorted(found.latent.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("computing", [BFLOAT16, FLOAT32], ids=["bfloat16", "float32"])
def test_a_token_alone_gives_what_it_gives_in_company(computing: Computing) -> None:
    x = tokens_of(40, 32)
    x[7] *= 1e30  # no screen can judge it, so it is encoded last
    for each in coders_of(1000, 32):
        each = replace(each, computing=computing)
        together = each.encode(x)
        assert_sound(together)
        for token in (0, 7, 39):
            alone = each.encode(x[token : token + 1])
            mine = together.token == token
            assert torch.equal(alone.latent, together.latent[mine])
            assert torch.equal(alone.value, together.value[mine])


def block_of(coder: LinearCoder) -> Callable[[Tensor], SparseActivations]:
    inputs = Inputs(coder.dtype, coder.input_norm, coder.input_scale, coder.centre)
    rule = rule_of(coder.activation, coder.dtype)
    return block_encoder(coder.encoder, coder.bias, inputs, rule, compiled=False)


def on_a_device(coder: LinearCoder, token_block: int = 16) -> DeviceEncoder:
    """What encodes the coder's tokens elsewhere than on a CPU."""
    return DeviceEncoder(block_of(coder), token_block, "float32")


def test_a_sum_that_overflows_is_infinite_and_not_silent() -> None:
    loud = torch.full((8, 4), 1e30)
    x = torch.tensor([[1e30, 1e30, -1e30, 1e30]])
    coder = replace(coder_of(8, 4), encoder=loud, bias=torch.zeros(8), centre=None)
    ones = torch.ones(8)
    for activation in (TopK(8), GroupMax(8), Threshold(ones), ReLU(), Gated(ones, ones)):
        coder = replace(coder, activation=activation)
        for encode in (coder.encode, on_a_device(coder).encode):
            found = encode(x)
            assert sorted(found.latent.tolist()) == list(range(8))
            assert found.value.tolist() == 8 * [torch.inf]


def test_nan_weights_are_infinite_activations_and_not_silent() -> None:
    weights = coder_of().encoder.clone()
    weights[3] = torch.nan
    for coder in coders_of():
        coder = replace(coder, encoder=weights)
        for encode in (coder.encode, on_a_device(coder).encode):
            found = encode(tokens_of(4))
            assert not found.value.isnan().any()
            assert found.token[found.latent == 3].tolist() == [0, 1, 2, 3]
            assert found.value[found.latent == 3].isinf().all()


def test_a_coder_that_fires_nowhere_gives_nothing() -> None:
    x = tokens_of(30)
    silent = replace(coder_of(), bias=torch.full((50,), -1e3))
    quiet = replace(coder_of(), activation=Threshold(torch.full((50,), 1e3)))
    for coder in (silent, quiet):
        for computing in (BFLOAT16, FLOAT32):
            found = replace(coder, computing=computing).encode(x)
            assert [column.numel() for column in found] == [0, 0, 0]


def test_every_latent_may_fire() -> None:
    coder = replace(coder_of(k=50), bias=torch.full((50,), 100.0))
    assert coder.encode(tokens_of(10)).value.numel() == 500


@pytest.mark.parametrize("computing", [BFLOAT16, FLOAT32], ids=["bfloat16", "float32"])
def test_no_block_of_scores_is_larger_than_allowed(
    monkeypatch: pytest.MonkeyPatch, computing: Computing
) -> None:
    sizes: list[int] = []
    empty = torch.empty

    def spy(*args: tuple[int, int], **options: torch.dtype) -> Tensor:
        room = empty(*args, **options)
        sizes.append(room.numel())
        return room

    monkeypatch.setattr(torch, "empty", spy)
    blocks = replace(computing, block_elements=256 * 100)
    replace(coder_of(1000), computing=blocks).encode(tokens_of(300))
    # Blocks of 256 tokens or the other 44, x 100 latents; the scores of a block have one room.
    assert max(sizes) == 256 * 100


def test_bfloat16_input_is_encoded_in_float32() -> None:
    coder, x = coder_of(), tokens_of(10).to(torch.bfloat16)
    assert_equal(coder.encode(x), coder.encode(x.float()))


def test_no_tokens_give_no_activations() -> None:
    for coder in coders_of():
        found = coder.encode(tokens_of(0))
        assert [column.numel() for column in found] == [0, 0, 0]
        assert [column.dtype for column in found] == [torch.int64, torch.int64, torch.float32]


def test_rows_come_in_the_order_asked_for_and_latent_0_is_one() -> None:
    coder = coder_of()
    coder = replace(coder, decoder=coder.decoder.to(torch.bfloat16))
    rows = coder.decoder_rows([7, 0])
    assert rows.dtype == torch.float32
    assert torch.equal(rows, coder.decoder[[7, 0]].float())
    assert torch.equal(coder.encoder_rows([7, 0]), coder.encoder[[7, 0]])


def test_width_and_number_of_latents_are_read_from_the_encoder() -> None:
    coder = replace(coder_of(50, 6), decoder=torch.zeros(50, 7), b_dec=torch.zeros(7))
    assert (coder.num_latents, coder.d_in, coder.d_out) == (50, 6, 7)


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (TopK(0), r"TopK: k is 0, wanted 1 to 50"),
        (TopK(51), r"TopK: k is 51, wanted 1 to 50"),
        (GroupMax(0), r"GroupMax: k is 0, wanted a divisor of 50"),
        (GroupMax(7), r"GroupMax: k is 7, wanted a divisor of 50"),
        (Threshold(torch.full((50,), -1.0)), r"threshold is -1\.0, wanted all >= 0"),
        (Threshold(torch.full((50,), torch.nan)), r"threshold is nan, wanted all >= 0"),
        (Gated(torch.full((50,), -2.0), torch.zeros(50)), r"scale is -2\.0, wanted all >= 0"),
    ],
)
def test_an_activation_that_no_latent_can_have_is_refused(
    activation: Activation, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(coder_of(50), activation=activation)


@pytest.mark.parametrize("scale", [0.0, -1.0, torch.inf, torch.nan])
def test_an_input_scale_that_cannot_be_undone_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=r"input_scale is .*, wanted above 0"):
        replace(coder_of(), input_scale=scale)


def test_how_a_coder_computes_can_be_told() -> None:
    coder = replace(coder_of(), computing=BFLOAT16)
    assert coder.describe() == {"screen": "bfloat16", "block_elements": 2_097_152}
    assert coder_of().describe()["screen"] == "float32"  # too small for anything else to pay


@pytest.mark.parametrize("coder", coders_of(), ids=lambda coder: type(coder.activation).__name__)
@pytest.mark.parametrize("token_block", [1, 7, 64])
def test_blocks_on_a_device_equal_the_dense_path(coder: LinearCoder, token_block: int) -> None:
    x = tokens_of(20)
    found = on_a_device(coder, token_block).encode(x)
    assert_sound(found)
    torch.testing.assert_close(dense(found, 20, 50), coder.encode_dense(x))
    assert on_a_device(coder, token_block).encode(tokens_of(0)).value.shape == (0,)


def test_lack_of_memory_halves_the_block_and_changes_nothing() -> None:
    coder, x = coder_of(), tokens_of(20)
    encode = block_of(coder)
    sizes: list[int] = []

    def little_memory(rows: Tensor) -> SparseActivations:
        sizes.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("no room")
        return encode(rows)

    encoder = DeviceEncoder(little_memory, 16, "float32")
    found = encoder.encode(x)
    # 16, 8 and 4 are too many; then 10 blocks of 2, and 2 it stays.
    assert sizes == [16, 8, 4] + 10 * [2]
    assert encoder.describe() == {"precision": "float32", "token_block": 2}
    torch.testing.assert_close(dense(found, 20, 50), coder.encode_dense(x))


def test_no_memory_for_one_token_is_an_error() -> None:
    def no_memory(rows: Tensor) -> SparseActivations:
        raise torch.OutOfMemoryError(f"no room for {len(rows)}")

    with pytest.raises(torch.OutOfMemoryError, match="no room for 1"):
        DeviceEncoder(no_memory, 4, "float32").encode(tokens_of(8))
