"""What waits for the batcher: images by key and priority, and whose turn it is. No threads, no event loop."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Literal

from weakseg.errors import DeadlineTooShortError

Key = tuple[Any, ...]
Priority = Literal["interactive", "bulk"]
Lane = tuple[Key, Priority]


@dataclass(eq=False)
class Item:
    """One image that was submitted; its fields are the arguments of `Batcher.submit`."""

    image: Any
    run: Callable[[list[Any]], list[Any]]
    beside: Callable[[list[Any]], list[Any]] | None
    most: int
    deadline: float | None
    answer: asyncio.Future[Any]
    member: Any
    began: Callable[[], float | None] | None
    arrived: float = field(default_factory=monotonic)

    @property
    def on_one_core(self) -> bool:
        return self.beside is self.run


class Lanes:
    """Images that share a batch are in one lane, in order of arrival.

    Args:
        max_delay_s: that the first of a lane waits for others. bulk_wait_s: a bulk image counts as if it had come so
            much later than it did.
    """

    def __init__(self, max_delay_s: float, bulk_wait_s: float) -> None:
        self.depth = 0
        self._max_delay_s, self._bulk_wait_s = max_delay_s, bulk_wait_s
        self._lanes: dict[Lane, deque[Item]] = {}

    def __iter__(self) -> Iterator[Item]:
        return itertools.chain.from_iterable(self._lanes.values())

    def clear(self) -> None:
        self._lanes.clear()
        self.depth = 0

    def add(self, lane: Lane, item: Item) -> None:
        self._lanes.setdefault(lane, deque()).append(item)
        self.depth += 1

    def remove(self, lane: Lane, item: Item) -> None:
        """Take an image out if it is still there: its place is free at once."""
        waiting = self._lanes.get(lane)
        if waiting is None or item not in waiting:
            return
        waiting.remove(item)
        self._left(lane, 1)

    def first(self, lane: Lane) -> Item:
        return self._lanes[lane][0]

    def take(self, lane: Lane) -> list[Item]:
        """The next batch of a lane."""
        waiting = self._lanes[lane]
        items = [waiting.popleft() for _ in range(min(waiting[0].most, len(waiting)))]
        self._left(lane, len(items))
        return items

    def drop_dead(self, now: float) -> None:
        """Forget images whose caller is gone; answer and forget those whose time is up."""
        for lane, item in [(lane, item) for lane, items in self._lanes.items() for item in items]:
            expired = item.deadline is not None and item.deadline <= now
            if item.answer.done():  # cancelled a moment ago: `submit` has not had its turn to remove it
                self.remove(lane, item)
            elif expired:
                self.remove(lane, item)
                waited_ms = (now - item.arrived) * 1000
                item.answer.set_exception(
                    DeadlineTooShortError(f"too little time is left after {waited_ms:.0f} ms in the queue: allow more")
                )

    def earliest(self, lanes: Iterable[Lane] | None = None) -> Lane:
        """Whose first image came first; of all lanes, unless some are named."""
        return min(self._lanes if lanes is None else lanes, key=self._turn_of)

    def next(self, now: float) -> Lane | float:
        """The lane whose turn it is, or the seconds until one may start. There is one."""
        starts = {lane: self._starts_at(items) for lane, items in self._lanes.items()}
        ready = [lane for lane, at in starts.items() if at <= now]
        if not ready:
            return min(starts.values()) - now
        turn, first = self.earliest(ready), self.earliest()
        # An interactive image that waits for others to fill its batch must not end up waiting for a bulk batch.
        return first if turn[1] == "bulk" and first[1] == "interactive" else turn

    def _left(self, lane: Lane, n: int) -> None:
        if not self._lanes[lane]:
            del self._lanes[lane]
        self.depth -= n

    def _starts_at(self, items: deque[Item]) -> float:
        return 0.0 if len(items) >= items[0].most else items[0].arrived + self._max_delay_s

    def _turn_of(self, lane: Lane) -> float:
        return self.first(lane).arrived + (self._bulk_wait_s if lane[1] == "bulk" else 0.0)
