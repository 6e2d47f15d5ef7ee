"""TensorRT beside onnxruntime on the same GPU: `python -m benchmarks.tensorrt BUNDLE` (`make test-gpu` runs it).

Images/s from NumPy to NumPy, copies included, of every graph in every precision of a bundle, alone and in batches of 8;
both execute the same ONNX file, but onnxruntime that of fp16 where TensorRT has bf16. Engines are built first, and
compared with onnxruntime on the CPU (fp32).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.line import line
from export.engine_commands import build_engines, example_images
from export.engine_from_onnx import profile_from_policy
from weakseg.bundle import open_bundle
from weakseg.manifest import PRECISIONS
from weakseg.progress import Progress
from weakseg.runners import Runner
from weakseg.runners.onnxruntime import OnnxRuntimeRunner
from weakseg.runners.tensorrt import open_engines

ROUNDS, SECONDS = 5, 1.0
BATCHES = (1, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    bundle = open_bundle(parser.parse_args().bundle)
    policy = bundle.manifest.input
    profile = profile_from_policy(policy, max(BATCHES))
    _, height, width, _ = profile.typical
    rng = np.random.default_rng(0)
    for precision in PRECISIONS:
        if precision not in {p for graph in bundle.manifest.graphs.values() for p in graph.files()}:
            continue
        build_engines(bundle, "tensorrt", precision, profile, example_images(None, policy), Progress("auto"))
        paths = bundle.graph_paths(precision)
        peers = bundle.graph_paths("fp16") if precision == "bf16" else paths
        ours, peer = open_engines(paths), OnnxRuntimeRunner(peers, provider="cuda")
        for graph in paths:
            for n in BATCHES:
                images = rng.integers(0, 256, (n, height, width, 3), dtype=np.uint8)
                rates = took_turns(ours, peer, graph, images)
                line(f"tensorrt.{graph}.{precision}.batch{n}", *rates, unit="images/s", goal=1)
        ours.close()
        peer.close()


def took_turns(ours: Runner, peer: Runner, graph: str, images: np.ndarray) -> tuple[float, float]:
    """Median images/s of each over rounds of a second, the two taking turns; the first round warms up."""
    rounds = [[rate(runner, graph, images) for runner in (ours, peer)] for _ in range(ROUNDS + 1)][1:]
    return median(a for a, _ in rounds), median(b for _, b in rounds)


def rate(runner: Runner, graph: str, images: np.ndarray) -> float:
    started, n = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < SECONDS:
        runner.run(graph, images)
        n += len(images)
    return n / seconds


if __name__ == "__main__":
    main()
