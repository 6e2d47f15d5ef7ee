"""Memory of a runtime over images of many sizes: `python -m benchmarks.runtime_memory` (`make bench-runtime`).

A process opens a MobileNetV2 DeepLabV3+ (random weights), runs one image of the largest size, then 200 of random sizes.
`peak` is what all of it took above the process with its imports; `growth` what stayed after the first image: a runtime
that keeps something for each size grows with the number of sizes that it has met, and a service meets many.
"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.line import line
from benchmarks.measure import resident_mib
from weakseg.manifest import SEGMENTATION
from weakseg.runners import RUNTIMES, open_runner

MAX_SIDE, MIN_SIDE, N_SIZES = 513, 64, 200
PACKAGES = {"onnxruntime": "onnxruntime", "openvino": "openvino"}  # of the runtimes for CPUs
GOAL_MIB = 64


def main() -> None:
    from benchmarks.runtime import exported, graphs  # torch, which the measured processes shall not have

    with tempfile.TemporaryDirectory() as folder:
        path = exported({SEGMENTATION: graphs("mobilenet_v2")[SEGMENTATION]}, Path(folder) / "graphs")[SEGMENTATION]
        for runtime in (name for name in RUNTIMES if name in PACKAGES and find_spec(PACKAGES[name])):
            peak, growth = measured_alone(runtime, SEGMENTATION, path)
            line(f"runtime_memory.peak_mib.{runtime}", peak, unit="MiB", cost=True)
            line(f"runtime_memory.growth_mib.{runtime}", growth, unit="MiB", cost=True, goal=GOAL_MIB)


def measured_alone(runtime: str, graph: str, path: Path, n_sizes: int = N_SIZES) -> tuple[float, float]:
    """`measure` in a process of its own."""
    with get_context("spawn").Pool(1) as alone:
        return alone.apply(measure, (runtime, graph, path, n_sizes))


def measure(runtime: str, graph: str, path: Path, n_sizes: int) -> tuple[float, float]:
    """(peak above the start, growth since the first image) in MiB."""
    rng = np.random.default_rng(0)
    open_runner({}, runtime=runtime)  # its libraries are no part of what a graph takes
    start = resident_mib("VmRSS")
    runner = open_runner({graph: path}, runtime=runtime, threads=1)
    runner.run(graph, np.zeros((1, MAX_SIDE, MAX_SIDE, 3), np.uint8))
    first = resident_mib("VmRSS")
    for height, width in rng.integers(MIN_SIDE, MAX_SIDE + 1, (n_sizes, 2)):
        runner.run(graph, rng.integers(0, 256, (1, height, width, 3), dtype=np.uint8))
    return resident_mib("VmHWM") - start, resident_mib("VmRSS") - first


if __name__ == "__main__":
    main()
