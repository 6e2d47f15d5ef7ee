"""Answers that their clients have not read yet: what they take at the most, together and of one client.

gRPC keeps an answer until its client takes it, however long that is, and cannot be told to drop it: a request of 2 KB
may leave 16 MB behind. So whoever does not read is refused, long before others would have to be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from serve.access import CLIENT
from weakseg.errors import QueueFullError

COPIES = 3  # of an answer, measured: the message, its bytes, gRPC's own
SHARE = 0.25  # of the limit, that one client may take


class Unread:
    """Belongs to one event loop.

    An answer takes no more than its image did (serve/image_memory.py), so there may be as much more than the limit as
    images take together: of those that were inside when it was reached.

    Args:
        on_change: is told how many bytes are taken.
    """

    def __init__(self, limit_bytes: int, on_change: Callable[[int], None]) -> None:
        self.limit_bytes = limit_bytes
        self.taken_bytes = 0
        self._on_change = on_change
        self._by_client: Counter[str] = Counter()

    def check(self) -> None:
        """Before anything is done for the client of the call that runs.

        Raises:
            QueueFullError
        """
        if self._by_client[CLIENT.get()] > SHARE * self.limit_bytes:
            raise QueueFullError("earlier answers have not been read: read them, or try again later")
        if self.taken_bytes > self.limit_bytes:
            raise QueueFullError("the answers of others have not been read: try again later")

    @contextmanager
    def holding(self, answer_bytes: int) -> Iterator[None]:
        """While an answer is being sent."""
        client, n_bytes = CLIENT.get(), COPIES * answer_bytes
        self._take(client, n_bytes)
        try:
            yield
        finally:
            self._take(client, -n_bytes)

    def until_sent(self, answer_bytes: int, context: Any) -> None:
        """An answer that the handler of a call is about to return."""
        client, n_bytes = CLIENT.get(), COPIES * answer_bytes
        self._take(client, n_bytes)
        context.add_done_callback(lambda _: self._take(client, -n_bytes))

    def _take(self, client: str, n_bytes: int) -> None:
        self.taken_bytes += n_bytes
        self._by_client[client] += n_bytes
        if not self._by_client[client]:
            del self._by_client[client]
        self._on_change(self.taken_bytes)
