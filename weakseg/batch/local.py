"""The engine of one machine: threads, each taking an image from its bytes to its files.

Images are side by side, and the steps of different images with them: the decoder, the runtime, the CRF, zlib and the
disk all work outside Python's lock. What is under way is bounded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import cv2

from weakseg.batch.inputs import Item
from weakseg.batch.labeller import Labeller, Outcome

AHEAD = 4  # images under way or waiting for each worker


def run_local(
    items: Iterable[Item], labeller: Labeller, workers: int, stopping: Callable[[], bool]
) -> Iterator[Outcome]:
    """Outcomes in the order of the items, as they come. Once `stopping` says so, only what is under way is finished.

    Raises:
        What the labeller raises, after the images before that one.
    """
    cv2.setNumThreads(1)  # of the whole process: a resize on all cores gets in the way of the other images
    with ThreadPoolExecutor(workers, thread_name_prefix="label") as pool:
        under_way: deque[Future[Outcome]] = deque()
        try:
            for item in items:
                if stopping():
                    break
                under_way.append(pool.submit(labeller, item))
                if len(under_way) >= AHEAD * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()
