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
from benchmarks.pseudo_label import table_of
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


def entropy(row: Row) -> float:
    return _or_one(row["quality"]["entropy"])


def undecided(row: Row) -> float:
    return (row["quality"]["undecided_px"] or 0) / (row["width"] * row["height"])


def doubts(row: Row) -> list[float]:
    """Of each present class: 1 where it has no pixel, else how little the mask trusts those it has."""
    sure = {one["name"]: one["confidence"] or 0.0 for one in row["classes"]}
    return [1 - sure.get(name, 0.0) for name in row["present"]] or [1.0]


def missing(row: Row) -> float:
    shown = {one["name"] for one in row["classes"]}
    return float(np.mean([name not in shown for name in row["present"]])) if row["present"] else 1.0


def small(row: Row) -> float:
    share = sum(one["area_px"] for one in row["classes"]) / (row["width"] * row["height"])
    return 1 - share


SIGNALS: dict[str, Callable[[Row], float]] = {
    "uncertainty": uncertainty,
    "entropy": entropy,
    "lack_of_confidence": lambda row: 1 - (row["quality"]["confidence"] or 0.0),
    "undecided": undecided,
    "undecided_of_objects": lambda row: undecided(row) / max(1 - small(row) + undecided(row), 1e-6),
    "least_sure_class": lambda row: max(doubts(row)),
    "mean_doubt": lambda row: float(np.mean(doubts(row))),
    "missing": missing,
    "small": small,
    "undecided_and_missing": lambda row: undecided(row) + missing(row),
    "undecided_and_least_sure": lambda row: undecided(row) + max(doubts(row)),
    "undecided_and_mean_doubt": lambda row: undecided(row) + float(np.mean(doubts(row))),
    "twice_undecided_and_mean_doubt": lambda row: 2 * undecided(row) + float(np.mean(doubts(row))),
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
            rows, ious = labelled(recipe, bundle, args.on, tags, Path(folder))
        signals = SIGNALS if args.on == "tune" else {"uncertainty": uncertainty}
        for name, signal in signals.items():
            found, first = judged(ious, np.array([signal(row) for row in rows]))
            given = "tags" if tags else "no_tags"
            line(f"review.{given}.{name}.found", found, unit="share", goal=0.3)
            line(f"review.{given}.{name}.first_{FIRST:.0%}", first, float(ious.mean()), unit="IoU", cost=True)


def labelled(recipe: Recipe, bundle: Path, on: str, tags: bool, folder: Path) -> tuple[list[Row], NDArray[np.float64]]:
    """Rows of the images with truth, and the mean IoU of each over background and its classes."""
    split = recipe.data.train if on == "tune" else on
    dataset = read(recipe.data, split)
    scored = scored_indices(recipe, dataset.classes)
    with trusted("validation_split" if on == "tune" else "scorer", __spec__.name):
        truth = open_truth(recipe.data, split, opener="validation_split" if on == "tune" else "scorer")
    samples = [sample for sample in dataset if on != "tune" or sample.id in truth.ids]
    table = table_of(samples, dataset, folder / "images.csv")
    label(Arguments(str(table), str(folder / "out"), bundle=bundle, use_tags=tags, json=True))
    lines = (folder / "out" / part_path(0, 1)).read_text().splitlines()
    by_uri: dict[str, Any] = {row["uri"]: row for row in map(json.loads, lines)}
    rows, ious = [], []
    for sample in samples:
        row = by_uri[str(sample.image.resolve())]
        labels = labels_from_png((folder / "out" / row["outputs"]["mask"]["path"]).read_bytes())
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
