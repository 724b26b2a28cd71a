import random
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autointerp_dagster.adapters.llm.flow import AdaptiveLimit, Backoff, EndpointHealth

TIMES = st.floats(0.001, 100.0)


def busy_at(limit: AdaptiveLimit, n: int, sent: float, now: float) -> None:
    """``n`` answers while the limit is used to the full."""
    for _ in range(n):
        limit.answered(sent, now, limit.calls)


def test_the_limit_starts_at_32_and_reaches_64_after_one_round_trip():
    limit = AdaptiveLimit(64)
    assert limit.calls == 32
    busy_at(limit, 32, sent=0.0, now=0.05)
    assert limit.calls == 64
    busy_at(limit, 100, sent=0.05, now=0.1)
    assert limit.calls == 64


def test_a_backend_that_takes_one_call_at_a_time_is_left_alone():
    limit = AdaptiveLimit(1)
    busy_at(limit, 10, sent=0.0, now=1.0)
    limit.overloaded(sent=0.0, now=2.0)
    assert limit.calls == 1


def test_an_unused_limit_does_not_grow():
    limit = AdaptiveLimit(64, first=4)
    for _ in range(10):
        limit.answered(0.0, 0.05, n_under_way=2)
    assert limit.calls == 5  # of which 2 is less than half


def test_the_first_refusal_of_all_halves_and_its_burst_counts_once():
    limit = AdaptiveLimit(64)
    for i in range(32):  # all sent at 0, refused one after the other
        limit.overloaded(sent=0.0, now=0.01 + 0.001 * i)
    assert limit.calls == 16
    limit.overloaded(sent=0.1, now=0.11)  # the next round trip
    assert limit.calls == 8
    for i in range(1, 10):
        limit.overloaded(sent=i, now=i + 0.5)
    assert limit.calls == 1


def test_a_refusal_among_many_answers_shrinks_little():
    limit = AdaptiveLimit(64)
    busy_at(limit, 200, sent=0.0, now=0.05)
    # The share of overload fell from 1 to (15 / 16) ** 200 = 2.5e-6, and the refusal makes it
    # 1 / 16 and a little more: 64 * (1 - 1 / 32) = 62 and a little less.
    limit.overloaded(sent=0.05, now=0.1)
    assert limit.calls == 61


def test_after_the_first_refusal_the_limit_grows_by_one_per_round_trip():
    limit = AdaptiveLimit(64)
    limit.overloaded(sent=0.0, now=0.1)  # 32 becomes 16
    busy_at(limit, 16, sent=0.1, now=0.2)
    # 16 answers add 1/16, 1/16.06, ...: nearly one.
    assert limit.calls == 16
    busy_at(limit, 1, sent=0.1, now=0.2)
    assert limit.calls == 17


def test_growth_pauses_while_answers_take_more_than_twice_as_long():
    limit = AdaptiveLimit(64, first=4)
    busy_at(limit, 2, sent=0.0, now=1.0)
    assert limit.calls == 6
    # The mean of 1 s and answers after 20 s is 3.4 s with the first of them.
    busy_at(limit, 20, sent=0.0, now=20.0)
    assert limit.calls == 6
    # Once it is back below 2 s, growth goes on.
    busy_at(limit, 40, sent=20.0, now=21.0)
    assert limit.calls > 6


def test_prompts_that_take_longer_for_good_become_the_new_measure():
    limit = AdaptiveLimit(1000, first=4)
    busy_at(limit, 2, sent=0.0, now=1.0)
    busy_at(limit, 1200, sent=0.0, now=5.0)
    assert limit.calls > 6


@given(
    st.integers(1, 200),
    st.lists(st.tuples(st.sampled_from(["answered", "overloaded"]), TIMES, TIMES), max_size=100),
)
def test_the_limit_stays_between_one_and_the_maximum_and_moves_the_right_way(most, events):
    limit, now = AdaptiveLimit(most), 0.0
    for kind, age, pause in events:
        now += pause
        before = limit.calls
        if kind == "answered":
            limit.answered(now - age, now, before)
            assert limit.calls >= before
        else:
            limit.overloaded(now - age, now)
            assert limit.calls <= before
            assert limit.calls >= before // 2
        assert 1 <= limit.calls <= most


@given(st.integers(1, 200), st.lists(TIMES, min_size=1, max_size=50))
def test_failures_of_one_burst_shrink_once(most, ages):
    one, many = AdaptiveLimit(most), AdaptiveLimit(most)
    one.overloaded(0.0, 100.0)
    for age in ages:
        many.overloaded(100.0 - age, 100.0)
    assert one.calls == many.calls


BACKOFF = Backoff(first_s=1.0, longest_s=8.0)


def test_waits_double_up_to_the_longest_and_come_after_what_the_server_asked_for():
    assert [BACKOFF.wait_s(n, None, 1.0) for n in (1, 2, 3, 4, 5)] == [1.0, 2.0, 4.0, 8.0, 8.0]
    assert BACKOFF.wait_s(1, 7.0, 0.0) == 7.0
    assert BACKOFF.wait_s(10_000, None, 0.5) == 4.0


def test_a_retry_after_holds_up_every_call():
    health = EndpointHealth(BACKOFF)
    assert health.closed_until == -inf
    health.failed("busy", sent=0.0, now=1.0, retry_after_s=5.0, lot=0.0)
    health.failed("busy", sent=0.0, now=2.0, retry_after_s=1.0, lot=0.0)
    assert health.closed_until == 6.0
    health.answered()
    assert health.closed_until == 6.0


def test_an_endpoint_that_never_answered_is_given_up_after_three_tries_or_five_denials():
    for failure, n in (("unreachable", 3), ("denied", 5)):
        health = EndpointHealth(BACKOFF)
        for i in range(n):
            assert not health.is_hopeless
            health.failed(failure, 10.0 * i, 10.0 * i + 1, retry_after_s=None, lot=0.5)
        assert health.is_hopeless


def test_calls_that_find_nobody_together_are_one_try_and_hold_up_every_call():
    health = EndpointHealth(BACKOFF)
    health.answered()
    for i in range(64):
        health.failed("unreachable", 0.0, 1.0 + i / 100, retry_after_s=None, lot=0.5)
    # Half of the first wait of 1 s; the other 63 were sent before it.
    assert health.closed_until == 1.5
    assert not health.is_hopeless


@pytest.mark.parametrize("seed", range(20))
def test_a_server_that_did_answer_may_be_away_for_ten_minutes_whatever_the_lots(seed):
    lots = random.Random(seed)
    health = EndpointHealth(Backoff())
    health.answered()
    now = first = 0.5
    for _ in range(100_000):
        now = max(now + 0.01, health.closed_until)
        health.failed("unreachable", now - 0.005, now, retry_after_s=None, lot=lots.random())
        if health.is_hopeless:
            break
        assert now - first < 600.0
    assert health.is_hopeless == (now - first >= 600.0)


def test_fifty_denials_in_a_row_end_it_but_not_fifty_among_answers():
    health = EndpointHealth(BACKOFF)
    health.answered()
    for i in range(100):
        health.failed("denied", i, i + 0.5, retry_after_s=None, lot=0.5)
        health.answered()
    for i in range(49):
        health.failed("denied", i, i + 0.5, retry_after_s=None, lot=0.5)
    assert not health.is_hopeless
    health.failed("denied", 5.0, 5.5, retry_after_s=None, lot=0.5)
    assert health.is_hopeless


@pytest.mark.parametrize("failure", ["busy", "late", "other"])
def test_ten_minutes_without_any_answer_end_it_however_calls_fail(failure):
    health = EndpointHealth(BACKOFF)
    health.answered()
    for second in range(599):
        health.failed(failure, second, second + 1.0, retry_after_s=None, lot=0.5)
    assert not health.is_hopeless  # 598 s since the first failure
    health.failed(failure, 600.0, 601.0, retry_after_s=None, lot=0.5)
    assert health.is_hopeless


def test_waits_that_the_server_asked_for_are_no_silence():
    health = EndpointHealth(BACKOFF)
    health.answered()
    now = 0.0
    for _ in range(10):  # of five minutes each, after which a burst is refused at once
        for i in range(32):
            health.failed("busy", now, now + 0.1 + i / 100, retry_after_s=300.0, lot=0.5)
        assert not health.is_hopeless
        now = health.closed_until
    assert now > 3000
    for second in range(1, 700):
        health.failed("busy", now + second - 1, now + second, retry_after_s=None, lot=0.5)
    assert health.is_hopeless


def test_a_few_calls_that_fail_for_long_do_not_end_it():
    health = EndpointHealth(BACKOFF)
    health.answered()
    for hour in range(19):
        health.failed("late", 3600.0 * hour, 3600.0 * hour + 120, retry_after_s=None, lot=0.5)
    assert not health.is_hopeless
