"""Does the review queue find the bad masks? `python -m benchmarks.review runs/wsss_mini`.

Pseudo-masks of a split by the run's bundle, without tags and with them; their IoU with the truth; images in the order
of the queue. The curve is the mean IoU of the first k images; its area is their mean over all k. Random order has the
mean IoU for an area, sorting by IoU itself the smallest one: `found` is how much of the way between them the queue
goes. The signal was chosen on `tune` (--on tune).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.line import line
from training.pseudo_label import scored_indices
from weakseg.batch.commands import Arguments, label
from weakseg.batch.manifest import Row, part_path
from weakseg.batch.review import uncertainty
from weakseg.classes import IGNORE
from weakseg.datasets import read
from weakseg.datasets.truth import open_truth, trusted
from weakseg.masks.png import labels_from_png
from weakseg.recipe import Recipe
from weakseg.report import recipe_of

FIRST = 0.1  # of the images, whose IoU is told beside

SIGNALS: dict[str, Callable[[Row], float]] = {
    "uncertainty": uncertainty,
    "entropy": lambda row: _or_one(row["quality"]["entropy"]),
    "lack_of_confidence": lambda row: 1 - (row["quality"]["confidence"] or 0.0),
    "undecided": lambda row: (row["quality"]["undecided_px"] or 0) / (row["width"] * row["height"]),
    "least_sure_class": lambda row: 1 - min([one["confidence"] or 0.0 for one in row["classes"]], default=0.0),
    "small_objects": lambda row: -float(sum(one["area_px"] for one in row["classes"])),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--on", default="val", help="val, or tune: the training images that settings may be chosen on")
    args = parser.parse_args(argv)
    recipe = recipe_of(args.run)
    bundle = args.run / "bundle" / recipe.export.name / recipe.export.version
    for tags in (False, True):
        with tempfile.TemporaryDirectory(prefix="weakseg-review-") as folder:
            rows, ious = labelled(recipe, bundle, args.on, tags, Path(folder) / "out")
        signals = SIGNALS if args.on == "tune" else {"uncertainty": uncertainty}
        for name, signal in signals.items():
            found, first = judged(ious, np.array([signal(row) for row in rows]))
            given = "tags" if tags else "no_tags"
            line(f"review.{given}.{name}.found", found, unit="share", goal=0.3)
            line(f"review.{given}.{name}.first_{FIRST:.0%}", first, float(ious.mean()), unit="IoU", cost=True)


def labelled(recipe: Recipe, bundle: Path, on: str, tags: bool, out: Path) -> tuple[list[Row], NDArray[np.float64]]:
    """Rows of the images with truth, and the mean IoU of each over background and its classes."""
    split = recipe.data.train if on == "tune" else on
    label(
        Arguments(
            recipe.data.root,
            str(out),
            bundle=bundle,
            dataset=recipe.data.format,
            split=split,
            tags_key=recipe.data.tags_key,
            use_tags=tags,
            json=True,
        )
    )
    dataset = read(recipe.data, split)
    scored = scored_indices(recipe, dataset.classes)
    with trusted("validation_split" if on == "tune" else "scorer", __spec__.name):
        truth = open_truth(recipe.data, split, opener="validation_split" if on == "tune" else "scorer")
    by_key = {row["key"]: row for row in map(json.loads, (out / part_path(0, 1)).read_text().splitlines())}
    rows, ious = [], []
    for sample in dataset:
        if on == "tune" and sample.id not in truth.ids:
            continue
        row: Any = by_key[sample.id]
        labels = labels_from_png((out / row["outputs"]["mask"]["path"]).read_bytes())
        iou = image_iou(labels, truth.mask(sample.id, labels.shape), scored)
        if iou is not None:
            rows.append(row)
            ious.append(iou)
    return rows, np.array(ious)


def image_iou(labels: NDArray[Any], mask: NDArray[Any], scored: Sequence[int] | None) -> float | None:
    """Mean over the values of mask and truth, void left out, IGNORE of the labels being wrong; None without a class.

    Truth of classes that are not scored is void; a prediction of one is wrong.
    """
    known = mask != IGNORE
    if scored is not None:
        known &= np.isin(mask, [0, *(c + 1 for c in scored)])
    labels, mask = labels[known], mask[known]
    values = set(np.unique(mask).tolist()) | (set(np.unique(labels).tolist()) - {IGNORE})
    if values <= {0}:
        return None
    return float(np.mean([_iou(labels == value, mask == value) for value in sorted(values)]))


def judged(ious: NDArray[np.float64], signal: NDArray[np.float64]) -> tuple[float, float]:
    """Share of the way from random order to the best one; mean IoU of the first images."""

    def area(order: NDArray[np.intp]) -> float:
        return float((np.cumsum(ious[order]) / np.arange(1, len(order) + 1)).mean())

    order = np.argsort(-signal, kind="stable")
    worst_first, random = area(np.argsort(ious)), float(ious.mean())
    n = max(1, round(FIRST * len(ious)))
    return (random - area(order)) / (random - worst_first), float(ious[order[:n]].mean())


def _iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / (a | b).sum())


def _or_one(value: float | None) -> float:
    return 1.0 if value is None else value


if __name__ == "__main__":
    main()
