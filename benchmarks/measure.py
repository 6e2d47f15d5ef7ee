"""What benchmarks measure with: CPU seconds in turns, memory of a process, the machine's own rate."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROUNDS = 5


def took_turns(*ways: Callable[[], object]) -> list[float]:
    """Median CPU seconds of each."""
    seconds: list[list[float]] = [[] for _ in ways]
    for way in ways:
        way()
    for _ in range(ROUNDS):
        for measured, way in zip(seconds, ways, strict=True):
            began = time.process_time()
            way()
            measured.append(time.process_time() - began)
    return [median(measured) for measured in seconds]


def flops(run: Callable[[], object]) -> float:
    """Multiply-adds of torch's convolutions and matrix products in a call, times two."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def sgemm_rate(n: int = 2048) -> float:
    """FLOP per CPU second of a large float32 matrix product."""
    import torch

    a, b = torch.rand(n, n), torch.rand(n, n)
    a @ b
    began = time.process_time()
    for _ in range(5):
        a @ b
    return 5 * 2 * n**3 / (time.process_time() - began)


def resident_mib(key: str) -> float:
    """VmRSS: resident now; VmHWM: at most so far. Linux.

    Not getrusage's ru_maxrss, which a started process takes over from the one that forked it.
    """
    row = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(key))
    return int(row.split()[1]) / 1024
