import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from autointerp_dagster.adapters.storage import Store
from autointerp_dagster.adapters.tensor_files import tensor_places
from autointerp_dagster.core.errors import StoreError

kinds = st.sampled_from(["|b1", "|i1", "|u1", "<i2", "<i4", "<i8", "<u8", "<f2", "<f4", "<f8"])
shapes = npst.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)


@given(st.dictionaries(st.text(max_size=3), npst.arrays(kinds, shapes), min_size=1, max_size=4))
@settings(deadline=None)
def test_mapped_arrays_are_those_that_were_stored(arrays):
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        mapped = store.mapped_tensors(store.put_tensors("some", arrays))
        assert mapped.keys() == arrays.keys()
        for name, wanted in arrays.items():
            assert (mapped[name].dtype, mapped[name].shape) == (wanted.dtype, wanted.shape)
            assert mapped[name].tobytes() == wanted.tobytes()


def test_a_store_that_is_not_local_gives_the_same_arrays(tmp_path):
    store = Store(f"memory://{tmp_path.name}")
    wanted = np.arange(5, dtype=np.int32)
    found = store.mapped_tensors(store.put_tensors("tokens", {"tokens": wanted}))
    assert np.array_equal(found["tokens"], wanted)
    assert not found["tokens"].flags.writeable  # a file's, as on a local disk


def test_a_damaged_file_is_refused_before_it_is_mapped(tmp_path):
    store = Store(tmp_path)
    blob = store.put_tensors("tokens", {"tokens": np.arange(5, dtype=np.int32)})
    path = tmp_path / blob.path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="the checksum is not what its manifest says"):
        store.mapped_tensors(blob)
    path.unlink()
    with pytest.raises(StoreError, match="missing"):
        store.mapped_tensors(blob)


def test_mapped_arrays_cannot_be_written_to_and_outlive_their_file(tmp_path):
    store = Store(tmp_path)
    blob = store.put_tensors("tokens", {"tokens": np.arange(5, dtype=np.int32)})
    tokens = store.mapped_tensors(blob)["tokens"]
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1
    Path(tmp_path / blob.path).unlink()
    assert tokens.tolist() == [0, 1, 2, 3, 4]


def test_mapping_needs_no_memory_for_the_arrays(tmp_path):
    store = Store(tmp_path)
    blob = store.put_tensors("tokens", {"tokens": np.zeros(4_000_000, dtype=np.int32)})
    tracemalloc.start()
    try:
        tokens = store.mapped_tensors(blob)["tokens"]
        assert int(tokens.max()) == 0
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < tokens.nbytes / 8


def test_a_type_that_numpy_lacks_is_refused_by_name(tmp_path):
    header = b'{"weights":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with path.open("rb") as file, pytest.raises(ValueError, match="weights: type BF16"):
        tensor_places(file)
