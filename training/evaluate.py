"""Stage `evaluate`: every step of a run against the sealed truth. A figure names its split, tags and threshold rule.

What needs no truth is made without it as well: predictions, and what each refiner changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.pseudo_label import scored_indices
from weakseg.cam import labels_from_cam
from weakseg.cam_file import read_cam
from weakseg.cpu import usable_cpus
from weakseg.datasets import Dataset, Sample, read
from weakseg.datasets.truth import Truth, has_truth, open_truth
from weakseg.errors import DatasetError
from weakseg.files import write_json_atomic
from weakseg.image import read_image
from weakseg.masks.png import labels_from_png
from weakseg.parallel import map_processes
from weakseg.progress import Progress
from weakseg.pseudo_mask import refined_labels
from weakseg.recipe import Recipe
from weakseg.refinement import REFINERS, Change, refiner_record
from weakseg.run_folder import cam_path, mask_path, prediction_path, read_json, walked_path
from weakseg.scoring import Boundary, Calibration, Confusion, Sweep, none_if_nan
from weakseg.stages import mask_stage
from weakseg.threshold import Threshold, after_walk, drawn

CHUNK = 16  # images per task of a worker: one summed result travels back for all of them


@dataclass
class Tally:
    """Summed counts of one kind of label map over some images."""

    confusion: Confusion
    boundary: Boundary

    def add(self, truth: NDArray[Any], labels: NDArray[Any]) -> None:
        self.confusion.add(truth, labels)
        self.boundary.add(truth, labels)

    def merge(self, other: Tally) -> None:
        self.confusion.matrix += other.confusion.matrix
        self.confusion.n_images += other.confusion.n_images
        self.boundary.counts += other.boundary.counts


@dataclass
class Counts:
    """Everything that is counted over some images: tallies by `what`, changes by refiner."""

    sweep: Sweep
    calibration: Calibration = field(default_factory=Calibration)
    tallies: dict[str, Tally] = field(default_factory=dict)
    changes: dict[str, Change] = field(default_factory=dict)
    n_images: int = 0

    def merge(self, other: Counts, task: Task) -> None:
        self.sweep.histogram += other.sweep.histogram
        self.sweep.n_images += other.sweep.n_images
        self.calibration.counts += other.calibration.counts
        self.n_images += other.n_images
        for what, tally in other.tallies.items():
            self.tallies.setdefault(what, task.tally()).merge(tally)
        for name, change in other.changes.items():
            self.changes.setdefault(name, Change(task.n_classes)).merge(change)


@dataclass(frozen=True)
class Task:
    """What a worker needs to count over images of one split. truth: None = only what needs none."""

    recipe: Recipe
    folder: Path
    split: str
    n_classes: int
    scored: list[int] | None
    t: float
    truth: Truth | None
    segmentations: tuple[str, ...] = field(default=())

    def tally(self) -> Tally:
        return Tally(Confusion(self.n_classes), Boundary(self.n_classes, self.recipe.evaluate.boundary_px, self.scored))


def run(recipe: Recipe, folder: Path, *, stage: str, progress: Progress) -> dict[str, Any]:
    """Writes evaluate/<what>-<split>.json and predictions under evaluate/<network>/<split>/.

    Without true masks (a user's own photographs) nothing is scored; the rest is still made.
    """
    n_images, headline, warnings = 0, {}, []
    threshold = Threshold.from_dict(read_json(folder / "pseudo_label" / "threshold.json"))
    for split in recipe.evaluate.splits:
        dataset = read(recipe.data, split)
        # The folder may have a network of another recipe, which this one does not train.
        predicted = recipe.train_seg is not None and split != recipe.data.train
        networks = _predict(recipe, folder, dataset, progress) if predicted else ()
        n_images += len(dataset)
        for name, record in score_split(recipe, folder, dataset, networks, threshold, progress).items():
            write_json_atomic(folder / stage / f"{name}-{split}.json", record)
            if record["what"] != "refiner":
                headline[f"{name}-{split}"] = record["miou"]
            elif record["warning"]:
                warnings.append(record["warning"])
    for text in warnings:
        progress.say(f"warning: {text}")
    return {"n_images": n_images, "miou": headline, "warnings": warnings}


def score_split(
    recipe: Recipe, folder: Path, dataset: Dataset, networks: Sequence[str], threshold: Threshold, progress: Progress
) -> dict[str, dict[str, Any]]:
    """{name: record} of one split, in the form of docs/architecture.md; those of refiners are named refiner-<name>.

    Where no image has a true mask there are only those of refiners, from a fixed draw of the images with tags.
    """
    truth = open_truth(recipe.data, dataset.split, opener="scorer") if has_truth(recipe.data) else None
    scored = scored_indices(recipe, dataset.classes)
    task = Task(recipe, folder, dataset.split, len(dataset.classes), scored, threshold.t, truth, tuple(networks))
    counts = Counts(Sweep(task.n_classes)) if truth is None else _count(dataset.samples, task, progress)
    if not counts.tallies:
        counts = _count(drawn([sample for sample in dataset if sample.tags]), replace(task, truth=None), progress)
    records = {what: _record(what, tally, counts, task, dataset, threshold) for what, tally in counts.tallies.items()}
    miou = {what: record["miou"] for what, record in records.items()}
    for refiner in REFINERS:
        if refiner.name in counts.changes:
            change = counts.changes[refiner.name]
            records[f"refiner-{refiner.name}"] = refiner_record(refiner, dataset.split, change, dataset.classes, miou)
    return records


def _count(samples: Sequence[Sample], task: Task, progress: Progress) -> Counts:
    chunks = [samples[i : i + CHUNK] for i in range(0, len(samples), CHUNK)]
    counts = Counts(Sweep(task.n_classes))
    doing = "compare" if task.truth is None else "score"
    with progress.task(f"{doing} {task.split}", total=len(samples)) as bar:
        for part in map_processes(partial(_count_chunk, task=task), chunks, usable_cpus()):
            counts.merge(part, task)
            bar.update(part.n_images)
    return counts


def _count_chunk(samples: Sequence[Sample], *, task: Task) -> Counts:
    counts = Counts(Sweep(task.n_classes), n_images=len(samples))
    for sample in samples:
        if task.truth is not None and not task.truth.has(sample.id):
            continue
        cam = read_cam(cam_path(task.folder, task.split, sample.id))
        cam01 = cam.cam01(task.recipe.cam.normalisation)
        maps = dict(_label_maps(sample, cam01, cam.classes, task))
        if task.truth is not None:
            truth = task.truth.mask(sample.id)
            counts.sweep.add(truth, cam01, cam.classes)
            counts.calibration.add(cam.scores, sample.tags)
            for what, labels in maps.items():
                if labels.shape != truth.shape:
                    raise DatasetError(
                        f"{what} of {sample.id} is {labels.shape}, its true mask {truth.shape} (height, width): "
                        "run `weakseg data check`"
                    )
                counts.tallies.setdefault(what, task.tally()).add(truth, labels)
        for refiner in REFINERS:
            if refiner.after in maps:
                change = counts.changes.setdefault(refiner.name, Change(task.n_classes))
                change.add(maps[refiner.before], maps[refiner.after], sample.tags)
    return counts


def _label_maps(
    sample: Sample, cam01: NDArray[np.float32], classes: NDArray[Any], task: Task
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Every label map that the run has of this image; without truth, those that a refiner reads or makes."""
    config = task.recipe.pseudo_label
    yield "cam", labels_from_cam(cam01, classes, task.t, task.n_classes)
    if config.crf is not None:
        image = read_image(sample.image)
        yield "cam_crf", refined_labels(image, cam01, classes, task.n_classes, [task.t], config.crf)[0]
    if task.recipe.affinity is not None:
        yield "random_walk", labels_from_png(walked_path(task.folder, task.split, sample.id).read_bytes())
    for network in task.segmentations:
        yield network, labels_from_png(prediction_path(task.folder, network, task.split, sample.id).read_bytes())
    if task.truth is None:
        return
    yield (
        "pseudo_mask",
        labels_from_png(mask_path(task.folder, task.split, sample.id, mask_stage(task.recipe)).read_bytes()),
    )


def _record(
    what: str, tally: Tally, counts: Counts, task: Task, dataset: Dataset, threshold: Threshold
) -> dict[str, Any]:
    recipe, classes = task.recipe, dataset.classes
    weak = what in ("cam", "cam_crf", "random_walk", "pseudo_mask")  # made with the image's tags and a threshold
    walk = None if recipe.affinity is None else recipe.affinity.walk
    crf = recipe.pseudo_label.crf if what in ("cam_crf", "pseudo_mask") else None
    if walk is not None and what in ("random_walk", "pseudo_mask"):
        crf, threshold = walk.crf, after_walk(threshold, walk)
    if what in ("segmentation_crf", "segmentation_full_crf"):
        crf = recipe.evaluate.seg_crf
    sweep, calibration = (counts.sweep, counts.calibration) if what == "cam" else (None, None)
    oracle = None if sweep is None else sweep.best(task.scored)
    record = {
        "what": what,
        "split": dataset.split,
        "tags": "given" if weak else "none",
        "threshold": threshold.to_dict() if weak else None,
        "crf": None if crf is None else asdict(crf),
        "scales": list(recipe.cam.scales if weak else recipe.evaluate.seg_scales),
        "flip": recipe.cam.flip if weak else recipe.evaluate.seg_flip,
        "n_images": tally.confusion.n_images,
        "seed": recipe.seed,
        "boundary_f": none_if_nan(tally.boundary.mean()),
        "boundary_px": recipe.evaluate.boundary_px,
        "curve": None if sweep is None else sweep.curve(task.scored),
        "oracle": None if oracle is None else {"t": oracle[0], "miou": oracle[1]},
        "ece": None if calibration is None else none_if_nan(calibration.ece()),
        "brier": None if calibration is None else none_if_nan(calibration.brier()),
    }
    return record | tally.confusion.scores(task.scored).to_dict(classes)


def _predict(recipe: Recipe, folder: Path, dataset: Dataset, progress: Progress) -> tuple[str, ...]:
    """Run the trained segmentation networks without tags; returns the names of what they wrote."""
    from training.predict_segmentation import NETWORKS, predict  # torch; the scoring workers never load it

    there = [name for name, stage in NETWORKS.items() if (folder / stage / "segmentation.pt").is_file()]
    return tuple(what for name in there for what in predict(recipe, folder, name, dataset, progress))
