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

    def take(self, client: str, now: float, n: int = 1) -> None:
        """n images of `client`; `now` on any clock that does not go back.

        More than a bucket holds take a full one, and leave a debt.

        Raises:
            RateLimitedError: there are too few in the bucket; `retry_s` says when there are enough.
        """
        if not self._rate:
            return
        tokens, at = self._buckets.pop(client, (self._burst, now))
        tokens = min(self._burst, tokens + (now - at) * self._rate)
        needed = min(n, self._burst)
        enough = tokens >= needed
        self._buckets[client] = (tokens - n * enough, now)
        if len(self._buckets) > MOST_CLIENTS:
            self._buckets.popitem(last=False)
        if not enough:
            raise RateLimitedError(
                f"expected at most {self._rate:g} images a second from one client, got more: wait, then go on",
                retry_s=(needed - tokens) / self._rate,
            )
