"""How far each rule's threshold lands from the best: `python -m benchmarks.thresholds runs/wsss_mini`.

Scores are those of the tune images, which are training images; t comes from the training maps as in a run. The oracle
is the best of a grid on the same masks: for plain CAMs 0.01 to 0.99, after the CRF 0.05 to 0.8. A line is the distance
in points of mIoU, the table beside it (stderr) has t and the scores.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.line import line
from training.pseudo_label import choose_threshold, scored_indices
from weakseg.cam_file import read_cam
from weakseg.datasets import read
from weakseg.datasets.truth import open_truth, trusted
from weakseg.image import read_image
from weakseg.progress import Progress
from weakseg.pseudo_mask import refined_labels
from weakseg.recipe import CrfConfig, Recipe, ThresholdConfig
from weakseg.report import recipe_of
from weakseg.run_folder import cam_path
from weakseg.scoring import Confusion

RULES = (
    ThresholdConfig("fixed"),
    ThresholdConfig("otsu"),
    ThresholdConfig("area"),
    ThresholdConfig("validation_split"),
)
CAM_GRID = tuple(np.arange(1, 100) / 100)
CRF_GRID = tuple(np.arange(1, 17) / 20)
GOAL = 1.5  # points


def main(folder: Path) -> None:
    recipe = recipe_of(folder)
    chosen = [choose_threshold(_with(recipe, rule), folder, Progress()) for rule in RULES]
    crf = recipe.pseudo_label.crf
    for what, grid, config in [("cam", CAM_GRID, None)] + ([("cam_crf", CRF_GRID, crf)] if crf else []):
        thresholds = sorted({*grid, *(rule.t for rule in chosen)})
        miou = dict(zip(thresholds, _miou(recipe, folder, thresholds, config), strict=True))
        best = max(miou, key=lambda t: miou[t])
        for rule in chosen:
            short = 100 * (miou[best] - miou[rule.t])
            print(
                f"{what:8}{rule.rule:17} t {rule.t:.3f}  mIoU {100 * miou[rule.t]:.2f}  "
                f"oracle {100 * miou[best]:.2f} at {best:.3f}  short by {short:.2f}",
                file=sys.stderr,
            )
            line(f"threshold.{what}.{rule.rule}", short, unit="points", cost=True, goal=GOAL)


def _with(recipe: Recipe, rule: ThresholdConfig) -> Recipe:
    return replace(recipe, pseudo_label=replace(recipe.pseudo_label, threshold=rule))


def _miou(recipe: Recipe, folder: Path, thresholds: Sequence[float], crf: CrfConfig | None) -> list[float]:
    """mIoU of the tune images at each threshold."""
    dataset = read(recipe.data, recipe.data.train)
    with trusted("validation_split", __spec__.name):
        truth = open_truth(recipe.data, recipe.data.train, opener="validation_split")
    scores = [Confusion(len(dataset.classes)) for _ in thresholds]
    for sample in (sample for sample in dataset if sample.id in truth.ids):
        cam = read_cam(cam_path(folder, dataset.split, sample.id))
        image, cam01 = read_image(sample.image), cam.cam01(recipe.cam.normalisation)
        mask = truth.mask(sample.id, image.shape[:2])
        labels = refined_labels(image, cam01, cam.classes, len(dataset.classes), thresholds, crf)
        for score, one in zip(scores, labels, strict=True):
            score.add(mask, one)
    scored = scored_indices(recipe, dataset.classes)
    return [score.scores(scored).miou for score in scores]


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
