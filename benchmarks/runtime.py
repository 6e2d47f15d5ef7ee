"""Images per CPU second of the exported graphs: `python -m benchmarks.runtime` (`make bench-runtime`).

ONNX Runtime against torch (channels last, inference mode) and against OpenVINO where it is installed, taking turns on
the same image, each with one thread; the runners are those that users get. Random weights, which cost what trained
ones do.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.line import line
from benchmarks.measure import flops, sgemm_rate, took_turns
from export.int8 import int8_from_fp32
from export.onnx_from_torch import onnx_from_graphs
from training.cams import cam as cam_method
from training.graphs import ClassifierGraph, SegmentationGraph
from training.models import CamClassifier, DeepLabV3Plus, build_backbone
from weakseg.manifest import CLASSIFIER, SEGMENTATION
from weakseg.recipe import BackboneConfig
from weakseg.runners import Runner, open_runner

N_CLASSES, SIDES = 20, (321, 513)
TORCH_GOALS = {"mobilenet_v2": 1.5, "resnet50": 1.2}  # by backbone
INT8_GOALS = {"mobilenet_v2": 1.4, "resnet50": 1.8}
OPENVINO_GOAL = 0.95
UNIT = "images/CPU s"


def main() -> None:
    torch.set_num_threads(1)
    runtimes = ["onnxruntime", "openvino"] if find_spec("openvino") else ["onnxruntime"]
    if "openvino" not in runtimes:
        print('no runtime.ort_vs_openvino: pip install "weakseg[openvino]"', file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        for backbone in TORCH_GOALS:
            modules = graphs(backbone)
            paths = exported(modules, Path(folder) / backbone)
            runners = {runtime: open_runner(paths, runtime=runtime, threads=1) for runtime in runtimes}
            runners["int8"] = open_runner(in_int8(paths), threads=1)
            for name, module in modules.items():
                for side in SIDES:
                    compare(backbone, name, side, module, runners)


def compare(backbone: str, graph: str, side: int, module: nn.Module, runners: dict[str, Runner]) -> None:
    images = random_image(side, side)
    ways = {"torch": in_torch(module, images)}
    for runtime, runner in runners.items():
        ways[runtime] = lambda runner=runner: runner.run(graph, images)  # type: ignore[misc]
    seconds = dict(zip(ways, took_turns(*ways.values()), strict=True))
    rates = {way: 1 / spent for way, spent in seconds.items()}
    ours, what = rates["onnxruntime"], f"{backbone}.{graph}.{side}"
    line(f"runtime.ort_vs_torch.{what}", ours, rates["torch"], unit=UNIT, goal=TORCH_GOALS[backbone])
    if "openvino" in rates:
        line(f"runtime.ort_vs_openvino.{what}", ours, rates["openvino"], unit=UNIT, goal=OPENVINO_GOAL)
    line(f"runtime.int8_vs_fp32.{what}", rates["int8"], ours, unit=UNIT, goal=INT8_GOALS[backbone])
    line(f"runtime.peak_share.{what}", flops(ways["torch"]) * ours / sgemm_rate(), unit="of a matrix product's rate")


def graphs(backbone: str) -> dict[str, nn.Module]:
    """The graphs of a bundle with random weights, in evaluation mode."""
    torch.manual_seed(0)
    config = BackboneConfig(name=backbone, weights=None)
    classifier = CamClassifier(build_backbone(config), N_CLASSES)
    segmentation = DeepLabV3Plus(build_backbone(config), N_CLASSES)
    return {
        CLASSIFIER: ClassifierGraph(classifier, cam_method).eval(),
        SEGMENTATION: SegmentationGraph(segmentation).eval(),
    }


def exported(modules: dict[str, nn.Module], folder: Path) -> dict[str, Path]:
    """{graph: its ONNX file}, written to a new folder."""
    folder.mkdir()
    paths = {}
    for name, data in onnx_from_graphs(modules).items():
        paths[name] = folder / f"{name}.onnx"
        paths[name].write_bytes(data)
    return paths


def in_int8(paths: dict[str, Path]) -> dict[str, Path]:
    """{graph: it with all layers in INT8}; random weights have no labels to judge by, and cost the same."""
    made = {}
    for name, path in paths.items():
        made[name] = path.with_suffix(".int8.onnx")
        images = [random_image(96, 128, seed)[0] for seed in range(2)]
        made[name].write_bytes(int8_from_fp32(path.read_bytes(), images, labels=lambda _: [np.zeros(1)]).model)
    return made


def in_torch(module: nn.Module, images: NDArray[np.uint8]) -> Callable[[], None]:
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = torch.from_numpy(images)

    def run() -> None:
        with torch.inference_mode():
            module(batch)

    return run


def random_image(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """(1, H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (1, height, width, 3), dtype=np.uint8)


if __name__ == "__main__":
    main()
