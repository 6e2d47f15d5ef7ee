"""The breaker on a clock of the test's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.breaker import FAILURES, FIRST_PAUSE_S, LONGEST_PAUSE_S, Breaker
from weakseg.errors import ModelUnhealthyError


def opened(now=0.0):
    breaker = Breaker()
    assert [breaker.failed(now) for _ in range(FAILURES)] == [0.0] * (FAILURES - 1) + [FIRST_PAUSE_S]
    return breaker


def refused_for(breaker, now):
    """The seconds that a request is told to wait; None = it goes through."""
    try:
        with breaker.request(now):
            return None
    except ModelUnhealthyError as error:
        return error.retry_s


def test_it_opens_after_failures_in_a_row():
    breaker = Breaker()
    for _ in range(3):
        for _ in range(FAILURES - 1):
            breaker.failed(0.0)
        breaker.succeeded()
    assert refused_for(breaker, 0.0) is None
    assert refused_for(opened(), 0.0) == FIRST_PAUSE_S


def test_it_opens_at_once_when_it_is_told_to():
    breaker = Breaker()
    assert breaker.failed(0.0, at_once=True) == FIRST_PAUSE_S
    assert not breaker.answers(0.5 * FIRST_PAUSE_S) and breaker.answers(FIRST_PAUSE_S)


def test_after_the_pause_one_request_goes_through_and_a_success_closes_it():
    breaker = opened()
    with breaker.request(FIRST_PAUSE_S):
        assert refused_for(breaker, FIRST_PAUSE_S) == FIRST_PAUSE_S
        assert breaker.succeeded()
    assert not breaker.succeeded()
    with breaker.request(FIRST_PAUSE_S), breaker.request(FIRST_PAUSE_S):
        assert breaker.failed(FIRST_PAUSE_S) == 0.0


def test_a_request_that_comes_to_no_execution_leaves_the_next_to_try():
    breaker = opened()
    with pytest.raises(ValueError, match="no image"), breaker.request(FIRST_PAUSE_S):
        raise ValueError("no image")
    assert refused_for(breaker, FIRST_PAUSE_S) is None


def test_the_pause_doubles_up_to_its_longest():
    breaker, now, pauses = opened(), 0.0, [FIRST_PAUSE_S]
    for _ in range(7):
        now += pauses[-1]
        with breaker.request(now):
            pauses.append(breaker.failed(now))
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30] and pauses[-1] == LONGEST_PAUSE_S


def test_failures_of_those_that_were_inside_do_not_make_the_pause_longer():
    breaker = opened()
    assert [breaker.failed(0.1) for _ in range(20)] == [0.0] * 20
    assert refused_for(breaker, FIRST_PAUSE_S) is None


@given(st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=60))
def test_nobody_is_told_to_wait_longer_than_the_longest_pause_and_a_success_always_helps(steps):
    breaker, now = Breaker(), 0.0
    for wait_s, fails in steps:
        now += wait_s
        told = refused_for(breaker, now)
        assert (told is None) == breaker.answers(now)
        assert told is None or 0 < told <= LONGEST_PAUSE_S
        if fails:
            breaker.failed(now)
        else:
            breaker.succeeded()
            assert breaker.answers(now)
