"""What lies over a photograph: heat of its maps, classes of a label map. (H, W, 4) uint8 RGBA of a given size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from weakseg.cam_file import read_cam
from weakseg.classes import BACKGROUND, ignore_value
from weakseg.datasets import Sample
from weakseg.recipe import Recipe
from weakseg.report.colours import IGNORE_COLOUR
from weakseg.run_folder import cam_path, read_json


def heat(recipe: Recipe, folder: Path, split: str, sample: Sample, size: tuple[int, int]) -> NDArray[np.uint8] | None:
    """The strongest CAM of each pixel, and a line where it crosses the threshold of the pseudo-masks.

    size: (width, height). None where the run has no maps of the image.
    """
    path = cam_path(folder, split, sample.id)
    if not path.is_file():
        return None
    cam01 = read_cam(path).cam01(recipe.cam.normalisation)
    strongest = cam01.max(axis=0) if len(cam01) else np.zeros(cam01.shape[1:], np.float32)
    strongest = np.clip(cv2.resize(strongest, size, interpolation=cv2.INTER_LINEAR), 0, 1)
    colours = cv2.applyColorMap(np.round(strongest * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    alpha = np.round(255 * np.clip(0.25 + 0.75 * strongest, 0, 0.9)).astype(np.uint8)
    rgba: NDArray[np.uint8] = np.dstack([colours, alpha]).astype(np.uint8)
    threshold = folder / "pseudo_label" / "threshold.json"
    if threshold.is_file():
        rgba[outline((strongest > read_json(threshold)["t"]).astype(np.uint8))] = (255, 255, 255, 255)
    return rgba


def overlay(labels: NDArray[Any], colours: dict[int, tuple[int, int, int]], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Classes in their colours, half transparent with a solid outline; background is clear, IGNORE is light grey."""
    labels = np.asarray(cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST), dtype=labels.dtype)
    rgba = np.zeros((*labels.shape, 4), np.uint8)
    for c, colour in colours.items():
        rgba[labels == c + 1] = (*colour, 160)
    rgba[labels == ignore_value(labels)] = (*IGNORE_COLOUR, 150)
    edge = outline(labels) & (labels != BACKGROUND)
    rgba[edge, 3] = 255
    return rgba


def outline(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Pixels that have another label below, above, left or right of them."""
    padded = np.pad(labels, 1, mode="edge")
    centre = padded[1:-1, 1:-1]
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    return np.asarray(np.logical_or.reduce([centre != other for other in neighbours]))
