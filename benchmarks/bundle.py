"""What the graphs of a trained bundle spare: `python -m benchmarks.bundle RUN` (`make bench-runtime`).

On the photographs of the run, one thread, CPU seconds, the ways taking turns. RUN is a run folder; its bundle is
exported anew, to a temporary folder.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from benchmarks.line import line
from benchmarks.measure import resident_mib, took_turns
from weakseg.bundle import Bundle, open_bundle
from weakseg.datasets import read
from weakseg.image import read_image
from weakseg.manifest import CLASSIFIER, MULTISCALE, SEGMENTATION
from weakseg.model import Model
from weakseg.runners import Runner, open_runner

N_IMAGES = 5
OPEN = """
import sys, time
import weakseg
began = time.process_time()
weakseg.load(sys.argv[1], threads=1)
print(time.process_time() - began)
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    args = parser.parse_args(argv)
    cv2.setNumThreads(1)
    from export.bundle_from_run import export_run
    from export.commands import read_recipe
    from weakseg.progress import Progress

    recipe = read_recipe(args.run)
    with tempfile.TemporaryDirectory() as folder:
        made = open_bundle(export_run(recipe, args.run, Path(folder), Progress("silent"))["bundle"])
        dataset = read(recipe.data, recipe.evaluate.splits[-1])
        images = [read_image(sample.image) for sample in dataset.samples[:N_IMAGES]]
        model = Model(made, open_runner(made.graph_paths(), threads=1))
        label_output(made, model.runner, images)
        if MULTISCALE in made.manifest.graphs:
            multiscale(made, model.runner, images)
        line("runtime.bundle_open_s", open_seconds(made.folder), unit="CPU s", cost=True, goal=1.0)


def label_output(made: Bundle, runner: Runner, images: Sequence[NDArray[np.uint8]]) -> None:
    """The nodes that the output `labels` adds, alone, against upsampling and argmax by OpenCV and NumPy."""
    tail = labels_of_logits(made.graph_paths()[SEGMENTATION].read_bytes())
    logits = [runner.run(SEGMENTATION, image[None], ["logits"])["logits"] for image in images]

    def in_graph() -> None:
        for image, one in zip(images, logits, strict=True):
            tail.run(["labels"], {"images": image[None], "logits": one})

    def in_numpy() -> None:
        for image, one in zip(images, logits, strict=True):
            height, width = 4 * one.shape[2], 4 * one.shape[3]
            planes = [cv2.resize(plane, (width, height), interpolation=cv2.INTER_LINEAR) for plane in one[0]]
            np.stack(planes)[:, : image.shape[0], : image.shape[1]].argmax(axis=0).astype(np.uint8)

    ours, peer = took_turns(in_graph, in_numpy)
    line("runtime.label_output", N_IMAGES / ours, N_IMAGES / peer, unit="masks/CPU s", goal=1.3)


def labels_of_logits(segmentation: bytes) -> onnxruntime.InferenceSession:
    """Of a segmentation graph what follows the logits, which become an input."""
    model = onnx.load_from_string(segmentation)
    logits = next(output for output in model.graph.output if output.name == "logits")
    tail = [node for node in model.graph.node if node.name.startswith("labels.")]
    del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
    model.graph.node.extend(tail)
    model.graph.input.append(logits)
    model.graph.output.remove(logits)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def multiscale(made: Bundle, runner: Runner, images: Sequence[NDArray[np.uint8]]) -> None:
    """All views in one graph, against the graph of one view for each of them; then the memory of both."""
    scales, flip = made.manifest.cam.scales, made.manifest.cam.flip
    ways = {
        "graph": lambda: [runner.run(MULTISCALE, image[None], ["cam"]) for image in images],
        "views": lambda: [view_by_view(runner, image, scales, flip) for image in images],
    }
    ours, peer = took_turns(*ways.values())
    line("runtime.multiscale_graph", N_IMAGES / ours, N_IMAGES / peer, unit="images/CPU s", goal=1.0)
    with get_context("spawn").Pool(1, maxtasksperchild=1) as alone:
        mib = [alone.apply(peak_mib, (way, made.folder, images)) for way in ways]
    line("runtime.multiscale_graph_mib", mib[0], mib[1], unit="MiB", cost=True)


def view_by_view(runner: Runner, image: NDArray[np.uint8], scales: Sequence[float], flip: bool) -> NDArray[np.floating]:
    """(C, ceil(H / 4), ceil(W / 4)) raw maps, summed: what a client of the single-view graph would do."""
    height, width = -(-image.shape[0] // 4), -(-image.shape[1] // 4)
    total = 0.0
    for scale in scales:
        view = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
        for mirrored in (False, True)[: 1 + flip]:
            cam = runner.run(CLASSIFIER, (view[:, ::-1] if mirrored else view)[None], ["cam"])["cam"][0]
            cam = cam[:, :, ::-1] if mirrored else cam
            planes = [cv2.resize(plane, (width, height), interpolation=cv2.INTER_LINEAR) for plane in cam]
            total = total + np.stack(planes)
    return np.asarray(total)


def peak_mib(way: str, folder: Path, images: Sequence[NDArray[np.uint8]]) -> float:
    """Above the process with its imports."""
    made = open_bundle(folder)
    graph = MULTISCALE if way == "graph" else CLASSIFIER
    open_runner({})
    start = resident_mib("VmRSS")
    runner = open_runner({graph: made.graph_paths()[graph]}, threads=1)
    for image in images:
        if way == "graph":
            runner.run(graph, image[None], ["cam"])
        else:
            view_by_view(runner, image, made.manifest.cam.scales, made.manifest.cam.flip)
    return resident_mib("VmHWM") - start


def open_seconds(folder: Path) -> float:
    """Of `weakseg.load` in a new process, hashes and onnxruntime's import included; the median of five."""
    command = [sys.executable, "-c", OPEN, str(folder)]
    return median(float(subprocess.check_output(command, text=True)) for _ in range(5))


if __name__ == "__main__":
    main()
