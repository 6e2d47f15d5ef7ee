"""Augmentation of an image and, jointly, of its label map. NumPy and OpenCV, uint8 throughout."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from weakseg.classes import ignore_value
from weakseg.recipe import OptimConfig

Image = NDArray[np.uint8]
Labels = NDArray[np.integer]


def augment(
    image: Image, labels: Labels | None, config: OptimConfig, fill: tuple[int, int, int], rng: np.random.Generator
) -> tuple[Image, Labels | None]:
    """Random scale, flip, colour jitter and crop to (crop_px, crop_px).

    Args:
        image: (H, W, 3) RGB. labels: (H, W), (H, W, 3) or None, resized by nearest neighbour.
        fill: the colour that becomes zero after normalisation; pads images smaller than the crop.
    """
    image, labels = resize_long_side(image, labels, int(rng.integers(*config.long_side_px, endpoint=True)))
    if config.flip and rng.random() < 0.5:
        image, labels = image[:, ::-1], labels[:, ::-1] if labels is not None else None
    if config.jitter > 0:
        image = jitter_colour(image, config.jitter, rng)
    return crop(image, labels, config.crop_px, fill, rng)


def resize_long_side(image: Image, labels: Labels | None, long_side: int) -> tuple[Image, Labels | None]:
    """Long side to `long_side`, aspect kept, no side below 1."""
    height, width = image.shape[:2]
    scale = long_side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    if labels is not None:
        labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST_EXACT)
    return image, labels


def jitter_colour(image: Image, strength: float, rng: np.random.Generator) -> Image:
    """Brightness, contrast (about the mean) and saturation (about grey), each by a factor in [1 - s, 1 + s]."""
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    x = image.astype(np.float32)
    grey = x @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    mean = float(grey.mean())
    # One linear map per channel: blend with grey, then stretch about the mean, then scale.
    x = saturation * x + (1 - saturation) * grey[..., None]
    x = brightness * (contrast * x + (1 - contrast) * mean)
    return np.clip(x, 0, 255).astype(np.uint8)


def crop(
    image: Image, labels: Labels | None, size: int, fill: tuple[int, int, int], rng: np.random.Generator
) -> tuple[Image, Labels | None]:
    """A random (size, size) window; where the image is smaller, it lies at a random place on a `fill` canvas."""
    height, width = image.shape[:2]
    rows, cols = _overlap(height, size, rng), _overlap(width, size, rng)
    canvas = np.empty((size, size, 3), dtype=np.uint8)
    canvas[:] = fill
    canvas[rows[1], cols[1]] = image[rows[0], cols[0]]
    if labels is None:
        return canvas, None
    label_canvas = np.full((size, size, *labels.shape[2:]), ignore_value(labels), dtype=labels.dtype)
    label_canvas[rows[1], cols[1]] = labels[rows[0], cols[0]]
    return canvas, label_canvas


def _overlap(length: int, size: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """Source and target ranges along one axis."""
    offset = int(rng.integers(0, abs(length - size), endpoint=True))
    common = min(length, size)
    start, place = (offset, 0) if length > size else (0, offset)
    return slice(start, start + common), slice(place, place + common)
