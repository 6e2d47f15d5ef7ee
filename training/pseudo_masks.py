"""Label maps that an earlier stage wrote, as what a network learns from."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from weakseg.classes import BACKGROUND, ignore_value
from weakseg.datasets import Dataset, Sample
from weakseg.errors import DataError
from weakseg.files import write_bytes_atomic
from weakseg.masks.png import labels_from_png
from weakseg.progress import Progress
from weakseg.run_folder import mask_path, soft_path

LOWER_BAND = "lower pseudo_label.band (IGNORE where two thresholds disagree), or look at the maps"


@dataclass(frozen=True)
class PseudoMasks:
    """Label maps (H, W) of a split under <folder>/<stage>/, or with `soft` (H, W, 3) of `soft_labels`."""

    folder: Path
    split: str
    stage: str = "pseudo_label"
    soft: bool = False

    def __call__(self, sample: Sample) -> NDArray[np.integer]:
        if self.soft:
            return read_soft(soft_path(self.folder, self.split, sample.id, self.stage))
        return labels_from_png(mask_path(self.folder, self.split, sample.id, self.stage).read_bytes())


def write_soft(path: Path, labels: NDArray[np.integer]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, labels=labels)
    write_bytes_atomic(path, buffer.getvalue())


def read_soft(path: Path) -> NDArray[np.integer]:
    """Raises DataError when the file is missing or damaged."""
    try:
        with np.load(io.BytesIO(path.read_bytes())) as content:
            labels: NDArray[np.integer] = content["labels"]
            return labels
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: expected soft labels that a run wrote, got: {error}") from error


def check_labelled(
    masks: Callable[[Sample], NDArray[np.integer]], dataset: Dataset, progress: Progress, *, advice: str
) -> None:
    """Say which tagged classes, or that background, no mask is sure of: a network learns nothing of them.

    advice: what to set when everything is IGNORE.

    Raises:
        DataError: every pixel of every mask is IGNORE.
    """
    pixels = np.zeros(len(dataset.classes) + 1, dtype=np.int64)
    for sample in progress.each(dataset, "look at pseudo-masks", total=len(dataset)):
        labels = masks(sample)
        labels = labels[..., :2] if labels.ndim == 3 else labels  # the third of soft labels is a share
        known = labels[labels != ignore_value(labels)]
        pixels += np.bincount(known, minlength=len(pixels))
    if not pixels.any():
        raise DataError(
            f"expected pseudo-masks of {dataset.split} with labels to learn from, got IGNORE everywhere: {advice}"
        )
    tagged = {c for sample in dataset for c in sample.tags}
    names = {BACKGROUND: "background"} | {c + 1: dataset.classes.names[c] for c in sorted(tagged)}
    unseen = [name for value, name in names.items() if not pixels[value]]
    if unseen:
        progress.say(
            f"warning: no pseudo-mask of {dataset.split} is sure of {', '.join(unseen)}: the network learns nothing of "
            f"{'it' if len(unseen) == 1 else 'them'}"
        )
