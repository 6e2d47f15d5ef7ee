"""Answers that their clients have not read yet: what they take at the most, together and of one client.

gRPC keeps an answer until its client takes it, however long that is, and cannot be told to drop it: a request of 2 KB
may leave 16 MB behind. So whoever does not read is refused, long before others would have to be.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from serve.access import CLIENT
from weakseg.errors import QueueFullError

COPIES = 3  # of an answer, measured: the message, its bytes, gRPC's own
SHARE = 0.25  # of the limit, that one client may take
SENT_S = 0.1  # in which gRPC says that an answer is sent that its client has by now
SHARE_INSIDE = 0.5  # for requests that were let in before: answers that are on their way should not refuse them


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
        self._by_client: dict[str, list[int]] = {}  # bytes of each answer
        self._none = asyncio.Event()
        self._none.set()

    async def wait_sent(self, timeout_s: float) -> bool:
        """Whether every answer was on its way to its client within the time, or SENT_S."""
        try:
            await asyncio.wait_for(self._none.wait(), max(timeout_s, SENT_S))
        except TimeoutError:
            return False
        return True

    def check(self, *, inside: bool = False) -> None:
        """Before anything is done for the client of the call that runs, and before it is decoded.

        Raises:
            QueueFullError
        """
        left = self._by_client.get(CLIENT.get(), [])
        # One answer may be as large as it is, like an image.
        if len(left) > 1 and sum(left) > (SHARE_INSIDE if inside else SHARE) * self.limit_bytes:
            raise QueueFullError("earlier answers have not been read: read them, or try again later")
        if self.taken_bytes > self.limit_bytes:
            raise QueueFullError("the answers of others have not been read: try again later")

    @contextmanager
    def holding(self, answer_bytes: int) -> Iterator[None]:
        """While an answer is being sent."""
        client = CLIENT.get()
        self._add(client, answer_bytes)
        try:
            yield
        finally:
            self._remove(client, answer_bytes)

    def until_sent(self, answer_bytes: int, context: Any) -> None:
        """An answer that the handler of a call is about to return."""
        client = CLIENT.get()
        self._add(client, answer_bytes)
        context.add_done_callback(lambda _: self._remove(client, answer_bytes))

    def _add(self, client: str, answer_bytes: int) -> None:
        self._by_client.setdefault(client, []).append(COPIES * answer_bytes)
        self._none.clear()
        self._set_taken(self.taken_bytes + COPIES * answer_bytes)

    def _remove(self, client: str, answer_bytes: int) -> None:
        left = self._by_client[client]
        left.remove(COPIES * answer_bytes)
        if not left:
            del self._by_client[client]
            if not self._by_client:
                self._none.set()
        self._set_taken(self.taken_bytes - COPIES * answer_bytes)

    def _set_taken(self, n_bytes: int) -> None:
        self.taken_bytes = n_bytes
        self._on_change(n_bytes)
