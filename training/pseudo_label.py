"""Stage `pseudo_label`: choose the threshold, turn maps into label maps. No torch, so that workers start quickly."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.pseudo_masks import write_soft
from weakseg import threshold
from weakseg.cam_file import read_cam
from weakseg.classes import ClassTable, voc_palette
from weakseg.cpu import usable_cpus
from weakseg.datasets import Dataset, Sample, read
from weakseg.datasets.truth import open_truth
from weakseg.files import write_bytes_atomic, write_json_atomic
from weakseg.image import read_image
from weakseg.masks.png import png_from_labels, provenance_text
from weakseg.parallel import map_processes
from weakseg.progress import Progress
from weakseg.pseudo_mask import pseudo_mask, refinement_settings, soft_labels
from weakseg.recipe import Recipe
from weakseg.run_folder import cam_path, mask_path, soft_path
from weakseg.scoring import Sweep
from weakseg.stages import all_splits
from weakseg.threshold import Threshold


def run(recipe: Recipe, folder: Path, *, stage: str, progress: Progress) -> dict[str, Any]:
    """Writes pseudo_label/threshold.json and pseudo_label/<split>/<id>.png; goes on where it stopped."""
    chosen = choose_threshold(recipe, folder, progress)
    write_json_atomic(folder / stage / "threshold.json", chosen.to_dict())
    n_images = 0
    for split in all_splits(recipe):
        dataset = read(recipe.data, split)
        todo = [sample for sample in dataset if not mask_path(folder, split, sample.id).is_file()]
        work = partial(
            write_mask, recipe=recipe, folder=folder, split=split, n_classes=len(dataset.classes), chosen=chosen
        )
        for _ in progress.each(map_processes(work, todo, usable_cpus()), f"{stage} {split}", total=len(todo)):
            pass
        n_images += len(todo)
    return {"n_images": n_images, "threshold": chosen.to_dict()}


def write_mask(sample: Sample, *, recipe: Recipe, folder: Path, split: str, n_classes: int, chosen: Threshold) -> None:
    """One image's maps to its pseudo-mask file, which says how it was made."""
    cam = read_cam(cam_path(folder, split, sample.id))
    image = read_image(sample.image)
    cam01 = cam.cam01(recipe.cam.normalisation)
    made = pseudo_mask(image, cam01, cam.classes, n_classes, chosen.t, recipe.pseudo_label)
    fields = {"mask": "pseudo_mask", "recipe": recipe.name, "seed": recipe.seed}
    text = provenance_text(fields | chosen.to_dict() | refinement_settings(recipe.pseudo_label))
    if recipe.pseudo_label.soft:
        soft = soft_labels(image, cam01, cam.classes, n_classes, chosen.t, recipe.pseudo_label.crf)
        write_soft(soft_path(folder, split, sample.id), soft)
    write_bytes_atomic(mask_path(folder, split, sample.id), png_from_labels(made.labels, voc_palette(), text))


def choose_threshold(recipe: Recipe, folder: Path, progress: Progress) -> Threshold:
    """The background threshold by the recipe's rule, from the maps of the training split."""
    dataset = read(recipe.data, recipe.data.train)
    return threshold.choose(
        recipe.pseudo_label.threshold,
        maxima=partial(_maxima, recipe, folder, dataset, progress),
        sweep=partial(_tune_sweep, recipe, folder, dataset, progress),
        scored=scored_indices(recipe, dataset.classes),
    )


def scored_indices(recipe: Recipe, classes: ClassTable) -> list[int] | None:
    """Class indices of the headline; None = all."""
    names = recipe.data.scored_classes
    return None if names is None else [classes.index(name) for name in names]


def _maxima(recipe: Recipe, folder: Path, dataset: Dataset, progress: Progress) -> Iterator[NDArray[np.float32]]:
    """(H, W) strongest present class of each of the images drawn from those that have tags."""
    tagged = threshold.drawn([sample for sample in dataset if sample.tags])
    for sample in progress.each(tagged, "threshold", total=len(tagged)):
        cam = read_cam(cam_path(folder, dataset.split, sample.id))
        yield cam.cam01(recipe.cam.normalisation).max(axis=0)


def _tune_sweep(recipe: Recipe, folder: Path, dataset: Dataset, progress: Progress) -> Sweep:
    """The sweep over the tune list, the only masks of the training split that a rule may read."""
    truth = open_truth(recipe.data, recipe.data.train, opener="validation_split")
    sweep = Sweep(len(dataset.classes))
    for sample_id in progress.each(truth.ids, "threshold", total=len(truth.ids)):
        cam = read_cam(cam_path(folder, dataset.split, sample_id))
        sweep.add(truth.mask(sample_id, (cam.height, cam.width)), cam.cam01(recipe.cam.normalisation), cam.classes)
    return sweep
