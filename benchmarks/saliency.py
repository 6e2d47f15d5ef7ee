"""How well saliency maps rank the pixels of objects: `python -m benchmarks.saliency wsss_mini [--estimators contrast]`.

Over the images of the recipe's tune list, whose masks the rule validation_split may read. Of each estimator the mean
area under the ROC curve of an image (0.5 = chance), and the best mean F-measure (beta^2 = 0.3, as in the literature on
saliency) of one threshold for all images; the table beside it (stderr) has that threshold, and F at 0.5, by which
guided labelling cuts. `centre` is no estimator: what a bright middle of every image is worth.

On the synthetic set objectness is refused by a run, for its scenes are of the same kind; here it may, and its figures
there are those of a network that was told the truth.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.line import line
from training.models import load_model
from training.saliency import contrast, objectness
from weakseg.classes import BACKGROUND, ignore_value
from weakseg.datasets import read
from weakseg.datasets.truth import open_truth, trusted
from weakseg.image import read_image
from weakseg.progress import Progress
from weakseg.recipe import DataConfig
from weakseg.recipe_loading import load_recipe, override
from weakseg.text import table

Estimate = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
BINS = 256  # levels of a map
BETA2 = 0.3


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="saliency")
    parser.add_argument("recipe")
    parser.add_argument("--estimators", nargs="+", choices=("centre", "contrast", "objectness"), default=["contrast"])
    parser.add_argument("--folder", type=Path, default=Path("runs/saliency"), help="where objectness is trained")
    args, overrides = parser.parse_known_args(argv)
    recipe = override(load_recipe(args.recipe), overrides, prog="saliency")
    rows = []
    for name in args.estimators:
        estimate = _estimate(name, args.folder)
        auc, f = scores(recipe.data, estimate, name)
        best = int(f.argmax())
        rows.append([name, f"{auc:.3f}", f"{f[best]:.3f}", f"{best / (BINS - 1):.2f}", f"{f[BINS // 2]:.3f}"])
        line(f"saliency.{args.recipe}.{name}.auc", auc, unit="area")
        line(f"saliency.{args.recipe}.{name}.f", f[best], unit="F")
    print(table(["estimator", "AUC", "best F", "at", "F at 0.5"], rows), file=sys.stderr)


def scores(data: DataConfig, estimate: Estimate, name: str) -> tuple[float, NDArray[np.float64]]:
    """Mean AUC, and (BINS,) mean F of all thresholds, over the tune images that show both objects and background."""
    dataset = read(data, data.train)
    with trusted("validation_split", __spec__.name):
        truth = open_truth(data, data.train, opener="validation_split")
    areas, measures = [], []
    tune = [sample for sample in dataset if sample.id in truth.ids]
    for sample in Progress().each(tune, name, total=len(tune)):
        image = read_image(sample.image)
        mask = truth.mask(sample.id, image.shape[:2])
        known, levels = mask != ignore_value(mask), np.round(estimate(image) * (BINS - 1)).astype(np.intp)
        things, rest = (
            np.bincount(levels[known & one], minlength=BINS) for one in (mask != BACKGROUND, mask == BACKGROUND)
        )
        if things.any() and rest.any():
            areas.append(auc(things, rest))
            measures.append(f_measures(things, rest))
    return float(np.mean(areas)), np.mean(measures, axis=0)


def auc(things: NDArray[np.int64], rest: NDArray[np.int64]) -> float:
    """The share of pairs in which the object's pixel is brighter; equal ones count half. Both are histograms."""
    darker = np.cumsum(rest) - rest / 2
    return float((darker * things).sum() / (things.sum() * rest.sum()))


def f_measures(things: NDArray[np.int64], rest: NDArray[np.int64]) -> NDArray[np.float64]:
    """(BINS,) (1 + b) P R / (b P + R), b = BETA2, of what is at least as bright as each level."""
    hit, wrong = (np.cumsum(one[::-1])[::-1].astype(np.float64) for one in (things, rest))
    precision, recall = hit / np.maximum(hit + wrong, 1), hit / hit[0]
    return (1 + BETA2) * precision * recall / np.maximum(BETA2 * precision + recall, 1e-9)


def _estimate(name: str, folder: Path) -> Estimate:
    if name == "centre":
        return centre
    if name == "contrast":
        return contrast.saliency
    path = folder / "model.pt"
    if not path.is_file():
        objectness.train(folder, Progress())
    return objectness.Objectness(load_model(path, kind=objectness.FOLDER)[0])


def centre(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    y, x = ((np.arange(n, dtype=np.float32) + 0.5) / n - 0.5 for n in image.shape[:2])
    return np.exp(-4 * (y[:, None] ** 2 + x**2))


if __name__ == "__main__":
    main()
