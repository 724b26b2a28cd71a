from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autointerp_dagster.core.grouping import number_in_group


def counted(groups):
    seen = Counter()
    numbers = []
    for group in groups:
        numbers.append(seen[group])
        seen[group] += 1
    return numbers


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
@given(groups=st.lists(st.integers(0, 6) | st.just(2**62)))
def test_each_row_is_numbered_after_those_of_its_group_before_it(dtype, groups):
    numbers = number_in_group(np.array(groups, dtype=dtype))
    assert numbers.dtype == np.int64
    assert numbers.tolist() == counted(groups)


@given(st.lists(st.integers(-3, 3)).map(sorted))
def test_sorted_groups_are_numbered_alike(groups):
    assert number_in_group(np.array(groups, dtype=np.int64)).tolist() == counted(groups)
