"""Memory for the pixels of images: what requests may take of it at once, and in which order they wait for it.

A file of 10 KB may be 80 megapixels, and as many requests as the queue takes may bring one each.
"""

from __future__ import annotations

import asyncio
from bisect import insort
from collections.abc import Callable
from concurrent.futures import Future
from time import monotonic
from types import TracebackType
from typing import Any, Self

from serve.lanes import Priority


class ImageMemory:
    """Requests wait in order of arrival, a bulk one as if it had come `bulk_wait_s` later, until the first has room.

    None passes it, though a smaller one may have room: large ones would never have their turn. Who needs more than
    there is at all goes alone. A request takes everything at once, so that none waits while it holds what another waits
    for.

    Belongs to one event loop.

    Args:
        on_change: is told how many bytes are taken, and how many wait.
    """

    def __init__(self, limit_bytes: int, bulk_wait_s: float, on_change: Callable[[int, int], None]) -> None:
        self.limit_bytes = limit_bytes
        self.taken_bytes = 0
        self._bulk_wait_s = bulk_wait_s
        self._on_change = on_change
        self._line: list[Lease] = []  # the first goes next

    def lease(self, priority: Priority) -> Lease:
        return Lease(self, priority)

    def _join(self, lease: Lease) -> None:
        lease.turn = monotonic() + (self._bulk_wait_s if lease.priority == "bulk" else 0.0)
        insort(self._line, lease, key=lambda one: one.turn)
        self._admit()

    def _leave(self, lease: Lease) -> None:
        if lease in self._line:
            self._line.remove(lease)
        else:
            self.taken_bytes -= lease.n_bytes
        self._admit()

    def _admit(self) -> None:
        while self._line and (not self.taken_bytes or self.taken_bytes + self._line[0].n_bytes <= self.limit_bytes):
            lease = self._line.pop(0)
            self.taken_bytes += lease.n_bytes
            if not lease.admitted.done():  # else it was cancelled just now, and is about to leave
                lease.admitted.set_result(None)
        self._on_change(self.taken_bytes, len(self._line))


class Lease:
    """What one request takes. Given back when its `with` block has ended, and every thread that works for it."""

    def __init__(self, memory: ImageMemory, priority: Priority) -> None:
        self.priority: Priority = priority
        self.n_bytes = 0
        self.turn = 0.0
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._memory = memory
        self._n_users = 1

    async def take(self, n_bytes: int) -> None:
        """Wait until these bytes are there; once a lease. Who has waited too long is to be cancelled, as gRPC does."""
        self.n_bytes = n_bytes
        self._memory._join(self)
        await self.admitted

    def keep_until(self, work: Future[Any]) -> None:
        """A thread goes on, whose caller is about to leave."""
        loop = asyncio.get_running_loop()
        self._n_users += 1
        work.add_done_callback(lambda _: loop.call_soon_threadsafe(self._end))

    def _end(self) -> None:
        self._n_users -= 1
        if not self._n_users and self.n_bytes:
            self._memory._leave(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
