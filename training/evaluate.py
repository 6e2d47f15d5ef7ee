"""Stage `evaluate`: every step of a run against the sealed truth. A figure names its split, tags and threshold rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
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
from weakseg.run_folder import cam_path, mask_path, prediction_path, read_json
from weakseg.scoring import Boundary, Confusion, Sweep, none_if_nan
from weakseg.threshold import Threshold

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


@dataclass(frozen=True)
class Task:
    """What a worker needs to score images of one split."""

    recipe: Recipe
    folder: Path
    split: str
    n_classes: int
    scored: list[int] | None
    t: float
    truth: Truth
    segmentations: tuple[str, ...] = field(default=())

    def tally(self) -> Tally:
        return Tally(Confusion(self.n_classes), Boundary(self.n_classes, self.recipe.evaluate.boundary_px, self.scored))


def run(recipe: Recipe, folder: Path, *, stage: str, progress: Progress) -> dict[str, Any]:
    """Writes evaluate/<what>-<split>.json and predictions under evaluate/<network>/<split>/.

    Without true masks (a user's own photographs) nothing is scored; predictions are still made.
    """
    n_images, headline = 0, {}
    threshold = Threshold.from_dict(read_json(folder / "pseudo_label" / "threshold.json"))
    for split in recipe.evaluate.splits:
        dataset = read(recipe.data, split)
        networks = _predict(recipe, folder, dataset, progress) if split != recipe.data.train else ()
        n_images += len(dataset)
        if not has_truth(recipe.data):
            continue
        records = score_split(recipe, folder, dataset, networks, threshold, progress)
        for what, record in records.items():
            write_json_atomic(folder / stage / f"{what}-{split}.json", record)
            headline[f"{what}-{split}"] = record["miou"]
    return {"n_images": n_images, "miou": headline}


def score_split(
    recipe: Recipe, folder: Path, dataset: Dataset, networks: Sequence[str], threshold: Threshold, progress: Progress
) -> dict[str, dict[str, Any]]:
    """{what: record} of one split; the record's form is in docs/architecture.md."""
    truth = open_truth(recipe.data, dataset.split, opener="scorer")
    scored = scored_indices(recipe, dataset.classes)
    n_classes = len(dataset.classes)
    task = Task(recipe, folder, dataset.split, n_classes, scored, threshold.t, truth, tuple(networks))
    chunks = [dataset.samples[i : i + CHUNK] for i in range(0, len(dataset), CHUNK)]
    tallies: dict[str, Tally] = {}
    sweep = Sweep(n_classes)
    with progress.task(f"score {dataset.split}", total=len(dataset)) as bar:
        for part, histogram, n in map_processes(partial(_score_chunk, task=task), chunks, usable_cpus()):
            sweep.histogram += histogram
            sweep.n_images += n
            for what, tally in part.items():
                tallies.setdefault(what, task.tally()).merge(tally)
            bar.update(n)
    return {what: _record(what, tally, sweep, task, dataset, threshold) for what, tally in tallies.items()}


def _score_chunk(samples: tuple[Sample, ...], *, task: Task) -> tuple[dict[str, Tally], NDArray[np.int64], int]:
    tallies: dict[str, Tally] = {}
    sweep = Sweep(task.n_classes)
    for sample in samples:
        if not task.truth.has(sample.id):
            continue
        truth = task.truth.mask(sample.id)
        for what, labels in _label_maps(sample, truth, sweep, task):
            if labels.shape != truth.shape:
                raise DatasetError(
                    f"{what} of {sample.id} is {labels.shape}, its true mask {truth.shape} (height, width): "
                    "run `weakseg data check`"
                )
            tallies.setdefault(what, task.tally()).add(truth, labels)
    return tallies, sweep.histogram, len(samples)


def _label_maps(sample: Sample, truth: NDArray[Any], sweep: Sweep, task: Task) -> Iterator[tuple[str, NDArray[Any]]]:
    """Every label map that the run has of this image; the CAMs also go into the sweep."""
    config = task.recipe.pseudo_label
    cam = read_cam(cam_path(task.folder, task.split, sample.id))
    cam01 = cam.cam01(task.recipe.cam.normalisation)
    sweep.add(truth, cam01, cam.classes)
    yield "cam", labels_from_cam(cam01, cam.classes, task.t, task.n_classes)
    if config.crf is not None:
        image = read_image(sample.image)
        yield "cam_crf", refined_labels(image, cam01, cam.classes, task.n_classes, [task.t], config.crf)[0]
    yield "pseudo_mask", labels_from_png(mask_path(task.folder, task.split, sample.id).read_bytes())
    for network in task.segmentations:
        yield network, labels_from_png(prediction_path(task.folder, network, task.split, sample.id).read_bytes())


def _record(
    what: str, tally: Tally, sweep: Sweep, task: Task, dataset: Dataset, threshold: Threshold
) -> dict[str, Any]:
    recipe, classes = task.recipe, dataset.classes
    weak = what in ("cam", "cam_crf", "pseudo_mask")  # made with the image's tags and a threshold
    crf = recipe.pseudo_label.crf if what in ("cam_crf", "pseudo_mask") else None
    oracle = sweep.best(task.scored) if what == "cam" else None
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
        "curve": sweep.curve(task.scored) if what == "cam" else None,
        "oracle": None if oracle is None else {"t": oracle[0], "miou": oracle[1]},
    }
    return record | tally.confusion.scores(task.scored).to_dict(classes)


def _predict(recipe: Recipe, folder: Path, dataset: Dataset, progress: Progress) -> tuple[str, ...]:
    """Run the trained segmentation networks without tags; returns the names of those there are."""
    from training.predict_segmentation import NETWORKS, predict  # torch; the scoring workers never load it

    there = [name for name, stage in NETWORKS.items() if (folder / stage / "segmentation.pt").is_file()]
    for name in there:
        path = partial(prediction_path, folder, name, dataset.split)
        predict(recipe, folder / NETWORKS[name] / "segmentation.pt", dataset, path, progress)
    return tuple(there)
