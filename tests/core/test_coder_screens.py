"""What a screen says of its error holds, and nothing that fires is ruled out or costs memory."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from autointerp_dagster.core.sparse_coders import (
    Computing,
    Gated,
    GroupMax,
    LinearCoder,
    ReLU,
    Threshold,
    TopK,
)
from autointerp_dagster.core.sparse_coders.rule import Rule
from autointerp_dagster.core.sparse_coders.scores import Bound, cut_of
from autointerp_dagster.core.sparse_coders.screen import (
    Linear,
    Pairs,
    Screen,
    exact,
)

BFLOAT16, FLOAT32 = Computing(screen="bfloat16"), Computing(screen="float32")
BOTH = pytest.mark.parametrize("computing", [BFLOAT16, FLOAT32], ids=["bfloat16", "float32"])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def all_of(linear: Linear, rows: Tensor) -> Tensor:
    """The activation of every pair, as the coder computes those of its candidates."""
    n, num_latents = len(rows), len(linear.weight)
    row = np.repeat(np.arange(n), num_latents)
    pairs = Pairs(row, np.tile(np.arange(num_latents), n))
    return exact(linear.weight, rows, pairs).view(n, num_latents) + linear.bias


def exhaustive(coder: LinearCoder, x: Tensor) -> Tensor:
    """Dense activations without any screen; among equal ones the lowest latents are kept."""
    products = all_of(Linear(coder.encoder, torch.zeros(coder.num_latents)), x)
    found = products + coder.bias
    match coder.activation:
        case TopK(k):
            kept = found.relu().sort(dim=1, descending=True, stable=True)
            return torch.zeros_like(found).scatter_(1, kept.indices[:, :k], kept.values[:, :k])
        case GroupMax(k):
            size = coder.num_latents // k
            for first in range(0, coder.num_latents, size):
                group = found[:, first : first + size]
                largest = group.max(dim=1)
                group.zero_()
                group[range(len(x)), largest.indices] = largest.values.relu()
            return found
        case Threshold(threshold):
            return found * (found > threshold)
        case Gated(scale, bias):
            return (scale * products + bias).relu() * (found > 0)
    return found.relu()


def dense(coder: LinearCoder, x: Tensor) -> Tensor:
    token, latent, value = coder.encode(x)
    zeros = torch.zeros(len(x), coder.num_latents)
    zeros[token, latent] = value
    return zeros


def near_ties(num_latents: int, d_in: int, seed: int) -> Tensor:
    """Weights that differ from each other by a few steps of bfloat16 or of float32."""
    steps = 2.0 ** -randn(num_latents, 1, seed=seed).abs().mul(8).add(4)
    return randn(1, d_in, seed=seed) + steps * randn(num_latents, d_in, seed=seed + 1)


@BOTH
@pytest.mark.parametrize("seed", range(6))
def test_each_screen_finds_what_is_found_without_one_among_near_ties(
    computing: Computing, seed: int
) -> None:
    encoder = near_ties(900, 96, seed)
    bias = randn(900, seed=seed + 2) * (0.0, 1e-4, 30.0)[seed % 3]
    x = near_ties(24, 96, seed + 3)
    relu = LinearCoder(encoder, bias, encoder, torch.zeros(96), ReLU(), computing=computing)
    largest = [TopK(k) for k in (1, 8, 100, 900)] + [GroupMax(k) for k in (1, 3, 100, 900)]
    threshold = exhaustive(relu, x)[3].clamp(min=0)  # those that fire on token 3 are at theirs
    gated = Gated(0.5 + randn(900, seed=7).abs(), bias.roll(1))
    for activation in (*largest, Threshold(threshold), ReLU(), gated):
        for block_elements in (None, 256 * 50):  # groups are cut, or several are one block
            blocks = replace(computing, block_elements=block_elements)
            coder = replace(relu, activation=activation, computing=blocks)
            assert torch.equal(dense(coder, x), exhaustive(coder, x))


def assert_bounded(bound: Bound, score: Tensor, activation: Tensor) -> None:
    off = (score.double() - activation.double()).abs().numpy()
    allowed = bound.absolute[:, None] + bound.relative * score.double().abs().numpy()
    assert bound.is_sound.all()
    assert (off <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bias_size", [0.0, 1e-3, 1000.0])
@pytest.mark.parametrize("is_rounded", [True, False])
def test_no_score_is_further_from_its_activation_than_the_bound(
    dtype: torch.dtype, bias_size: float, is_rounded: bool
) -> None:
    x, weight = randn(30, 300), randn(700, 300, seed=1)
    bias = bias_size * randn(700, seed=2)
    if not is_rounded:  # nothing is lost but by adding up, and by storing the score
        x, weight, bias = (each.bfloat16().float() for each in (x, weight, bias))
    x[5] = 0
    linear = Linear(weight, bias)
    screen, rounded = Screen(linear, Rule(), dtype), x.to(dtype)
    (stretch,) = screen._stretches(700)
    ((_, bits),) = screen._scores(rounded, stretch, torch.empty(30, 700, dtype=dtype))
    score = torch.from_numpy(bits).view(dtype).float()
    assert_bounded(screen._bound(x, rounded), score, all_of(linear, x))


def test_the_bound_holds_where_hardware_rounds_the_product_before_it_adds_the_bias() -> None:
    # Next to 1 the steps of bfloat16 are 2**-7. The bias 1 + 0.98 * 2**-8 is rounded to 1, the
    # product -(1 + 1.015625 * 2**-8) to -(1 + 2**-7): a score of -2**-7 for -0.04 * 2**-8.
    x = torch.ones(1, 2)
    weight = torch.tensor([[-1.0, -1.015625 * 2**-8]])
    bias = torch.tensor([1 + 0.98 * 2**-8])
    linear = Linear(weight, bias)
    score = (x @ weight.T).bfloat16() + bias.bfloat16()
    assert score.item() == -(2.0**-7)
    assert_bounded(
        Screen(linear, Rule(), torch.bfloat16)._bound(x, x.bfloat16()), score, x @ weight.T + bias
    )


def test_a_candidate_may_be_off_as_far_as_the_k_th_largest_is() -> None:
    bound = Bound(np.array([0.25, 0.25, 0.25, 0.0]), 0.0, np.array([True, True, False, True]))
    # k activations are at least 1 - 0.25, a score of 1 - 0.5 may stand for that much. Of 0.25 no
    # more is known than that a candidate fires. Where the bound says nothing, nothing is chosen;
    # where nothing is off, a score of 0 is silence.
    cut = cut_of(np.array([1.0, 0.25, 1.0, 0.0]), bound)
    assert cut[:2].tolist() == [pytest.approx(0.5), pytest.approx(-0.25)]
    assert cut[0] < 0.5
    assert cut[1] < -0.25
    assert cut[2] == np.inf
    assert 0 < cut[3] < 1e-44
    # A score of s stands for at most s + s / 8, one of 1 for at least 1 - 1 / 8.
    relative = Bound(np.array([0.0]), 0.125, np.array([True]))
    assert cut_of(np.array([1.0]), relative).tolist() == [pytest.approx(0.875 / 1.125)]


@BOTH
def test_the_largest_is_found_where_both_scores_are_off_by_all_that_the_bound_allows(
    computing: Computing,
) -> None:
    # In 1024 dimensions weights of 1 + 0.98 * 2**-8 are rounded to 1, and of 1 + 1.02 * 2**-8 to
    # 1 + 2**-7, there in 1023 alone; 100 dimensions of -10 take 1000 off. So latent 0 scores 24
    # and latent 1 scores 31, but in truth it is 27.92 against 27.08. Each is off by 3.92, and
    # |w - w~| |x~| is 0.98 * 2**-8 * 32 * 33.5 = 4.1: much less than the 7 between the scores.
    encoder = torch.full((2, 1124), -10.0)
    encoder[0, :1024], encoder[1, :1023] = 1 + 0.98 * 2**-8, 1 + 1.02 * 2**-8
    encoder[1, 1023] = 0
    x = torch.ones(1, 1124)
    assert (x @ encoder.bfloat16().float().T).tolist() == [[24, pytest.approx(31, abs=0.01)]]
    bias, b_dec = torch.zeros(2), torch.zeros(1124)
    coder = LinearCoder(encoder, bias, encoder, b_dec, TopK(1), computing=computing)
    # Among 100 others, so that two candidates are few enough for the screen to judge.
    many = torch.zeros(1000, 1124)
    many[700], many[3] = encoder
    many = replace(coder, encoder=many, decoder=many, bias=torch.zeros(1000))
    assert coder.encode(x).latent.tolist() == [0]
    assert many.encode(x).latent.tolist() == [700]


def peak_mb(coder: LinearCoder, x: Tensor) -> float:
    """Of numpy's arrays, while some tokens are encoded."""
    coder.encode(x[:1])  # the weights of the screens are converted
    tracemalloc.start()
    coder.encode(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


@BOTH
def test_latents_that_cannot_fire_are_no_candidates(computing: Computing) -> None:
    encoder, zeros = randn(16_384, 24), torch.zeros(16_384)
    topk = LinearCoder(encoder, zeros, encoder, torch.zeros(24), TopK(8), computing=computing)
    # Scores of 0 on tokens that are 0; without bias nothing fires on them.
    for coder in (topk, replace(topk, activation=GroupMax(64))):
        assert peak_mb(coder, torch.zeros(256, 24)) < 8
    # Latents whose weights are 0, at their threshold.
    encoder = encoder.clone()
    encoder[::3] = 0
    bias = torch.full((16_384,), -12.0)
    bias[::3] = 0
    relu = replace(topk, encoder=encoder, bias=bias, activation=ReLU())
    assert peak_mb(relu, randn(256, 24)) < 8
    assert torch.equal(dense(relu, randn(4, 24)), exhaustive(relu, randn(4, 24)))
    # The same weights, and a bias above it: they fire on every token.
    bias = bias.clone()
    bias[300] = 1e-30
    relu = replace(relu, bias=bias)
    assert relu.encode(torch.zeros(5, 24)).latent.tolist() == 5 * [300]


@BOTH
def test_memory_is_bounded_where_every_latent_is_a_candidate(computing: Computing) -> None:
    equal, zeros = torch.ones(16_384), torch.zeros(256, 24)
    encoder = randn(16_384, 24)
    coder = LinearCoder(encoder, equal, encoder, torch.zeros(24), TopK(8), computing=computing)
    assert dense(coder, zeros)[:, :8].eq(1).all()
    assert coder.encode(zeros).value.numel() == 256 * 8
    assert peak_mb(coder, zeros) < 80  # of 524,288 pairs at once; all at once are 8 times as many
    groups = replace(coder, activation=GroupMax(8))
    assert dense(groups, zeros)[:, ::2048].eq(1).all()
    assert peak_mb(groups, zeros) < 110  # sorted by group


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("k", [8, None])
def test_a_few_loud_latents_do_not_widen_the_bound_of_the_others(
    dtype: torch.dtype, k: int | None
) -> None:
    weight, x = randn(2000, 64), randn(30, 64, seed=1)
    threshold = None if k else torch.full((2000,), 15.0)

    def n_candidates(weight: Tensor, bias: Tensor) -> int:
        screen = Screen(Linear(weight, bias), Rule(k=k, threshold=threshold), dtype)
        return screen.candidates(x, 2000, None).candidates.row.size

    usual = n_candidates(weight, torch.zeros(2000))
    assert 30 * 8 <= usual <= 30 * 200
    loud, bias = weight.clone(), torch.zeros(2000)
    loud[7] *= 1e6
    bias[9] = 1e6
    assert n_candidates(loud, bias) <= usual + 30 * 4
    activation = TopK(k) if k else Threshold(torch.full((2000,), 15.0))
    computing = Computing(screen="bfloat16" if dtype == torch.bfloat16 else "float32")
    coder = LinearCoder(loud, bias, loud, torch.zeros(64), activation, computing=computing)
    assert torch.equal(dense(coder, x), exhaustive(coder, x))
    assert set(coder.encode(-x).latent.tolist()) >= {7, 9}


@BOTH
def test_few_latents_may_all_be_loud(computing: Computing) -> None:
    """By its weights or by its bias each is much larger than the smallest of the others."""
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 5.0]])
    coder = LinearCoder(
        weight, torch.tensor([3.0, 0.0, 0.0]), weight, torch.zeros(2), ReLU(), computing=computing
    )
    x = randn(20, 2)
    found = coder.encode(x)
    dense = torch.zeros(20, 3)
    dense[found.token, found.latent] = found.value
    assert torch.equal(dense, coder.encode_dense(x))
