"""A non-zero survives its key, and keys come sorted whatever the block."""

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autointerp_dagster.adapters.cache.merging import sorted_keys
from autointerp_dagster.adapters.cache.packing import KeyLayout
from autointerp_dagster.core.activations import Nonzeros
from autointerp_dagster.core.errors import StoreError, StudyError
from autointerp_dagster.core.schemas import CONTEXTS, DOCUMENTS
from autointerp_dagster.core.tokens import TokenDataset
from autointerp_dagster.core.types import LatentRange


def dataset(lengths: list[int]) -> TokenDataset:
    contexts = pl.DataFrame(
        {"context": range(len(lengths)), "document": 0, "offset": 0, "n_tokens": lengths}
    )
    return TokenDataset(
        tokens=np.zeros(sum(lengths), dtype=np.int32),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        contexts=CONTEXTS.conform(contexts),
        documents=DOCUMENTS.empty(),
        bos_id=0,
    )


@pytest.mark.parametrize(
    ("lengths", "latents"),
    [
        ([1], LatentRange(0, 1)),  # no bits for any number
        ([3, 16, 2], LatentRange(32, 64)),
        ([17] * 5, LatentRange(7, 8)),
        ([4096, 1], LatentRange(65_536, 131_072)),
    ],
)
def test_a_key_gives_back_the_extremes_of_its_numbers(lengths, latents):
    places = [
        (latent, context, position, value)
        for latent in sorted({latents.start, latents.stop - 1})
        for context in sorted({0, len(lengths) - 1})
        for position in sorted({0, lengths[context] - 1})
        for value in (1e-38, 1.0, 3.3895e38)
    ]
    frame = pl.DataFrame(
        places,
        schema={
            "latent": pl.UInt32,
            "context": pl.UInt32,
            "position": pl.UInt16,
            "value": pl.Float32,
        },
        orient="row",
    )
    values = torch.from_numpy(frame["value"].to_numpy().copy()).to(torch.bfloat16).float().numpy()
    columns = [frame[name].to_numpy() for name in ("latent", "context", "position")]
    layout = KeyLayout.of(dataset(lengths), latents)
    keys = layout.pack(Nonzeros(*columns, values))
    assert (np.diff(keys.astype(object)) > 0).all()  # sorts as the rows do
    found = layout.unpack(keys)
    assert found.drop("activation").equals(frame.drop("value"))
    assert found["activation"].to_numpy().tobytes() == values.tobytes()


def test_too_many_latents_contexts_and_positions_are_refused():
    many = dataset([1 << 16] + [1] * ((1 << 16) - 1))  # 16 bits each
    KeyLayout.of(many, LatentRange(0, 1 << 16))
    with pytest.raises(StudyError, match=r"need 49 bits, wanted at most 48\. Lower grid"):
        KeyLayout.of(many, LatentRange(0, (1 << 16) + 1))


@given(
    keys=st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 3), max_size=200),
    block_keys=st.integers(1, 70),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_all_keys_come_in_order_in_blocks_of_bounded_size(tmp_path, keys, block_keys):
    path = tmp_path / "a.keys"
    np.array(keys, dtype=np.uint64).tofile(path)
    blocks = list(sorted_keys(path, block_keys))
    assert all(0 < block.size <= block_keys for block in blocks)
    assert [int(key) for block in blocks for key in block] == sorted(keys)
    assert [file.name for file in tmp_path.iterdir()] == ["a.keys"]


def test_a_latent_that_fires_on_every_token_is_sorted_in_the_same_memory(tmp_path):
    rng = np.random.default_rng(0)
    keys = rng.permutation(np.arange(50_000, dtype=np.uint64))  # consecutive tokens of one latent
    path = tmp_path / "a.keys"
    keys.tofile(path)
    blocks = list(sorted_keys(path, 1000))
    assert max(block.size for block in blocks) <= 1000
    assert len(blocks) < 150  # and not in crumbs
    assert np.array_equal(np.concatenate(blocks), np.arange(50_000, dtype=np.uint64))


def test_sorting_stopped_in_the_middle_leaves_no_second_file(tmp_path):
    np.arange(100, dtype=np.uint64).tofile(tmp_path / "a.keys")
    blocks = sorted_keys(tmp_path / "a.keys", 10)
    next(blocks)
    blocks.close()
    assert [file.name for file in tmp_path.iterdir()] == ["a.keys"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"gone\.keys: cannot be sorted"):
        list(sorted_keys(tmp_path / "gone.keys"))
