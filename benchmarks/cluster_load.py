"""Callers of a cluster, through our own client: some that stay, and jobs that come, send some images and go."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weakseg.client import AsyncClient
from weakseg.errors import WeaksegError

STAYING = 3
JOBS_EVERY_S, IMAGES_OF_A_JOB = 0.25, 3
TIMEOUT_S = 30.0
IMAGE = np.full((40, 56, 3), 128, np.uint8)


@dataclass(frozen=True)
class Call:
    """version: of the model that answered, empty where none did. error: what the caller was told."""

    began: float
    ended: float
    version: str
    error: str
    of_a_job: bool


class Load:
    """`rate` calls a second from the clients that stay, and jobs beside, until the block is left."""

    def __init__(self, target: str, ca: Path, rate: float) -> None:
        self.calls: list[Call] = []
        self._target, self._ca, self._rate = target, ca, rate
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    async def _main(self) -> None:
        staying = [AsyncClient(self._target, ca=self._ca) for _ in range(STAYING)]
        tasks: set[asyncio.Task[Any]] = set()
        began, n = time.monotonic(), 0
        while not self._stopped.is_set():
            work = [self._call(staying[n % STAYING], of_a_job=False)]
            if n % max(1, round(self._rate * JOBS_EVERY_S)) == 0:
                work.append(self._job())
            for one in work:
                task = asyncio.create_task(one)
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            n += 1
            await asyncio.sleep(max(0.0, began + n / self._rate - time.monotonic()))
        await asyncio.gather(*tasks)
        for client in staying:
            await client.close()

    async def _job(self) -> None:
        async with AsyncClient(self._target, ca=self._ca) as client:
            for _ in range(IMAGES_OF_A_JOB):
                await self._call(client, of_a_job=True)

    async def _call(self, client: AsyncClient, *, of_a_job: bool) -> None:
        began = time.monotonic()
        version = error = ""
        try:
            version = (await client.segment(IMAGE, timeout_s=TIMEOUT_S)).model.partition("/")[2]
        except WeaksegError as raised:
            error = f"{raised.reason}: {raised}"
        self.calls.append(Call(began, time.monotonic(), version, error, of_a_job))
