"""A token bucket per client: so many images a second, and so many at once after a pause."""

from __future__ import annotations

from collections import OrderedDict

from weakseg.errors import RateLimitedError

MOST_CLIENTS = 10_000  # whoever called longest ago is forgotten first, and then starts with a full bucket


class RateLimit:
    """rate: images a second; 0 = no limit. burst: size of the bucket. Belongs to one event loop."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> tokens, when that was true

    def take(self, client: str, now: float) -> None:
        """One image of `client`; `now` on any clock that does not go back.

        Raises:
            RateLimitedError: the bucket is empty; `retry_s` says when it is not any more.
        """
        if not self._rate:
            return
        tokens, at = self._buckets.pop(client, (self._burst, now))
        tokens = min(self._burst, tokens + (now - at) * self._rate)
        enough = tokens >= 1
        self._buckets[client] = (tokens - enough, now)
        if len(self._buckets) > MOST_CLIENTS:
            self._buckets.popitem(last=False)
        if not enough:
            raise RateLimitedError(
                f"expected at most {self._rate:g} images a second from one client, got more: wait, then go on",
                retry_s=(1 - tokens) / self._rate,
            )
