"""Callers of a server, in a process of their own: their work must not be counted as the server's, nor wait for it."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from multiprocessing import get_context
from typing import Any, Protocol

import grpc
import numpy as np

from weakseg.v1 import segmentation_service_pb2 as pb

SEGMENT = "/weakseg.v1.SegmentationService/Segment"
WARM_UP_S = 0.5
CHANNELS = 4  # connections that the callers share, as several clients would


class Connections(Protocol):
    """What the callers of a server share."""

    async def call(self, request: bytes, timeout_s: float) -> tuple[str, bytes]:
        """How the call ended, `OK` or `RESOURCE_EXHAUSTED` where the server is too busy, and what came."""

    async def close(self) -> None: ...


class Service(Protocol):
    def connect(self) -> Connections: ...


@dataclass(frozen=True)
class Grpc:
    """A gRPC method whose messages are bytes, so that callers spend no time on them."""

    target: str
    method: str = SEGMENT
    metadata: tuple[tuple[str, str], ...] = ()

    def connect(self) -> Connections:
        return _Channels(self)


@dataclass
class Load:
    """What callers saw in `seconds`: seconds of each answered call, how calls ended, seconds of refused ones.

    warmed_up: calls that were answered before.
    """

    seconds: float = 0.0
    answered_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    warmed_up: int = 0

    @property
    def rate(self) -> float:
        """Answered calls a second."""
        return len(self.answered_s) / self.seconds

    def quantile_s(self, q: float) -> float:
        return float(np.quantile(self.answered_s, q))


def closed_loop(service: str | Service, *requests: bytes, callers: int, seconds: float) -> Load:
    """Each caller calls again when it has its answer.

    Args:
        service: a target (host:port) is that of our `Segment`.
        requests: sent in turns.
    """
    return _in_process(_closed, service, requests, callers, seconds)


def open_loop(service: str | Service, *requests: bytes, rate: float, seconds: float, timeout_s: float) -> Load:
    """Calls come at random (Poisson), `rate` a second, whatever becomes of those before them."""
    return _in_process(_open, service, requests, rate, seconds, timeout_s)


def ask(service: str | Service, request: bytes, timeout_s: float) -> tuple[str, bytes]:
    """One call: how it ended and what came."""
    return asyncio.run(_ask(_service(service), request, timeout_s))


def _in_process(load: Any, service: str | Service, *args: Any) -> Load:
    with get_context("spawn").Pool(1) as pool:
        result: Load = pool.apply(_run, (load, _service(service), *args))
    return result


def _service(service: str | Service) -> Service:
    return Grpc(service) if isinstance(service, str) else service


def _run(load: Any, *args: Any) -> Load:
    result: Load = asyncio.run(load(*args))
    return result


class _Channels:
    def __init__(self, grpc_method: Grpc) -> None:
        # Without the option gRPC would join channels to one address into one connection.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        self._channels = [grpc.aio.insecure_channel(grpc_method.target, options) for _ in range(CHANNELS)]
        self._methods = cycle([channel.unary_unary(grpc_method.method) for channel in self._channels])
        self._metadata = grpc_method.metadata

    async def call(self, request: bytes, timeout_s: float) -> tuple[str, bytes]:
        try:
            return "OK", await next(self._methods)(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            return error.code().name, (error.details() or "").encode()

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


async def _ask(service: Service, request: bytes, timeout_s: float) -> tuple[str, bytes]:
    connections = service.connect()
    try:
        return await connections.call(request, timeout_s)
    finally:
        await connections.close()


async def _call(connections: Connections, request: bytes, load: Load, timeout_s: float = 60.0) -> None:
    began = time.monotonic()
    code, _ = await connections.call(request, timeout_s)
    took = time.monotonic() - began
    load.codes[code] += 1
    if code == "OK":
        load.answered_s.append(took)
    elif code == "RESOURCE_EXHAUSTED":
        load.refused_s.append(took)


async def _closed(service: Service, requests: Sequence[bytes], callers: int, seconds: float) -> Load:
    connections, turns = service.connect(), cycle(requests)

    async def call_until(ends: float, load: Load) -> None:
        while time.monotonic() < ends:
            await _call(connections, next(turns), load)

    async def all_until(ends: float) -> Load:
        load = Load()
        began = time.monotonic()
        await asyncio.gather(*(call_until(ends, load) for _ in range(callers)))
        load.seconds = time.monotonic() - began
        return load

    warm_up = await all_until(time.monotonic() + WARM_UP_S)
    load = await all_until(time.monotonic() + seconds)
    load.warmed_up = warm_up.codes["OK"]
    await connections.close()
    return load


async def _open(service: Service, requests: Sequence[bytes], rate: float, seconds: float, timeout_s: float) -> Load:
    connections, turns, draw, load = service.connect(), cycle(requests), random.Random(0), Load()
    calls = []
    began = at = time.monotonic()
    while at < began + seconds:
        at += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        calls.append(asyncio.ensure_future(_call(connections, next(turns), load, timeout_s)))
    load.seconds = time.monotonic() - began
    in_time = len(load.answered_s)
    await asyncio.gather(*calls)
    load.answered_s = load.answered_s[:in_time]  # a rate counts what was answered within its seconds
    await connections.close()
    return load


def segment_request(image: bytes) -> bytes:
    """A SegmentRequest for the label map of an image file."""
    outputs = [pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION)]
    return pb.SegmentRequest(image=pb.Image(encoded=image), outputs=outputs).SerializeToString()
