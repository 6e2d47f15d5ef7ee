"""Calls that wait for their client: how many one server holds, and which of them goes when there is one more.

gRPC calls a handler of one request only when that request is there, has no limit of time for it, and counts the call
from its beginning: some hundred calls that never send anything would keep everybody else out.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable
from typing import TypeVar

from weakseg.errors import QueueFullError

T = TypeVar("T")

MOST_IDLE = 256


class Idle:
    """The waits of one event loop, `most` at once.

    One more ends the oldest of the client that has the most, whose own calls crowd others out. No wait has a limit of
    time: a large image over a slow line, or a stream between two images, may take as long as nobody needs its place.
    """

    def __init__(self, most: int = MOST_IDLE) -> None:
        self._most = most
        self._waiting: dict[asyncio.Timeout, str] = {}  # client by wait, oldest first

    def __len__(self) -> int:
        return len(self._waiting)

    async def wait(self, awaited: Awaitable[T], client: str) -> T:
        """What comes of `awaited`, which is cancelled when this wait is the one that goes.

        Raises:
            QueueFullError: it went.
        """
        place = asyncio.timeout(None)
        try:
            async with place:
                self._waiting[place] = client
                if len(self._waiting) > self._most:
                    self._end_one()
                return await awaited
        except TimeoutError:
            if not place.expired():
                raise
            raise QueueFullError("others need the place of this call, which sent nothing: try again later") from None
        finally:
            self._waiting.pop(place, None)

    def _end_one(self) -> None:
        crowd = Counter(self._waiting.values()).most_common(1)[0][0]
        place = next(place for place, client in self._waiting.items() if client == crowd)
        del self._waiting[place]  # at once: it ends when the loop comes to it
        place.reschedule(0.0)
