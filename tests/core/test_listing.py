"""Long lists in a few words."""

import pytest

from autointerp_dagster.core.listing import first_few


@pytest.mark.parametrize(
    ("n_items", "between", "wanted"),
    [
        (0, ", ", ""),
        (2, ", ", "a0, a1"),
        (3, ", ", "a0, a1 and 1 more"),
        (3, "\n", "a0\na1\nand 1 more"),
        (3, "\n- ", "a0\n- a1\n- and 1 more"),
        (1_202, ", ", "a0, a1 and 1,200 more"),
    ],
)
def test_the_first_two_and_how_many_more(n_items: int, between: str, wanted: str):
    assert first_few([f"a{i}" for i in range(n_items)], 2, between) == wanted
