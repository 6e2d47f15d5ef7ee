"""How often the label-free signs of a harmful refiner are right: `python -m benchmarks.refiner_signs RUN [RUN …]`.

Nine settings of CRF and threshold, good and bad, on every scored split of the runs. One line is the share that is named
of the cases that lower mIoU, the other of those that raise it; stderr has the table.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.line import line
from training.pseudo_label import scored_indices
from weakseg.cam import labels_from_cam
from weakseg.cam_file import read_cam
from weakseg.datasets import read
from weakseg.datasets.truth import open_truth, trusted
from weakseg.image import read_image
from weakseg.pseudo_mask import refined_labels
from weakseg.recipe import CrfConfig
from weakseg.refinement import REFINERS, Change, refiner_record, signs
from weakseg.report import recipe_of
from weakseg.run_folder import cam_path, read_json
from weakseg.scoring import Confusion
from weakseg.threshold import drawn

CRF = next(refiner for refiner in REFINERS if refiner.name == "crf")


def main(folders: list[Path]) -> None:
    named: dict[bool, list[bool]] = {True: [], False: []}
    for folder in folders:
        for split in recipe_of(folder).evaluate.splits:
            for name, before, after, found in cases(folder, split):
                named[after < before].append(bool(found))
                moved = f"{100 * before:.1f} -> {100 * after:.1f}"
                print(f"{folder.name:10}{split:6}{name:14} mIoU {moved}  {'; '.join(found)}", file=sys.stderr)
    for harmful, cases_named in named.items():
        if cases_named:
            name = f"refiner_signs.{'harmful' if harmful else 'helpful'}_named"
            line(name, sum(cases_named) / len(cases_named), unit="share", cost=not harmful)


def settings(crf: CrfConfig, t: float) -> dict[str, tuple[CrfConfig, float]]:
    return {
        "as it is": (crf, t),
        "t - 0.15": (crf, t - 0.15),
        "t + 0.15": (crf, t + 0.15),
        "t + 0.3": (crf, t + 0.3),
        "80 px, 13": (replace(crf, bilateral_sxy=80.0, bilateral_srgb=13.0), t),
        "weight 40, 20": (replace(crf, bilateral_srgb=20.0, bilateral_weight=40.0), t),
        "10 px": (replace(crf, bilateral_sxy=10.0), t),
        "150 px": (replace(crf, bilateral_sxy=150.0), t),
        "1 iteration": (replace(crf, iterations=1), t),
    }


def cases(folder: Path, split: str) -> Iterator[tuple[str, float, float, list[str]]]:
    """(name, mIoU before, mIoU after, what the signs say) of every setting, on images as without true masks."""
    recipe = recipe_of(folder)
    dataset = read(recipe.data, split)
    n_classes, scored = len(dataset.classes), scored_indices(recipe, dataset.classes)
    with trusted("scorer", __spec__.name):
        truth = open_truth(recipe.data, split, opener="scorer")
    tried = settings(recipe.pseudo_label.crf or CrfConfig(), read_json(folder / "pseudo_label/threshold.json")["t"])
    counts = {name: (Change(n_classes), Confusion(n_classes), Confusion(n_classes)) for name in tried}
    for sample in drawn([sample for sample in dataset if sample.tags and truth.has(sample.id)]):
        cam = read_cam(cam_path(folder, split, sample.id))
        image, cam01 = read_image(sample.image), cam.cam01(recipe.cam.normalisation)
        mask = truth.mask(sample.id)
        for name, (crf, t) in tried.items():
            before = labels_from_cam(cam01, cam.classes, t, n_classes)
            after = refined_labels(image, cam01, cam.classes, n_classes, [t], crf)[0]
            change, score_before, score_after = counts[name]
            change.add(before, after, sample.tags)
            score_before.add(mask, before)
            score_after.add(mask, after)
    for name, (change, score_before, score_after) in counts.items():
        record = refiner_record(CRF, split, change, dataset.classes, {})
        yield name, score_before.scores(scored).miou, score_after.scores(scored).miou, signs(record)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]] or [Path("runs/demo")])
