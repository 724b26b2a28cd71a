"""What is said of an error that somebody else raised."""

import pytest

from autointerp_dagster.core.errors import told


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("no such file\nand more"), "OSError: no such file"),
        (TimeoutError(), "TimeoutError"),
        (ValueError("\n  \n"), "ValueError"),
    ],
)
def test_an_error_is_told_in_one_line_even_if_it_says_nothing(error: Exception, said: str) -> None:
    assert told(error) == said
