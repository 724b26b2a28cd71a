from datetime import UTC, datetime

import pytest

from autointerp_dagster.adapters.llm.remote.errors import retry_after_s

NOW = datetime(2025, 11, 2, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "1500", "retry-after": "7"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7.0),
        ({"retry-after": "Sun, 02 Nov 2025 12:00:09 GMT"}, 9.0),
        ({"retry-after": "Sun, 02 Nov 2025 12:00:09 -0000"}, 9.0),
        ({"retry-after": "Sun, 02 Nov 2025 11:00:00 GMT"}, 0.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "86400"}, 300.0),
        ({"retry-after": "inf"}, 300.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "tomorrow"}, None),
        ({}, None),
    ],
)
def test_a_servers_wish_to_wait_is_read_in_all_its_forms(headers, wait_s):
    assert retry_after_s(headers, NOW) == wait_s
