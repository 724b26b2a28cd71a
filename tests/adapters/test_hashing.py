import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autointerp_dagster.adapters.hashing import combined_hash, json_hash, table_hash, tensors_hash

FLOATS = st.floats(allow_nan=False, width=32).map(lambda x: x + 0.0)
"""Without -0.0, which equals 0.0 but is stored as other bits."""
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "a": st.none() | st.integers(-5, 5),
            "b": st.none() | st.text(max_size=3),
            "c": st.none() | st.lists(st.none() | FLOATS, max_size=3),
            "d": st.none() | st.booleans(),
        }
    ),
    max_size=8,
)
SCHEMA = {"a": pl.Int32, "b": pl.String, "c": pl.List(pl.Float32), "d": pl.Boolean}


def frame(rows):
    return pl.DataFrame(rows, schema=SCHEMA)


@given(ROWS, st.integers(0, 8))
def test_the_hash_of_a_table_does_not_depend_on_its_chunks(rows, cut):
    whole = frame(rows)
    chunked = pl.concat([whole[:cut], whole[cut:]], rechunk=False)
    assert table_hash(chunked) == table_hash(whole)


@given(ROWS, ROWS)
def test_tables_have_equal_hashes_exactly_if_they_are_equal(left, right):
    same = frame(left).equals(frame(right))
    assert (table_hash(frame(left)) == table_hash(frame(right))) == same


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ([None], [0]),  # null is not zero
        ([[]], [None]),  # an empty list is not null
        ([["ab", "c"]], [["a", "bc"]]),  # borders between strings count
        ([[1], [2, 3]], [[1, 2], [3]]),  # borders between lists count
        ([""], [None]),
    ],
)
def test_what_looks_alike_in_bytes_has_different_hashes(left, right):
    assert table_hash(pl.DataFrame({"x": left})) != table_hash(pl.DataFrame({"x": right}))


def test_names_types_and_order_of_columns_count():
    base = pl.DataFrame({"x": [1], "y": [2]})
    assert table_hash(base) != table_hash(base.rename({"x": "z"}))
    assert table_hash(base) != table_hash(base.cast({"x": pl.Int8}))
    assert table_hash(base) != table_hash(base.select("y", "x"))


def test_tensors_differ_by_name_type_shape_and_value():
    import numpy as np

    zeros = np.zeros((2, 3), dtype=np.float32)
    hashes = {
        tensors_hash({"a": zeros}),
        tensors_hash({"b": zeros}),
        tensors_hash({"a": zeros.astype(np.int32)}),
        tensors_hash({"a": zeros.reshape(3, 2)}),
        tensors_hash({"a": zeros + 1}),
    }
    assert len(hashes) == 5
    assert tensors_hash({"a": np.asfortranarray(zeros)}) in hashes


def test_keys_of_json_and_members_of_a_set_may_come_in_any_order():
    assert json_hash({"a": 1, "b": [2]}) == json_hash({"b": [2], "a": 1})
    assert json_hash({"a": 1}) != json_hash({"a": 1.5})
    assert combined_hash([("x", "1"), ("y", "2")]) == combined_hash([("y", "2"), ("x", "1")])


def many(column, kind):
    return pl.DataFrame({"x": pl.Series(column, dtype=kind)})


def test_many_strings_that_repeat_have_the_hash_of_their_values_alone():
    strings = ["ab"] * 40_000 + [None] * 10_000 + ["c"] * 40_000
    whole = many(strings, pl.String)
    assert table_hash(pl.concat([whole[:7], whole[7:]], rechunk=False)) == table_hash(whole)
    longer = ["ab"] * 40_001 + [None] * 10_000 + ["c"] * 39_999
    others = [longer, [*strings[:-1], "d"], ["" if s is None else s for s in strings]]
    hashes = {table_hash(many(column, pl.String)) for column in [strings, *others]}
    assert len(hashes) == 4


def test_many_lists_that_are_mostly_zero_have_the_hash_of_their_values_alone():
    silent, firing = [0.0] * 32, [0.0] * 30 + [1.5, 2.5]
    lists = [silent] * 2000 + [firing, None] + [silent] * 2000
    whole = many(lists, pl.List(pl.Float32))
    assert table_hash(pl.concat([whole[:7], whole[7:]], rechunk=False)) == table_hash(whole)
    later, swapped = [0.0] * 29 + [1.5, 0.0, 2.5], [0.0] * 30 + [2.5, 1.5]
    others = [[*lists[:2000], row, *lists[2001:]] for row in (silent, later, swapped, None)]
    hashes = {table_hash(many(column, pl.List(pl.Float32))) for column in [lists, *others]}
    assert len(hashes) == 5


def test_hashes_of_tables_that_are_stored_stay_as_they_are():
    rows = [{"a": 1, "b": "x", "c": [0.5, None], "d": True}, {"a": None, "b": None, "c": None}]
    assert table_hash(frame(rows)) == "5ce8bbeeed236d4e311fdb16b9f00a0b"
