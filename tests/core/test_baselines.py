"""Neurons, random directions and principal components encode as their plain definitions say."""

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import Tensor

from autointerp_dagster.core.rng import latent_rng
from autointerp_dagster.core.sparse_coders import LinearCoder, NeuronCoder, SparseCoder, neurons
from autointerp_dagster.core.sparse_coders.baselines import (
    Moments,
    PrincipalComponents,
    pca_coder,
    random_coder,
    random_rotation,
    rotated_neurons,
)

By = Literal["value", "magnitude"]
BOTH = pytest.mark.parametrize("by", ["value", "magnitude"])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def neurons_of(width: int, k: int, by: By = "value") -> NeuronCoder:
    return NeuronCoder(randn(width, 3), randn(3, seed=1), k, by)


def dense(coder: SparseCoder, x: Tensor) -> Tensor:
    token, latent, value = coder.encode(x)
    assert value.dtype == torch.float32
    assert (value > 0).all()
    assert (token.diff() >= 0).all()
    found = torch.zeros(len(x), coder.num_latents)
    found[token, latent] = value
    return found


def test_the_largest_neurons_fire_where_they_are_above_zero() -> None:
    x = torch.tensor([[3.0, -9, 1, 2], [-1, -2, 0, -3]])
    assert dense(neurons_of(4, 2), x).tolist() == [[3, 0, 0, 2], [0, 0, 0, 0]]


def test_by_magnitude_a_neuron_is_two_latents() -> None:
    x = torch.tensor([[3.0, -9, 1, 2], [-1, -2, 0, -3]])
    coder = neurons_of(4, 2, "magnitude")
    # Neuron 0 is latents 0 and 1, neuron 1 is latents 2 and 3 ...
    assert dense(coder, x).tolist() == [[3, 0, 0, 9, 0, 0, 0, 0], [0, 0, 0, 2, 0, 0, 0, 3]]
    assert (coder.num_latents, coder.d_in, coder.d_out) == (8, 4, 3)


def test_of_equal_neurons_at_rank_k_the_first_fire() -> None:
    x = torch.tensor([[1.0, 2, 1, 1], [0, 0, 0, 5], [1, 1, 1, 1]])
    assert dense(neurons_of(4, 2), x).tolist() == [[1, 2, 0, 0], [0, 0, 0, 5], [1, 1, 0, 0]]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(0, 6),
    width=st.integers(1, 40),
    share=st.floats(0, 1),
    by=st.sampled_from(["value", "magnitude"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    is_coarse=st.booleans(),
)
def test_neurons_are_found_as_by_a_plain_loop(
    seed: int, n: int, width: int, share: float, by: By, dtype: torch.dtype, is_coarse: bool
) -> None:
    k = max(1, round(share * width))
    x = randn(n, width, seed=seed)
    x = (x.round() if is_coarse else x).to(dtype)  # full of ties, and of zeros
    coder = neurons_of(width, k, by)
    expected = torch.zeros(n, coder.num_latents)
    for token, row in enumerate(x.tolist()):
        score = abs if by == "magnitude" else float
        ranked = sorted(range(width), key=lambda i, row=row: -score(row[i]))[:k]
        for neuron in ranked:
            if score(row[neuron]) > 0:
                latent = 2 * neuron + (row[neuron] < 0) if by == "magnitude" else neuron
                expected[token, latent] = score(row[neuron])
    assert torch.equal(dense(coder, x), expected)
    assert torch.equal(coder.encode_dense(x), expected)


@BOTH
def test_blocks_of_tokens_change_nothing(by: By, monkeypatch: pytest.MonkeyPatch) -> None:
    coder, x = neurons_of(30, 4, by), randn(20, 30)
    whole = dense(coder, x)
    monkeypatch.setattr(neurons, "_BLOCK_ELEMENTS", 100)  # three tokens at a time
    assert torch.equal(dense(coder, x), whole)
    assert coder.encode(x[:0]).value.shape == (0,)


@BOTH
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_neuron_that_is_not_finite_is_infinite_and_not_silent(by: By, bad: float) -> None:
    x = randn(3, 10)
    x[1, 4] = bad
    found = neurons_of(10, 2, by).encode(x)
    assert found.token[found.value.isinf()].tolist() == [1]


@BOTH
def test_all_neurons_decode_to_the_output_of_the_mlp(by: By) -> None:
    coder, x = neurons_of(10, 10, by), randn(5, 10, seed=3)
    hidden = x if by == "magnitude" else x.relu()  # by value what is below zero is silent
    expected = hidden @ coder.decoder + coder.b_dec
    torch.testing.assert_close(coder.decode(coder.encode(x), x), expected)


def test_a_latents_rows_are_its_neuron_and_what_that_writes() -> None:
    coder = neurons_of(4, 2)
    assert coder.encoder_rows([3, 0]).tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]
    assert torch.equal(coder.decoder_rows([3, 0]), coder.decoder[[3, 0]])
    signed = neurons_of(4, 2, "magnitude")
    assert signed.encoder_rows([7, 0]).tolist() == [[0, 0, 0, -1], [1, 0, 0, 0]]
    assert torch.equal(
        signed.decoder_rows([7, 0]), torch.stack([-coder.decoder[3], coder.decoder[0]])
    )


@pytest.mark.parametrize("k", [0, 5])
def test_more_neurons_than_there_are_or_none_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k is {k}, wanted 1 to 4"):
        neurons_of(4, k)


def test_every_kind_is_a_sparse_coder() -> None:
    assert isinstance(neurons_of(4, 2), SparseCoder)
    assert isinstance(random_of(), SparseCoder)


def test_neurons_are_encoded_wherever_they_are() -> None:
    coder = neurons_of(4, 2)
    assert coder.to(torch.device("meta")) is coder
    assert coder.describe() == {"precision": "exact"}


def random_of(num_latents: int = 50, d_in: int = 6, k: int = 3, seed: int = 0) -> LinearCoder:
    return random_coder(latent_rng(seed, None, None, "directions"), num_latents, d_in, k)


def test_random_rows_have_length_1_and_decode_as_they_encode() -> None:
    coder, x = random_of(), randn(4, 6)
    torch.testing.assert_close(coder.encoder.norm(dim=1), torch.ones(50))
    assert torch.equal(coder.encoder, coder.decoder)
    assert not coder.bias.any()
    assert not coder.b_dec.any()
    kept = (x @ coder.encoder.T).relu().topk(3, dim=1)
    expected = torch.zeros(4, 50).scatter_(1, kept.indices, kept.values)
    torch.testing.assert_close(dense(coder, x), expected)


def test_random_rows_depend_on_the_seed_and_on_no_row_after_them() -> None:
    assert torch.equal(random_of(50).encoder, random_of(10_000).encoder[:50])
    assert torch.equal(random_of(9_000).encoder, random_of(10_000).encoder[:9_000])
    assert not torch.equal(random_of(seed=0).encoder, random_of(seed=1).encoder)


def test_random_rows_point_everywhere_alike() -> None:
    rows = random_of(20_000, 3).encoder
    # On a sphere in 3 dimensions each coordinate is uniform in [-1, 1]: mean 0, variance 1 / 3. Of
    # 20,000 rows a mean is off by 0.004 (one standard error), a share of half by the same.
    assert rows.mean(dim=0).abs().max() < 0.02
    assert (rows.var(dim=0) - 1 / 3).abs().max() < 0.01
    assert ((rows.abs() < 0.5).float().mean(dim=0) - 0.5).abs().max() < 0.02


def test_a_rotation_is_orthogonal_and_has_a_seed() -> None:
    first, again, other = (
        random_rotation(latent_rng(seed, None, None, "rotation"), 40) for seed in (0, 0, 1)
    )
    torch.testing.assert_close(first @ first.T, torch.eye(40), atol=1e-5, rtol=0)
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1


@BOTH
def test_rotated_neurons_are_coordinates_along_other_axes(by: By) -> None:
    unrotated, x = neurons_of(10, 10, by), randn(5, 10, seed=3)
    rotation = random_rotation(latent_rng(0, None, None, "rotation"), 10)
    coder = rotated_neurons(unrotated, rotation)
    along = x @ rotation.T
    torch.testing.assert_close(dense(coder, x), unrotated.encode_dense(along), atol=1e-5, rtol=1e-5)
    # All coordinates together are the neurons, so they write what these write.
    if by == "magnitude":
        expected = x @ unrotated.decoder + unrotated.b_dec
        torch.testing.assert_close(coder.decode(coder.encode(x), x), expected)
    few = rotated_neurons(neurons_of(10, 2, by), rotation)
    torch.testing.assert_close(
        dense(few, x), neurons_of(10, 2, by).encode_dense(along), atol=1e-5, rtol=1e-5
    )


def correlated(n: int, width: int) -> Tensor:
    """Vectors of unequal variance along hidden axes, far from the origin."""
    axes = torch.linalg.qr(randn(width, width, seed=5)).Q
    return randn(n, width) * torch.linspace(3, 0.2, width) @ axes + 100 * randn(width, seed=6)


def components_of(x: Tensor, n: int, sizes: tuple[int, ...]) -> PrincipalComponents:
    moments = Moments(x.shape[1])
    for part in x.split(list(sizes)):
        moments.add(part)
    return moments.components(n)


def test_principal_components_are_those_of_scikit_learn_with_fixed_signs() -> None:
    x = correlated(300, 8)
    found = components_of(x, 5, (300,))
    expected = PCA(5, svd_solver="full").fit(x.double().numpy())
    rows = expected.components_.copy()
    rows *= np.sign(rows[range(5), np.abs(rows).argmax(axis=1)])[:, None]
    np.testing.assert_allclose(found.rows.numpy(), rows, atol=1e-5)
    np.testing.assert_allclose(found.mean.numpy(), expected.mean_, rtol=1e-6)
    np.testing.assert_allclose(found.variances.numpy(), expected.explained_variance_, rtol=1e-6)


def test_parts_give_what_the_whole_gives() -> None:
    x = correlated(300, 8)
    whole = components_of(x, 8, (300,))
    for parts in ((1, 299), (100, 100, 100), (7, 200, 93)):
        for left, right in zip(components_of(x, 8, parts), whole, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [0, 9])
def test_more_components_than_there_are_or_none_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=rf"{n} of 300 vectors of width 8, wanted 1 to 8"):
        components_of(correlated(300, 8), n, (300,))
    with pytest.raises(ValueError, match=r"3 of 3 vectors of width 8, wanted 1 to 2"):
        components_of(correlated(3, 8), 3, (3,))
    with pytest.raises(ValueError, match=r"1 of 0 vectors of width 8, wanted 1 to 0"):
        Moments(8).components(1)


def test_a_component_is_two_latents_about_the_mean() -> None:
    components = PrincipalComponents(
        mean=torch.tensor([1.0, 1, 1]),
        rows=torch.tensor([[0.0, 1, 0], [1, 0, 0]]),
        variances=torch.tensor([2.0, 1], dtype=torch.float64),
    )
    coder = pca_coder(components, k=1)
    # About the mean: (3, -5, 0), (2, 1, 9): coordinates -5 and 3, then 1 and 2.
    x = torch.tensor([[4.0, -4, 1], [3, 2, 10]])
    assert dense(coder, x).tolist() == [[0, 5, 0, 0], [0, 0, 2, 0]]
    both = pca_coder(components, k=2)
    assert dense(both, x).tolist() == [[0, 5, 3, 0], [1, 0, 2, 0]]
    # Both coordinates give back all but what is along neither.
    assert both.decode(both.encode(x), x).tolist() == [[4, -4, 1], [3, 2, 1]]
