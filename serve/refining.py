"""Threads for CRF and random walk, and how long an image may have them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from threading import Event
from typing import Any, TypeVar

from serve.lanes import Priority
from weakseg import crf
from weakseg.stopping import Check, StoppedError

T = TypeVar("T")


class Refiners:
    """A bounded number of threads; belongs to one event loop.

    budget_s: of an interactive image, for the wait and the work together; None = what it needs. Nobody waits for a bulk
        image, and what comes of it is kept: it has no budget. Of these no more are inside than there are threads.

    Who waits for a thread and is gone, or out of time, leaves nothing behind: an image may have a thread for seconds,
    and a queue of the threads' own would hold all that came in the meantime.
    """

    def __init__(self, n_threads: int, budget_s: float | None = None) -> None:
        self.budget_s = budget_s
        self.warm = asyncio.Event()
        self._threads = ThreadPoolExecutor(n_threads, thread_name_prefix="refine")
        self._free = asyncio.Semaphore(n_threads)
        self._bulk_slots = asyncio.Semaphore(n_threads)

    async def warm_up(self) -> bool:
        """Load or compile the CRF's kernels, at nobody's cost: budgets begin after it. False: there is no CRF."""
        try:
            return await self._in_thread(crf.warm_up)
        finally:
            self.warm.set()

    async def run(
        self, priority: Priority, work: Callable[[Check], T], left: Callable[[Future[Any]], object] = lambda _: None
    ) -> T | None:
        """What the work gives; None when it took too long.

        Then, or when the caller is cancelled, it is not waited for: it is stopped when it next asks the check that it
        gets, and its thread is free from then on. `left` is told of it.
        """
        await self.warm.wait()
        over = Event()

        def check() -> None:
            if over.is_set():
                raise StoppedError

        try:
            async with self._bulk_slots if priority == "bulk" else nullcontext():
                async with asyncio.timeout(self.budget_s if priority == "interactive" else None):
                    return await self._in_thread(work, check, left=left)
        except TimeoutError:
            return None
        finally:
            over.set()

    def close(self) -> None:
        """When no thread works any more."""
        self._threads.shutdown()

    async def _in_thread(
        self, function: Callable[..., T], *args: Any, left: Callable[[Future[Any]], object] = lambda _: None
    ) -> T:
        loop = asyncio.get_running_loop()
        await self._free.acquire()
        try:
            future = self._threads.submit(function, *args)
        except RuntimeError:  # no thread can be started
            self._free.release()
            raise
        # When the thread is free, not when nobody waits for it any more.
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._free.release))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            left(future)
            raise
