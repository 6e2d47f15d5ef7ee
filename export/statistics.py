"""What a bundle's manifest says about the training images: for drift alarms, and for deciding presence without tags."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from weakseg.cam_file import read_cam
from weakseg.datasets import Dataset
from weakseg.drift import N_TENTHS, brightness, tenths
from weakseg.image import read_image
from weakseg.manifest import TrainingStatistics
from weakseg.progress import Progress
from weakseg.run_folder import cam_path

MAX_IMAGES = 200  # decoded for the brightness, evenly spaced over the set


def training_scores(dataset: Dataset, folder: Path) -> NDArray[np.float32]:
    """(N, C) scores of the run's cam stage, in the dataset's order."""
    return np.stack([read_cam(cam_path(folder, dataset.split, sample.id)).scores for sample in dataset])


def training_statistics(
    dataset: Dataset, scores: NDArray[np.float32], presence: float, progress: Progress
) -> TrainingStatistics:
    """Statistics of a training split.

    Args:
        scores: (N, C) from `training_scores`.
        presence: from `presence_threshold`.
    """
    tags = np.stack([sample.tag_vector(len(dataset.classes)) for sample in dataset])
    step = max(1, len(dataset) // MAX_IMAGES)
    chosen = dataset.samples[::step]
    grey = [brightness(read_image(sample.image)) for sample in progress.each(chosen, "statistics", total=len(chosen))]
    names = dataset.classes.names
    means = [round(float(scores[tags[:, c], c].mean()), 4) if tags[:, c].any() else None for c in range(len(names))]
    present = (scores >= np.float32(presence)).mean(axis=0)
    confidence = np.bincount(tenths(scores.max(axis=1)), minlength=N_TENTHS) / len(scores)
    return TrainingStatistics(
        n_images=len(dataset),
        class_frequency={name: round(float(tags[:, c].mean()), 4) for c, name in enumerate(names)},
        brightness_mean=round(float(np.mean(grey)), 4),
        brightness_std=round(float(np.std(grey)), 4),
        score_mean=dict(zip(names, means, strict=True)),
        presence_frequency={name: round(float(present[c]), 4) for c, name in enumerate(names)},
        confidence=tuple(round(float(share), 4) for share in confidence),
    )


def presence_threshold(scores: NDArray[np.float32], tags: NDArray[np.bool_]) -> float:
    """The score from which a class counts as present: best micro F1 against the training images' tags.

    F1(t) = 2 TP / (2 TP + FP + FN) over all images and classes, t in 0.05, 0.06 … 0.95; of equal ones the median. No
    mask is seen. 0.5 where no image has a tag.

    Args:
        scores: (N, C) in [0, 1]. tags: (N, C).
    """
    if not tags.any():
        return 0.5
    grid = np.arange(5, 96) / 100
    found = [scores >= np.float32(t) for t in grid]
    f1 = np.array([2 * (hit & tags).sum() / (hit.sum() + tags.sum()) for hit in found])
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    return float(grid[best[len(best) // 2]])
