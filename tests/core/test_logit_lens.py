import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autointerp_dagster.core import logit_lens
from autointerp_dagster.core.logit_lens import (
    centred,
    promoted_and_suppressed,
    promoted_tokens,
)


def random_problem(seed, n_latents, n_tokens, d_in):
    draw = np.random.default_rng(seed)
    directions = torch.tensor(draw.normal(size=(n_latents, d_in)), dtype=torch.float32)
    unembedding = torch.tensor(draw.normal(size=(n_tokens, d_in)), dtype=torch.float32)
    norm = torch.tensor(draw.uniform(0.5, 2, size=d_in), dtype=torch.float32)
    return directions, unembedding, norm


def oracle(directions, unembedding, norm, n):
    """In float64, all logits at once."""
    logits = directions.double().numpy() @ (unembedding.double() * norm.double()).numpy().T
    order = np.argsort(logits, axis=1)
    return order[:, ::-1][:, :n], order[:, :n]


def test_a_direction_promotes_the_tokens_that_point_its_way():
    unembedding = torch.tensor([[1.0, 0], [3.0, 0], [-2.0, 0], [0, 9.0]])
    high, low = promoted_and_suppressed(torch.tensor([[1.0, 0], [-1.0, 0]]), unembedding, None, 2)
    assert high.tolist() == [[1, 0], [2, 3]]
    assert low.tolist() == [[2, 3], [1, 0]]


def test_the_weight_of_the_final_norm_is_folded_in():
    unembedding = torch.tensor([[2.0, 0], [0, 1.0]])
    direction = torch.tensor([[1.0, 1.0]])
    assert promoted_and_suppressed(direction, unembedding, None, 1)[0].tolist() == [[0]]
    norm = torch.tensor([1.0, 3.0])
    assert promoted_and_suppressed(direction, unembedding, norm, 1)[0].tolist() == [[1]]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 40), st.integers(1, 6), st.data())
def test_blocks_of_any_size_agree_with_all_logits_at_once(seed, n_latents, n_tokens, d_in, data):
    problem = random_problem(seed, n_latents, n_tokens, d_in)
    n = data.draw(st.integers(1, n_tokens))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(logit_lens, "_LATENTS_PER_BLOCK", data.draw(st.integers(1, 4)))
        patched.setattr(logit_lens, "_BLOCK_ELEMENTS", data.draw(st.integers(1, 60)))
        high, low = promoted_and_suppressed(*problem, n)
    expected_high, expected_low = oracle(*problem, n)
    assert (high.numpy() == expected_high).all()
    assert (low.numpy() == expected_low).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 300), st.sampled_from([1, 5, 40]), st.data())
def test_a_rough_first_look_changes_no_token(seed, n_tokens, d_in, data):
    directions, unembedding, norm = random_problem(seed, 7, n_tokens, d_in)
    unembedding[:: data.draw(st.integers(2, 9))] *= 300  # lengths differ, and so do the bounds
    n = data.draw(st.integers(1, min(n_tokens, 9)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(logit_lens, "_MORE", data.draw(st.sampled_from([(0, 0), (1, 3), (12, 56)])))
        patched.setattr(logit_lens, "_GROUP", data.draw(st.integers(1, 5)))
        patched.setattr(logit_lens, "_BLOCK_ELEMENTS", data.draw(st.sampled_from([100, 1 << 20])))
        high, low = promoted_and_suppressed(directions, unembedding, norm, n, torch.bfloat16)
    expected_high, expected_low = oracle(directions, unembedding, norm, n)
    assert (high.numpy() == expected_high).all()
    assert (low.numpy() == expected_low).all()


def test_tokens_that_bfloat16_cannot_tell_apart_are_told_apart():
    unembedding = 1 + torch.arange(200)[:, None] * 2.0**-20
    high, low = promoted_and_suppressed(torch.ones(1, 1), unembedding, None, 3, torch.bfloat16)
    assert high.tolist() == [[199, 198, 197]]
    assert low.tolist() == [[0, 1, 2]]


def test_a_large_vocabulary_is_searched_by_groups_that_end_anywhere():
    problem = random_problem(6, 3, 20_011, 6)
    found = promoted_and_suppressed(*problem, 8, torch.bfloat16)
    for mine, expected in zip(found, oracle(*problem, 8), strict=True):
        assert (mine.numpy() == expected).all()


def test_moving_all_logits_or_scaling_a_direction_changes_no_token():
    directions, unembedding, norm = random_problem(0, 20, 300, 8)
    high, low = promoted_and_suppressed(directions, unembedding, norm, 10)
    centred = unembedding - unembedding.mean(0)
    for same in ((directions, centred), (directions * 7, unembedding)):
        again = promoted_and_suppressed(*same, norm, 10)
        assert torch.equal(again[0], high)
        assert torch.equal(again[1], low)


def test_a_direction_turned_round_suppresses_what_it_promoted():
    directions, unembedding, norm = random_problem(1, 20, 300, 8)
    high, low = promoted_and_suppressed(directions, unembedding, norm, 10)
    assert torch.equal(promoted_and_suppressed(-directions, unembedding, norm, 10)[0], low)
    assert torch.equal(promoted_and_suppressed(-directions, unembedding, norm, 10)[1], high)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_type_are_read_exactly(dtype):
    directions, unembedding, norm = random_problem(2, 5, 50, 4)
    unembedding, norm = unembedding.to(dtype), norm.to(dtype)
    high, low = promoted_and_suppressed(directions, unembedding, norm, 5)
    expected_high, expected_low = oracle(directions, unembedding, norm, 5)
    assert (high.numpy() == expected_high).all()
    assert (low.numpy() == expected_low).all()


def test_no_latents_have_no_tokens():
    high, low = promoted_and_suppressed(torch.zeros(0, 4), torch.ones(9, 4), None, 3)
    assert high.shape == low.shape == (0, 3)
    assert high.dtype == torch.int64


@pytest.mark.parametrize("n", [0, -1, 10])
def test_more_tokens_than_there_are_cannot_be_named(n):
    with pytest.raises(ValueError, match="wanted 1 to 9"):
        promoted_and_suppressed(torch.ones(1, 4), torch.ones(9, 4), None, n)


def test_inputs_are_not_changed():
    problem = random_problem(3, 4, 30, 4)
    before = [part.clone() for part in problem]
    promoted_and_suppressed(*problem, 3)
    assert all(torch.equal(a, b) for a, b in zip(problem, before, strict=True))


def test_tokens_become_texts_and_those_without_are_left_out():
    texts = {0: " river", 1: "", 2: "sea"}
    tokens = [[2, 1, 0], [1, 1, 1], []]
    assert promoted_tokens(tokens, texts.__getitem__) == [("sea", " river"), (), ()]


def test_a_layer_norm_takes_the_mean_off_before_the_head_sees_a_direction():
    directions, unembedding, norm = random_problem(5, 8, 60, 6)
    layer_norm = torch.nn.LayerNorm(6, eps=0, elementwise_affine=False)
    stream = 1e4 * torch.ones(6) * torch.tensor([1.0, -1, 1, -1, 1, -1])
    with torch.inference_mode():  # what a small step along each direction does to the logits
        change = (layer_norm(stream + directions) - layer_norm(stream)).double()
        along = (layer_norm(stream).double() * centred(directions).double()).sum(1, keepdim=True)
        change += layer_norm(stream).double() * along / 6 / 1e4  # the norm divides by the size
        logits = change * norm @ unembedding.T.double()
    high, low = promoted_and_suppressed(centred(directions), unembedding, norm, 3)
    order = logits.argsort(dim=1, descending=True)
    assert torch.equal(high, order[:, :3])
    assert torch.equal(low, order.flip(1)[:, :3])


def test_a_direction_that_is_the_same_everywhere_is_nothing_once_centred():
    rows = centred(torch.tensor([[0.1] * 3, [0.1, 0.1, 0.4], [0.0] * 3]))
    assert rows[0].tolist() == rows[2].tolist() == [0, 0, 0]
    assert rows[1].tolist() == pytest.approx([-0.1, -0.1, 0.2])


@pytest.mark.gpu
def test_a_gpu_names_the_same_tokens():
    problem = random_problem(4, 600, 30_000, 64)
    expected = promoted_and_suppressed(*problem, 10)
    directions, unembedding, norm = problem
    found = promoted_and_suppressed(directions, unembedding.cuda(), norm.cuda(), 10)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.device.type == "cuda"
        assert (mine.cpu() == theirs).float().mean() > 0.999  # sums in another order may tie
