"""Does a server stay as it is? `python -m benchmarks.soak BUNDLE --minutes 30` (`make soak BUNDLE=...`).

A real server, and callers that send what servers get: images one by one and in streams, images that cannot be read,
deadlines that are too short, calls that are cancelled, scrapes. Its memory, open files and event loop are looked at
every few seconds; the first third is warm-up. Exit code 1 when a line is missed: memory grows by 1 MiB a minute or
more, the number of open files grows, a timer of the loop is late by 20 ms at the 99th percentile, a call ends as none
should, or the log warns of something.
"""

from __future__ import annotations

import asyncio
import io
import random
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.line import line
from weakseg.local_server import Ports, local_server
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

EVERY_S = 5.0
CALLERS = 4
WARM_UP = 1 / 3  # of the time
EXPECTED = {"OK", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "CANCELLED", "RESOURCE_EXHAUSTED"}
GAUGES = {
    "rss_mib": ("process_resident_memory_bytes", 2**-20),
    "fds": ("process_open_fds", 1),
    "lag_s": ("weakseg_event_loop_lag_seconds", 1),
}

Stub = Any  # the asynchronous form of the stubs, which have types for the other one


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=30.0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "serve.log"
        with local_server(args.bundle, log, "--log-level", "warning") as ports:
            codes, samples = asyncio.run(soak(ports, 60 * args.minutes))
        said = log.read_text()
    return 0 if judge(codes, samples, said) else 1


async def soak(ports: Ports, seconds: float) -> tuple[Counter[str], dict[str, NDArray[np.float64]]]:
    """How calls ended, and (n, 2) times and values of each gauge after the warm-up."""
    codes: Counter[str] = Counter()
    ends = time.monotonic() + seconds
    rows: list[tuple[float, dict[str, float]]] = []
    async with grpc.aio.insecure_channel(ports.target) as channel:
        stub = pb_grpc.SegmentationServiceStub(channel)
        callers = [asyncio.create_task(call_until(stub, ends, random.Random(i), codes)) for i in range(CALLERS)]
        while time.monotonic() < ends:
            await asyncio.sleep(EVERY_S)
            rows.append((time.monotonic(), await asyncio.to_thread(gauges, ports.metrics)))
        await asyncio.gather(*callers)
    rows = rows[round(WARM_UP * len(rows)) :]
    return codes, {name: np.array([(at, row[name]) for at, row in rows]) for name in GAUGES}


async def call_until(stub: Stub, ends: float, draw: random.Random, codes: Counter[str]) -> None:
    ways = (segment, segment, stream, damaged, hurried, cancelled)
    while time.monotonic() < ends:
        try:
            await draw.choice(ways)(stub, draw)
            codes["OK"] += 1
        except grpc.aio.AioRpcError as error:
            codes[error.code().name] += 1
        except asyncio.CancelledError:
            codes["CANCELLED"] += 1


async def segment(stub: Stub, draw: random.Random) -> None:
    await stub.Segment(request(draw), timeout=60)


async def stream(stub: Stub, draw: random.Random) -> None:
    requests = [pb.SegmentStreamRequest(request=request(draw)) for _ in range(draw.randint(1, 8))]
    async for _ in stub.SegmentStream(iter(requests), timeout=60):
        pass


async def damaged(stub: Stub, draw: random.Random) -> None:
    sent = request(draw)
    sent.image.encoded = sent.image.encoded[: draw.randint(0, len(sent.image.encoded) - 1)]
    await stub.Segment(sent, timeout=60)


async def hurried(stub: Stub, draw: random.Random) -> None:
    await stub.Segment(request(draw), timeout=draw.uniform(0.001, 0.05))


async def cancelled(stub: Stub, draw: random.Random) -> None:
    call = stub.Segment(request(draw), timeout=60)
    asyncio.get_running_loop().call_later(draw.uniform(0, 0.05), call.cancel)
    await call


def request(draw: random.Random) -> pb.SegmentRequest:
    """An image of one of many sizes, and one or two outputs of it."""
    height, width = draw.randint(32, 384), draw.randint(32, 512)
    small = np.frombuffer(draw.randbytes(8 * 8 * 3), np.uint8).reshape(8, 8, 3)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((width, height)).save(buffer, draw.choice(("JPEG", "PNG")))
    kinds = draw.sample((pb.OUTPUT_KIND_CAM, pb.OUTPUT_KIND_SEGMENTATION), draw.randint(1, 2))
    return pb.SegmentRequest(
        image=pb.Image(encoded=buffer.getvalue()), outputs=[pb.OutputSpec(kind=kind) for kind in kinds]
    )


def gauges(url: str) -> dict[str, float]:
    with urlopen(f"{url}/metrics", timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    values = {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}
    return {name: values[metric] * factor for name, (metric, factor) in GAUGES.items()}


def judge(codes: Counter[str], samples: dict[str, NDArray[np.float64]], said: str) -> bool:
    """Print a line for each pass line of R16 (docs/reliability.md), and whether all are met."""
    slope = 60 * np.polyfit(*samples["rss_mib"].T, 1)[0]
    fds = samples["fds"][:, 1]
    half = len(fds) // 2
    more_fds = fds[half:].max() - fds[:half].max()
    lag_s = np.quantile(samples["lag_s"][:, 1], 0.99)
    wrong = sum(n for code, n in codes.items() if code not in EXPECTED)
    line("soak.rss_slope", slope, unit="MiB/minute", cost=True, goal=1.0)
    line("soak.more_open_files", more_fds, unit="files", cost=True, goal=0)
    line("soak.loop_lag_p99", 1e3 * lag_s, unit="ms", cost=True, goal=20)
    line("soak.wrong_codes", wrong, unit="calls", cost=True, goal=0)
    print(f"{sum(codes.values())} calls: {dict(codes.most_common())}; the log's warnings: {said.strip() or 'none'}")
    return bool(slope < 1 and more_fds <= 0 and lag_s < 0.02 and not wrong and not said.strip())


if __name__ == "__main__":
    sys.exit(main())
