import pytest

from serve.rate_limit import RateLimit
from weakseg.client import Client
from weakseg.errors import RateLimitedError


def refused(limit, client, at, n=1):
    try:
        limit.take(client, at, n)
    except RateLimitedError as error:
        return error.retry_s
    return None


def test_a_bucket_empties_and_fills_again():
    limit = RateLimit(2.0, burst=3)
    assert [refused(limit, "a", 0.0) for _ in range(5)] == [None, None, None, 0.5, 0.5]
    assert refused(limit, "b", 0.0) is None  # another's bucket
    assert refused(limit, "a", 0.25) == 0.25
    assert [refused(limit, "a", 0.5), refused(limit, "a", 0.5)] == [None, 0.5]
    assert [refused(limit, "a", 1000.0) for _ in range(4)] == [None, None, None, 0.5]  # never more than the burst


def test_a_batch_takes_its_images_at_once():
    limit = RateLimit(2.0, burst=3)
    assert [refused(limit, "a", 0.0, 2), refused(limit, "a", 0.0, 2), refused(limit, "a", 0.0)] == [None, 0.5, None]
    assert refused(limit, "b", 0.0, 7) is None, "more than the bucket holds: a full one does"
    assert refused(limit, "b", 0.0) == 2.5, "and 4 images of debt and one's own take their time"
    assert [refused(limit, "b", 2.0), refused(limit, "b", 2.5)] == [0.5, None]


def test_over_time_no_more_than_the_rate_gets_through():
    limit = RateLimit(10.0, burst=5)
    passed = sum(refused(limit, "a", n / 100) is None for n in range(1000))
    assert passed == pytest.approx(5 + 10 * 9.99, abs=1)


def test_without_a_rate_there_is_no_limit():
    limit = RateLimit(0.0, burst=1)
    assert all(refused(limit, "a", 0.0) is None for _ in range(100))


def test_clients_without_number_take_no_memory_without_bound(monkeypatch):
    monkeypatch.setattr("serve.rate_limit.MOST_CLIENTS", 3)
    limit = RateLimit(1.0, burst=1)
    for client in "abcd":
        assert refused(limit, client, 0.0) is None
    assert refused(limit, "d", 0.0) == 1.0
    assert refused(limit, "a", 0.0) is None  # forgotten


def test_a_served_client_is_told_when_to_come_again(serving, colours):
    running = serving(rate_limit=0.001, rate_burst=2)
    with Client(running.target) as client:
        for _ in range(2):
            client.segment(colours)
        with pytest.raises(RateLimitedError, match=r"at most 0\.001 images a second") as raised:
            client.segment(colours)
        assert 0 < raised.value.retry_s <= 1000
        (error,) = client.segment_many([colours], on_error="return")
    assert isinstance(error, RateLimitedError)
    assert running.sample("weakseg_rejected_total", reason="RATE_LIMITED") == 2
    assert running.sample("weakseg_inflight") == 0
