from itertools import pairwise

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autointerp_dagster.core.schemas import Table
from autointerp_dagster.core.types import LayerKey

TABLE = Table(
    "things",
    {"name": pl.String, "is_big": pl.Boolean, "number": pl.UInt64, "value": pl.Float32},
    ("name", "is_big", "number"),
)
KEYS = st.tuples(
    st.none() | st.sampled_from(["a", "ab", "b"]), st.none() | st.booleans(), st.integers(0, 3)
)


def table_of(keys):
    rows = [(*key, float(i)) for i, key in enumerate(keys)]
    return pl.DataFrame(rows, schema=dict(TABLE.columns), orient="row")


def place(key):
    """Nulls come last."""
    return [(part is None, part or 0 if not isinstance(part, str) else part) for part in key]


@given(st.lists(KEYS, max_size=6))
def test_a_table_is_in_order_if_each_key_comes_after_the_one_before_it(keys):
    expected = all(before < after for before, after in pairwise(map(place, keys)))
    assert TABLE.is_in_order(table_of(keys)) == expected


@given(st.lists(KEYS, max_size=6, unique=True))
def test_rows_that_come_in_any_order_are_sorted_by_key_with_nulls_last(keys):
    sorted_keys = sorted(keys, key=place)
    found = TABLE.conform(table_of(keys))
    assert found.select(TABLE.key).rows() == sorted_keys
    assert TABLE.is_in_order(found)
    assert found.sort("value")["value"].to_list() == [float(i) for i in range(len(keys))]


@pytest.mark.parametrize("number", [[1, 1, 2], [2, 1, 1]])
def test_a_key_that_repeats_is_an_error_in_any_order(number):
    table = Table(
        "things",
        {"coder": pl.String, "hookpoint": pl.String, "number": pl.UInt32},
        ("coder", "hookpoint", "number"),
    )
    with pytest.raises(ValueError, match="1 rows repeat a key"):
        table.conform(pl.DataFrame({"number": number}), LayerKey("sae", "layers.0"))
