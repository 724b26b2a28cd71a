"""A linear coder computes what its formula says, for every activation, normalisation and type."""

import math
from dataclasses import replace

import numpy as np
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
    InputNorm,
    LinearCoder,
    ReLU,
    SparseActivations,
    SparseCoder,
    Threshold,
    TopK,
)
from autointerp_dagster.core.sparse_coders.rule import moved, threshold_in_float32

NORMS: list[InputNorm] = ["none", "layer_norm", "constant_norm_rescale"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def identity_coder(width: int, activation: Activation | None = None) -> LinearCoder:
    """Every latent reads and writes one dimension."""
    eye, zeros = torch.eye(width), torch.zeros(width)
    return LinearCoder(eye, zeros, eye, zeros, activation or ReLU())


def dense(coder: SparseCoder, x: Tensor) -> Tensor:
    token, latent, value = coder.encode(x)
    assert (value > 0).all()
    assert (token.diff() >= 0).all()
    found = torch.zeros(len(x), coder.num_latents)
    found[token, latent] = value
    return found


def both(coder: LinearCoder, x: Tensor) -> list[list[float]]:
    """All activations, which both paths must give alike."""
    found = dense(coder, x)
    assert torch.equal(found, coder.encode_dense(x))
    return found.tolist()


def test_the_largest_of_each_group_fires_where_it_is_above_zero() -> None:
    coder = identity_coder(4, GroupMax(2))
    # Groups are latents 0, 1 and 2, 3. Of two equal ones the first; below zero none.
    x = torch.tensor([[2.0, 1, -1, -3], [1, 1, 0, 3], [0, 0, -1, 5]])
    assert both(coder, x) == [[2, 0, 0, 0], [1, 0, 0, 3], [0, 0, 0, 5]]


def test_a_gate_opens_by_its_own_bias_and_the_value_has_another() -> None:
    coder = LinearCoder(
        encoder=torch.tensor([[1.0, 0], [0, 1], [1, 1]]),
        bias=torch.tensor([0.0, -1, 0]),
        decoder=torch.zeros(3, 2),
        b_dec=torch.zeros(2),
        activation=Gated(torch.tensor([2.0, 1, 0.5]), torch.tensor([-1.0, 5, -10])),
    )
    # Products of (3, 1): 3, 1, 4. Gates: 3, 0 (shut), 4. Values: 2 * 3 - 1 = 5; 0.5 * 4 - 10 < 0.
    # Of (-1, 4): -1, 4, 3. Gates: shut, 3, 3. Values: 4 + 5 = 9; below zero.
    assert both(coder, torch.tensor([[3.0, 1], [-1, 4]])) == [[5, 0, 0], [0, 9, 0]]


def test_a_relu_lets_pass_what_is_above_zero() -> None:
    assert both(identity_coder(3), torch.tensor([[1.0, 0, -2]])) == [[1, 0, 0]]


def test_of_equal_pre_activations_at_rank_k_the_lowest_latents_fire() -> None:
    x = torch.tensor([[1.0, 2, 1, 1, 0]])
    assert both(identity_coder(5, TopK(3)), x) == [[1, 2, 1, 0, 0]]
    assert both(identity_coder(5, TopK(5)), x) == [[1, 2, 1, 1, 0]]


def test_a_layer_norm_by_hand() -> None:
    coder = replace(identity_coder(3), input_norm="layer_norm", b_dec=torch.tensor([1.0, 0, 0]))
    x = torch.tensor([[5.0, 3, 1], [7, 7, 7]])
    # Mean 3, standard deviation of a sample sqrt((4 + 0 + 4) / 2) = 2: (2, 0, -2) / 2.00001.
    assert dense(coder, x).tolist() == [[pytest.approx(2 / 2.00001), 0, 0], [0, 0, 0]]
    torch.testing.assert_close(coder.encode_dense(x), dense(coder, x))
    # Decoded: (0.999995 + 1, 0, 0) * 2 + 3. A vector of one number is its mean.
    decoded = coder.decode(coder.encode(x), x)
    assert decoded.tolist() == [[pytest.approx(6.99999), 3, 3], [7, 7, 7]]


def test_a_rescaled_norm_by_hand() -> None:
    coder = replace(identity_coder(2), input_norm="constant_norm_rescale")
    x = torch.tensor([[3.0, 4], [0, 0]])
    # |x| = 5, so x is multiplied by sqrt(2) / 5; zeros stay zeros. Decoding undoes it.
    factor = math.sqrt(2) / 5
    expected = [[pytest.approx(3 * factor), pytest.approx(4 * factor)], [0, 0]]
    assert dense(coder, x).tolist() == coder.encode_dense(x).tolist() == expected
    torch.testing.assert_close(coder.decode(coder.encode(x), x), x)


def test_the_scale_comes_before_the_centre_and_decoding_divides_by_it() -> None:
    coder = replace(identity_coder(2), input_scale=4.0, centre=torch.tensor([1.0, 10]))
    coder = replace(coder, b_dec=torch.tensor([8.0, 0]))
    x = torch.tensor([[2.0, 3]])
    assert both(coder, x) == [[7, 2]]  # 8 - 1, 12 - 10
    # (7 + 8) / 4, 2 / 4. One unit of a latent adds a quarter to the output.
    assert coder.decode(coder.encode(x), x).tolist() == [[3.75, 0.5]]
    assert coder.decoder_rows([1]).tolist() == [[0, 0.25]]


def test_a_skip_connection_takes_the_raw_input() -> None:
    coder = LinearCoder(
        encoder=torch.tensor([[1.0, 0]]),
        bias=torch.zeros(1),
        decoder=torch.tensor([[1.0, 0, 2]]),
        b_dec=torch.tensor([0.0, 1, 0]),
        activation=ReLU(),
        centre=torch.tensor([1.0, 1]),
        skip=torch.tensor([[1.0, 0], [0, 1], [1, 1]]),
    )
    x = torch.tensor([[3.0, 5]])
    # The latent is 2: (2, 0, 4) + (0, 1, 0) + (3, 5, 8).
    assert coder.decode(coder.encode(x), x).tolist() == [[5, 6, 12]]
    assert (coder.d_in, coder.d_out) == (2, 3)


def test_the_input_is_cast_and_centred_in_the_coders_type() -> None:
    # From 1 to 2 the steps of bfloat16 are 2**-7, below 1 they are 2**-8. So 1.005 becomes
    # 1 + 2**-7, and less 2**-10 that again; 1 + 2**-9 becomes 1, and 1 - 2**-10 becomes 1, too.
    x = torch.tensor([[1.005, 1 + 2**-9]])
    centre = torch.full((2,), 2.0**-10)
    coder = replace(identity_coder(2), centre=centre, dtype=torch.bfloat16)
    assert both(coder, x) == [[1 + 2**-7, 1.0]]


def test_a_threshold_is_compared_in_the_coders_type() -> None:
    # Next to 1 the steps of bfloat16 are 2**-7. 1 + 2**-9 and, halfway, 1 + 2**-8 become 1, which
    # does not exceed a threshold of 1; a little more than halfway is the next number.
    values = torch.tensor([1 + 2**-9, 1 + 2**-8, 1 + 2**-8 + 2**-20, 1.0])
    coder = LinearCoder(
        torch.diag(values), torch.zeros(4), torch.eye(4), torch.zeros(4), Threshold(torch.ones(4)),
        dtype=torch.bfloat16,
    )  # fmt: skip
    assert both(coder, torch.ones(1, 4)) == [[0, 0, values[2].item(), 0]]
    in_float32 = replace(coder, dtype=torch.float32)
    assert both(in_float32, torch.ones(1, 4)) == [[*values[:3].tolist(), 0]]


FLOATS = st.floats(min_value=2.0**-20, max_value=60000.0, width=32)


@settings(max_examples=300)
@given(FLOATS, st.sampled_from([torch.bfloat16, torch.float16]), st.integers(-3, 3))
def test_a_threshold_in_float32_decides_as_rounding_does(
    threshold: float, dtype: torch.dtype, steps: int
) -> None:
    exact = torch.tensor([threshold])
    found = threshold_in_float32(exact, dtype)
    near = torch.cat([found, exact, exact.to(dtype).float()])
    for _ in range(abs(steps)):
        near = torch.nextafter(near, torch.full_like(near, math.copysign(torch.inf, steps)))
    assert torch.equal(near > found, near.to(dtype).float() > exact)


def test_a_threshold_of_zero_stays_zero() -> None:
    zero = torch.zeros(1)
    assert threshold_in_float32(zero, torch.bfloat16).item() == 0
    coder = replace(identity_coder(1, Threshold(zero)), dtype=torch.float16)
    x = torch.tensor([[2.0**-24]])
    small = replace(coder, encoder=torch.tensor([[2.0**-10]]))  # 2**-34 is 0 in float16
    assert both(small, x) == [[2.0**-34]]


def random_coder(
    seed: int, dtype: torch.dtype, norm: InputNorm, activation: Activation
) -> LinearCoder:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return LinearCoder(
        encoder=randn(40, 7),
        bias=randn(40).float(),
        decoder=randn(40, 9),
        b_dec=randn(9).float(),
        activation=activation,
        centre=randn(7).float(),
        input_norm=norm,
        input_scale=1.5,
        skip=randn(9, 7),
        dtype=dtype,
    )


KINDS: list[Activation] = [
    TopK(3),
    GroupMax(8),
    Threshold(torch.linspace(0, 2, 40)),
    ReLU(),
    Gated(torch.linspace(0.5, 2, 40), torch.linspace(-1, 1, 40)),
]


def plain(coder: LinearCoder, x: Tensor) -> Tensor:
    """One token at a time, with torch's own mean, deviation and norm, in the coder's type."""
    rows = []
    for row in x.to(coder.dtype):
        if coder.input_norm == "layer_norm":
            row = row - row.mean()
            row = row / (row.std() + 1e-5)
        elif coder.input_norm == "constant_norm_rescale":
            row = row * (math.sqrt(len(row)) / row.norm())
        assert coder.centre is not None
        rows.append(row * coder.input_scale - coder.centre.to(coder.dtype))
    return torch.stack(rows).float()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", KINDS, ids=lambda kind: type(kind).__name__)
def test_both_paths_follow_the_formula(
    activation: Activation, dtype: torch.dtype, norm: InputNorm
) -> None:
    coder = random_coder(0, dtype, norm, activation)
    x = torch.randn(30, 7, generator=torch.Generator().manual_seed(1))
    # torch sums a vector in another order, which may turn a last bit of the type; without a norm
    # nothing is summed before the products.
    off = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    off = 1e-5 if norm == "none" else off
    products = plain(coder, x) @ coder.encoder.float().T
    pre = products + coder.bias
    values, needed = pre, smallest_that_fires(activation, pre)
    if isinstance(activation, Gated):
        values = activation.scale * products + activation.bias
    found = dense(coder, x)
    fires = found > 0
    torch.testing.assert_close(found[fires], values[fires], rtol=off, atol=2 * off)
    rounding = 0.01 if dtype != torch.float32 else 1e-5  # of what is compared with a threshold
    assert (pre - needed)[fires].min() > -2 * off - rounding
    assert torch.minimum(pre - needed, values)[~fires].max() < 2 * off + rounding
    torch.testing.assert_close(found, coder.encode_dense(x))


def smallest_that_fires(activation: Activation, pre: Tensor) -> Tensor:
    """The pre-activation that each latent needs, by a formula of its own."""
    match activation:
        case TopK(k):
            return pre.topk(k, dim=1).values[:, -1:].clamp(min=0)
        case GroupMax(k):
            largest = pre.unflatten(1, (k, -1)).amax(2)
            return largest.clamp(min=0).repeat_interleave(pre.shape[1] // k, 1)
        case Threshold(threshold):
            return threshold
    return torch.zeros(())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_is_the_plain_sum_of_rows(dtype: torch.dtype, norm: InputNorm) -> None:
    coder = random_coder(0, dtype, norm, TopK(3))
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    found = coder.encode(x)
    assert coder.skip is not None
    decoded = coder.decode(found, x)
    for token in range(5):
        y = coder.b_dec.clone()
        for latent, value in zip(found.latent[found.token == token],
                                 found.value[found.token == token], strict=True):  # fmt: skip
            y += value * coder.decoder[latent].float()
        row = x[token].to(dtype)
        y = y / 1.5
        if norm == "layer_norm":
            y = y * (row - row.mean()).std().float() + row.mean().float()
        elif norm == "constant_norm_rescale":
            y = y * row.float().norm() / math.sqrt(7)
        y = y + coder.skip.float() @ x[token]
        off = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(decoded[token], y, rtol=off, atol=off)


def test_no_activations_decode_to_the_bias() -> None:
    coder = random_coder(0, torch.float32, "none", ReLU())
    nothing = SparseActivations(*(torch.zeros(0, dtype=t) for t in
                                  (torch.int64, torch.int64, torch.float32)))  # fmt: skip
    coder = replace(coder, skip=None, input_scale=1.0)
    assert torch.equal(coder.decode(nothing, torch.ones(3, 7)), coder.b_dec.expand(3, -1))


def integers(generator: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(generator.integers(-3, 4, shape)).float()


@settings(max_examples=150, deadline=None)
@given(
    kind=st.integers(0, 7),
    seed=st.integers(0, 10_000),
    has_bias=st.booleans(),
    zero_rows=st.booleans(),
    loud=st.sampled_from([1.0, 2.0**20]),
    scale=st.sampled_from([1.0, 2.0**60, 2.0**-60]),
    screen=st.sampled_from(["bfloat16", "float32"]),
    block_elements=st.sampled_from([1, 256 * 7, None]),
    dtype=st.sampled_from(DTYPES),
)
def test_where_float32_is_exact_both_paths_are_equal_to_the_bit(
    kind: int,
    seed: int,
    has_bias: bool,
    zero_rows: bool,
    loud: float,
    scale: float,
    screen: str,
    block_elements: int | None,
    dtype: torch.dtype,
) -> None:
    """Small integers: full of ties, of pre-activations of 0, and of ones at their threshold."""
    generator = np.random.default_rng(seed)
    encoder = integers(generator, 60, 5)
    encoder[generator.integers(60)] *= loud
    encoder[generator.integers(60)] = 0
    bias = has_bias * integers(generator, 60)
    kinds: list[Activation] = [
        TopK(1), TopK(7), TopK(60), GroupMax(3), GroupMax(60),
        Threshold(integers(generator, 60).abs()),
        ReLU(),
        Gated(1 + integers(generator, 60).abs(), integers(generator, 60)),
    ]  # fmt: skip
    computing = Computing(screen=screen, block_elements=block_elements)
    zeros = torch.zeros(5)
    coder = LinearCoder(encoder, bias, encoder, zeros, kinds[kind], computing=computing)
    x = integers(generator, 12, 5)
    if zero_rows:
        x[::2] = 0
    if scale != 1.0:  # powers of 2 change no tie, but which screen can judge
        x, dtype = x * scale, torch.float32
        coder = replace(coder, bias=zeros.new_zeros(60))
    coder = replace(coder, dtype=dtype, centre=integers(generator, 5) * (scale == 1.0))
    assert torch.equal(dense(coder, x), coder.encode_dense(x))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [5, 64, 999])
def test_a_normalised_token_is_encoded_alone_as_in_company(
    norm: InputNorm, dtype: torch.dtype, width: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    encoder, zeros = torch.randn(50, width, generator=generator), torch.zeros(50)
    coder = LinearCoder(
        encoder, zeros, encoder, torch.zeros(width), TopK(5), input_norm=norm, dtype=dtype
    )
    x = torch.randn(64, width, generator=generator)
    together = coder.encode(x)
    for token in (0, 1, 63):
        for alone in (coder.encode(x[token : token + 1]), coder.encode(x[token:].contiguous())):
            mine, first = together.token == token, alone.token == 0
            assert torch.equal(alone.latent[first], together.latent[mine])
            assert torch.equal(alone.value[first], together.value[mine])


@pytest.mark.parametrize("activation", KINDS, ids=lambda kind: type(kind).__name__)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_is_infinite_and_not_silent(
    activation: Activation, bad: float
) -> None:
    coder = replace(random_coder(0, torch.float32, "none", activation), skip=None)
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    clean = coder.encode(x)
    x[1, 2] = bad
    found = coder.encode(x)
    assert found.value[found.token == 1].isinf().any()
    for token in (0, 2):  # the others are as they were
        assert torch.equal(found.value[found.token == token], clean.value[clean.token == token])


def test_on_its_own_device_a_coder_stays_as_it_is() -> None:
    coder = identity_coder(3)
    assert coder.to(torch.device("cpu")) is coder


def test_elsewhere_the_encoder_has_the_precision_that_was_asked_for() -> None:
    coder, meta = replace(identity_coder(3), centre=torch.zeros(3)), torch.device("meta")
    for precision in ("float32", "bfloat16"):
        there = replace(coder, computing=Computing(precision=precision)).to(meta)
        assert there.encoder.dtype == getattr(torch, precision)
        for tensor in (there.encoder, there.bias, there.centre):
            assert tensor is not None
            assert tensor.is_meta
        assert there.decoder is coder.decoder
    gated = moved(Gated(torch.ones(3), torch.ones(3)), meta)
    assert isinstance(gated, Gated)
    assert gated.scale.is_meta
    assert gated.bias.is_meta
    threshold = moved(Threshold(torch.ones(3)), meta)
    assert isinstance(threshold, Threshold)
    assert threshold.threshold.is_meta
