"""A function over many items in worker processes, results in order, a bounded number under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import TypeVar

Item = TypeVar("Item")
Out = TypeVar("Out")


def map_processes(function: Callable[[Item], Out], items: Iterable[Item], workers: int) -> Iterator[Out]:
    """`function` of each item, in order. workers <= 1 runs here. An error in a worker is raised here.

    `function` is importable (a module-level function or a partial of one). Processes are spawned, not forked: torch and
    gRPC do not survive a fork, and a stage's numerics import neither.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    remaining = iter(items)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        under_way: deque[Future[Out]] = deque(pool.submit(function, item) for item in islice(remaining, 4 * workers))
        try:
            while under_way:
                done = under_way.popleft().result()
                under_way.extend(pool.submit(function, item) for item in islice(remaining, 1))
                yield done
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _one_thread() -> None:
    import cv2

    cv2.setNumThreads(1)
