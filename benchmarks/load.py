"""Callers of a server, in a process of their own: their work must not be counted as the server's, nor wait for it."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import grpc
import numpy as np

from weakseg.v1 import segmentation_service_pb2 as pb

SEGMENT = "/weakseg.v1.SegmentationService/Segment"
WARM_UP_S = 0.5
CHANNELS = 4  # connections that the callers share, as several clients would


@dataclass
class Load:
    """What callers saw in `seconds`: seconds of each answered call, how calls ended, seconds of refused ones."""

    seconds: float = 0.0
    answered_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        """Answered calls a second."""
        return len(self.answered_s) / self.seconds

    def quantile_s(self, q: float) -> float:
        return float(np.quantile(self.answered_s, q))


def closed_loop(target: str, request: bytes, *, callers: int, seconds: float) -> Load:
    """Each caller calls again when it has its answer."""
    return _in_process(_closed, target, request, callers, seconds)


def open_loop(target: str, request: bytes, *, rate: float, seconds: float, timeout_s: float) -> Load:
    """Calls come at random (Poisson), `rate` a second, whatever becomes of those before them."""
    return _in_process(_open, target, request, rate, seconds, timeout_s)


def _in_process(load: Any, *args: Any) -> Load:
    with get_context("spawn").Pool(1) as pool:
        result: Load = pool.apply(_run, (load, *args))
    return result


def _run(load: Any, *args: Any) -> Load:
    result: Load = asyncio.run(load(*args))
    return result


class _Callers:
    """Channels to a server whose messages are bytes, so that callers spend no time on them."""

    def __init__(self, target: str) -> None:
        # Without the option gRPC would join channels to one address into one connection.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        self._channels = [grpc.aio.insecure_channel(target, options) for _ in range(CHANNELS)]
        self._methods = [channel.unary_unary(SEGMENT) for channel in self._channels]
        self._n = 0

    async def call(self, request: bytes, load: Load, timeout_s: float = 60.0) -> None:
        self._n += 1
        began = time.monotonic()
        try:
            await self._methods[self._n % CHANNELS](request, timeout=timeout_s)
            load.answered_s.append(time.monotonic() - began)
            load.codes["OK"] += 1
        except grpc.aio.AioRpcError as error:
            load.codes[error.code().name] += 1
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                load.refused_s.append(time.monotonic() - began)

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


async def _closed(target: str, request: bytes, callers: int, seconds: float) -> Load:
    made = _Callers(target)

    async def call_until(ends: float, load: Load) -> None:
        while time.monotonic() < ends:
            await made.call(request, load)

    async def all_until(ends: float) -> Load:
        load = Load()
        began = time.monotonic()
        await asyncio.gather(*(call_until(ends, load) for _ in range(callers)))
        load.seconds = time.monotonic() - began
        return load

    await all_until(time.monotonic() + WARM_UP_S)
    load = await all_until(time.monotonic() + seconds)
    await made.close()
    return load


async def _open(target: str, request: bytes, rate: float, seconds: float, timeout_s: float) -> Load:
    made, draw, load = _Callers(target), random.Random(0), Load()
    calls = []
    began = at = time.monotonic()
    while at < began + seconds:
        at += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        calls.append(asyncio.ensure_future(made.call(request, load, timeout_s)))
    load.seconds = time.monotonic() - began
    in_time = len(load.answered_s)
    await asyncio.gather(*calls)
    load.answered_s = load.answered_s[:in_time]  # a rate counts what was answered within its seconds
    await made.close()
    return load


def segment_request(image: bytes) -> bytes:
    """A SegmentRequest for the label map of an image file."""
    outputs = [pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION)]
    return pb.SegmentRequest(image=pb.Image(encoded=image), outputs=outputs).SerializeToString()
