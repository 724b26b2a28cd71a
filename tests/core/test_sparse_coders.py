"""The sparse path of a TopK coder equals the dense one, whatever the block sizes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autointerp_dagster.core.sparse_coders import SparseActivations, TopKCoder


def coder_of(num_latents: int = 50, d_in: int = 6, k: int = 5, seed: int = 0) -> TopKCoder:
    generator = torch.Generator().manual_seed(seed)
    return TopKCoder(
        encoder=torch.randn(num_latents, d_in, generator=generator),
        bias=torch.randn(num_latents, generator=generator),
        decoder=torch.randn(num_latents, d_in, generator=generator),
        b_dec=torch.randn(d_in, generator=generator),
        k=k,
    )


def tokens_of(n: int, d_in: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


def dense(sparse: SparseActivations, num_latents: int) -> Tensor:
    zeros = torch.zeros(sparse.values.shape[0], num_latents)
    return zeros.scatter_(1, sparse.indices, sparse.values)


def test_encode_by_hand() -> None:
    coder = TopKCoder(
        encoder=torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]]),
        bias=torch.tensor([0.0, 0.5, 0.0, 0.0]),
        decoder=torch.eye(4, 2),
        b_dec=torch.tensor([1.0, 1.0]),
        k=2,
    )
    # x - b_dec = (2, -1): pre-activations 2, -0.5, 1, -2: the two largest are latents 0 and 2.
    # x - b_dec = (-1, -1): -1, -0.5, -2, 1: latent 3 fires; the second largest is below zero.
    activations = dense(coder.encode(torch.tensor([[3.0, 0.0], [0.0, 0.0]])), 4)
    assert activations.tolist() == [[2, 0, 1, 0], [0, 0, 0, 1]]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 300),
    num_latents=st.integers(5, 400),
    block_elements=st.sampled_from([1, 1000, 20_000, 10_000_000]),
)
def test_blocked_encoding_equals_the_dense_path(
    n: int, num_latents: int, block_elements: int
) -> None:
    coder, x = coder_of(num_latents), tokens_of(n)
    blocked = replace(coder, block_elements=block_elements).encode(x)
    assert blocked.indices.shape == blocked.values.shape == (n, 5)
    torch.testing.assert_close(dense(blocked, num_latents), coder.encode_dense(x))


def test_no_block_of_pre_activations_is_larger_than_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    addmm = torch.addmm

    def spy(*args: Tensor) -> Tensor:
        product = addmm(*args)
        sizes.append(product.numel())
        return product

    monkeypatch.setattr(torch, "addmm", spy)
    replace(coder_of(1000), block_elements=128 * 100).encode(tokens_of(300))
    # Blocks of 128 tokens x 100 latents: 3 x 10 of them.
    assert max(sizes) == 128 * 100
    assert len(sizes) == 30


def test_bfloat16_input_is_encoded_in_float32() -> None:
    coder, x = coder_of(), tokens_of(10).to(torch.bfloat16)
    assert torch.equal(coder.encode(x).values, coder.encode(x.float()).values)


def test_no_tokens_give_no_activations() -> None:
    assert coder_of().encode(tokens_of(0)).values.shape == (0, 5)


def test_decoder_rows_come_in_the_order_asked_for_and_latent_0_is_one() -> None:
    coder = replace(coder_of(), decoder=coder_of().decoder.to(torch.bfloat16))
    rows = coder.decoder_rows([7, 0])
    assert rows.dtype == torch.float32
    assert torch.equal(rows, coder.decoder[[7, 0]].float())


def test_width_and_number_of_latents_are_read_from_the_encoder() -> None:
    coder = coder_of(num_latents=50, d_in=6)
    assert (coder.num_latents, coder.d_in) == (50, 6)
