"""What other precisions cost and bring: `python -m benchmarks.precisions RUN` (`make bench-precisions`).

The run's bundle is exported anew with fp16 and INT8; its segmentation graph is scored on the last split that the run
evaluates (one view, no tags), its graphs are timed on photographs of it, one thread, CPU seconds, in turns. Nothing is
chosen here: INT8 is calibrated and judged on training images, without masks.
"""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.line import line
from benchmarks.measure import took_turns
from benchmarks.runtime import INT8_GOALS
from export.bundle_from_run import export_run
from export.commands import read_recipe
from training.pseudo_label import scored_indices
from weakseg.bundle import Bundle, open_bundle
from weakseg.datasets import Dataset, read
from weakseg.datasets.truth import open_truth, trusted
from weakseg.image import read_image
from weakseg.manifest import PRECISIONS, SEGMENTATION
from weakseg.model import load
from weakseg.progress import Progress
from weakseg.recipe import Recipe
from weakseg.runners import Runner, open_runner
from weakseg.scoring import Confusion
from weakseg.text import table

N_TIMED = 5


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    args = parser.parse_args(argv)
    recipe = read_recipe(args.run)
    with tempfile.TemporaryDirectory() as folder:
        both = replace(recipe, export=replace(recipe.export, precisions=("fp16", "int8")))
        made = open_bundle(export_run(both, args.run, Path(folder), Progress())["bundle"])
        dataset = read(recipe.data, recipe.evaluate.splits[-1])
        spent = timed(made, [read_image(sample.image) for sample in dataset.samples[:N_TIMED]])
        scores = scored(recipe, made, dataset)
        goal = INT8_GOALS.get(recipe.backbone.name)
        for graph, seconds in spent.items():
            if "int8" in seconds:
                rates = (N_TIMED / seconds["int8"], N_TIMED / seconds["fp32"])
                line(f"runtime.int8_vs_fp32.{graph}", *rates, unit="images/CPU s", goal=goal)
        if "int8" in scores:
            lost = 100 * (scores["fp32"][0] - scores["int8"][0])
            line("runtime.int8_miou_loss", lost, unit="points of mIoU", cost=True, goal=1.0)
        print(summary(made, spent, scores))


def timed(made: Bundle, images: Sequence[NDArray[np.uint8]]) -> dict[str, dict[str, float]]:
    """{graph: {precision: CPU seconds of all images}}."""
    spent = {}
    for name, graph in made.manifest.graphs.items():
        runners = {p: open_runner({name: made.folder / file}, threads=1) for p, file in graph.files().items()}
        ways = [partial(_run_all, runner, name, images) for runner in runners.values()]
        spent[name] = dict(zip(runners, took_turns(*ways), strict=True))
    return spent


def scored(recipe: Recipe, made: Bundle, dataset: Dataset) -> dict[str, tuple[float, float]]:
    """{precision: (mIoU, share of labels as in fp32)} of the segmentation graph, without tags, from one view."""
    with trusted("scorer", __spec__.name):
        truth = open_truth(recipe.data, dataset.split, opener="scorer")
    n_classes = len(dataset.classes)
    indices = scored_indices(recipe, dataset.classes)
    precisions = [p for p in PRECISIONS if p in made.manifest.graphs[SEGMENTATION].files()]
    models = {p: load(made.folder, precision=p) for p in precisions}
    confusions = {p: Confusion(n_classes) for p in precisions}
    equal = dict.fromkeys(precisions, 0)
    n_pixels = 0
    for sample in dataset:
        image = read_image(sample.image)
        labels = {p: model.segment(image, outputs=["segmentation"]).segmentation for p, model in models.items()}
        n_pixels += image.shape[0] * image.shape[1]
        for precision, made_of_it in labels.items():
            confusions[precision].add(truth.mask(sample.id), made_of_it)
            equal[precision] += int((made_of_it == labels["fp32"]).sum())
    return {p: (confusions[p].scores(indices).miou, equal[p] / n_pixels) for p in precisions}


def summary(made: Bundle, spent: dict[str, dict[str, float]], scores: dict[str, tuple[float, float]]) -> str:
    rows = []
    for name, graph in made.manifest.graphs.items():
        for precision, file in graph.files().items():
            miou, agreement = scores[precision] if name == SEGMENTATION else (None, None)
            rows.append(
                [
                    name,
                    precision,
                    "-" if miou is None else f"{100 * miou:.2f}",
                    "-" if agreement is None else f"{agreement:.2%}",
                    f"{1e3 * spent[name][precision] / N_TIMED:.1f}",
                    f"{spent[name]['fp32'] / spent[name][precision]:.2f}",
                    f"{(made.folder / file).stat().st_size / 2**20:.1f}",
                ]
            )
    return table(["graph", "precision", "mIoU", "labels as fp32", "CPU ms", "times as fast", "MiB"], rows)


def _run_all(runner: Runner, graph: str, images: Sequence[NDArray[np.uint8]]) -> None:
    for image in images:
        runner.run(graph, image[None])


if __name__ == "__main__":
    main()
