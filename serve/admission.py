"""Who gets in: so many requests at once, whatever step they are at, so memory is bounded; one more is refused at once.

Of bulk requests at most `bulk_limit` are inside: they are refused while there are places for others. Nobody gets in
during a drain, beyond the rate of one client, for a model that only fails, or who does not read his answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from serve.access import CLIENT
from serve.adaptive_limit import AdaptiveLimit
from serve.breaker import Breakers
from serve.lanes import Priority
from serve.metrics import Metrics
from serve.rate_limit import RateLimit
from serve.unread import Unread
from weakseg.errors import DrainingError, OutOfMemoryError, QueueFullError
from weakseg.memory import lacks_memory
from weakseg.model import Model


class Admission:
    """Belongs to one event loop; `worked` may be called in any thread.

    Args:
        queue_limit: requests beyond one batch. adaptive: admit fewer, see serve/adaptive_limit.py.
        bulk_share: of these, that bulk requests may take.
        unread_bytes: of answers that are not read, see serve/unread.py.
    """

    def __init__(
        self,
        metrics: Metrics,
        rate_limit: RateLimit,
        *,
        queue_limit: int,
        max_batch: int,
        adaptive: bool,
        bulk_share: float,
        unread_bytes: int,
    ) -> None:
        self.unread = Unread(unread_bytes, metrics.unread_bytes.set)
        self.most = queue_limit + max_batch
        self.inflight = 0
        self.inflight_bulk = 0
        self.draining = False
        self.breakers = Breakers()
        self._metrics = metrics
        self._rate_limit = rate_limit
        self._bulk_share, self._max_batch = bulk_share, max_batch
        # Two batches: bulk requests may take one, and must not take all.
        self._adaptive = AdaptiveLimit(min(2 * max_batch, self.most), self.most) if adaptive else None
        self._set_limit(self.most)

    @contextmanager
    def request(self, n: int, model: Model, priority: Priority) -> Iterator[None]:
        """Around `n` requests, which get in together or not at all.

        Raises:
            DrainingError, QueueFullError, RateLimitedError, ModelUnhealthyError: before anything was done.
            OutOfMemoryError: instead of whatever said so on the way.
        """
        self._check_open()
        self.unread.check()
        more = "one" if n == 1 else str(n)
        if self.inflight + n > self.limit:
            raise QueueFullError(f"expected at most {self.limit} requests at once, got {more} more: try again later")
        n_bulk = n if priority == "bulk" else 0
        if n_bulk and self.inflight_bulk + n > self.bulk_limit:
            raise QueueFullError(
                f"expected at most {self.bulk_limit} bulk requests at once, got {more} more: try again later"
            )
        self._rate_limit.take(CLIENT.get(), monotonic(), n)
        self._set_inflight(self.inflight + n, self.inflight_bulk + n_bulk)
        entered = monotonic()
        try:
            with self.breakers.of(model).request(monotonic()):
                yield
            self._adapt(monotonic() - entered, n)
        except asyncio.CancelledError:  # who gives up has waited, too
            self._adapt(monotonic() - entered, n)
            raise
        except Exception as error:
            if lacks_memory(error):
                raise OutOfMemoryError(
                    "the server has no memory for this request: send smaller images, or try again in a moment"
                ) from error
            raise
        finally:
            self._set_inflight(self.inflight - n, self.inflight_bulk - n_bulk)

    def known(self) -> None:
        """A request whose answer is known: it takes no place, but counts for the rate limit.

        Raises:
            DrainingError, QueueFullError, RateLimitedError
        """
        self._check_open()
        self.unread.check()
        self._rate_limit.take(CLIENT.get(), monotonic())

    def worked(self, seconds: float) -> None:
        """A step of a request took so long; waiting is none."""
        if self._adaptive is not None:
            self._adaptive.worked(seconds)

    def _check_open(self) -> None:
        if self.draining:
            raise DrainingError("this server is shutting down: send the request to another, or again in a moment")

    def _adapt(self, seconds: float, n: int) -> None:
        if self._adaptive is not None and self._adaptive.left(seconds, self.inflight, n):
            self._set_limit(self._adaptive.limit)

    def _set_limit(self, limit: int) -> None:
        self.limit = limit
        self.bulk_limit = max(self._max_batch, int(self._bulk_share * limit))  # a request of a whole batch must get in
        self._metrics.queue_limit.set(limit)

    def _set_inflight(self, n: int, n_bulk: int) -> None:
        self.inflight, self.inflight_bulk = n, n_bulk
        self._metrics.inflight.set(n)
