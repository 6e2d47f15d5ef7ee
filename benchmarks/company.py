"""Are classes that come together told apart? `python -m benchmarks.company runs/compare-synthetic/{cam,recam}-0`.

Of one or several run folders, finished up to their pseudo-masks: mIoU of the maps (CAM, tags given, the run's own
threshold) of the last scored split, apart for images of one class and of several; and, of the pixels that are labelled
as some class and truly are another or the same one, the share that is another. What ReCAM is for is that share in
images of several classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from training.pseudo_label import scored_indices
from weakseg.cam import labels_from_cam
from weakseg.cam_file import read_cam
from weakseg.datasets import read
from weakseg.datasets.truth import open_truth, trusted
from weakseg.report import recipe_of
from weakseg.run_folder import cam_path, read_json
from weakseg.scoring import Confusion
from weakseg.text import table
from weakseg.threshold import Threshold

HEAD = ["run", "images of", "images", "mIoU", "another class"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="a run folder")
    rows = [row for folder in parser.parse_args(argv).folders for row in rows_of(folder)]
    print(table(HEAD, rows))


def rows_of(folder: Path) -> list[list[str]]:
    """The rows of one run, in the order of HEAD."""
    recipe = recipe_of(folder)
    split = recipe.evaluate.splits[-1]
    dataset = read(recipe.data, split)
    scored = scored_indices(recipe, dataset.classes)
    t = Threshold.from_dict(read_json(folder / "pseudo_label" / "threshold.json")).t
    with trusted("scorer", __spec__.name):
        truth = open_truth(recipe.data, split, opener="scorer")
    alone, together = Confusion(len(dataset.classes)), Confusion(len(dataset.classes))
    for sample in dataset:
        if truth.has(sample.id) and sample.tags:
            cam = read_cam(cam_path(folder, split, sample.id))
            labels = labels_from_cam(cam.cam01(recipe.cam.normalisation), cam.classes, t, len(dataset.classes))
            (alone if len(sample.tags) == 1 else together).add(truth.mask(sample.id, labels.shape), labels)
    return [
        [folder.name, name, str(of.n_images), f"{100 * of.scores(scored).miou:.1f}", f"{100 * mistaken(of):.1f}"]
        for name, of in (("one class", alone), ("several", together))
    ]


def mistaken(found: Confusion) -> float:
    """Of the pixels that are a class and are labelled as a class, the share whose label is another; NaN of none."""
    classes = found.matrix[1:, 1:-1]
    return float(1 - np.trace(classes) / classes.sum()) if classes.any() else float("nan")


if __name__ == "__main__":
    main()
