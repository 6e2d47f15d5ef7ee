"""Saliency without learning: what no path from the border of the image reaches without a change of colour.

Zhang et al., "Minimum Barrier Salient Object Detection at 80 FPS", ICCV 2015 (their MB+), with sweeps by rows and
columns in place of a raster scan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

SIDE = 128  # pixels of the long side that maps are computed at; longer ones are finer and no better
PASSES = 3  # over rows and columns, in both directions
BORDER = 0.1  # of the short side: how far in the colours of the border are looked at
VARIANCE = 1.0  # Lab units squared that colours of a border differ by at least, in all directions
DETAIL = 9  # pixels: a spot or a hole that no square of this side fits into takes the value of what is around
CENTRE = 0.4  # standard deviation of the prior of photographers, sides of the image being 1
STEEPNESS = 10.0  # of the sigmoid at the end

Field = NDArray[np.float32]
_VIEWS: tuple[Callable[[Field], Field], ...] = (  # in which rows follow one another downwards, to the right, ...
    lambda x: x,
    lambda x: x.swapaxes(1, 2),
    lambda x: x[:, ::-1],
    lambda x: x.swapaxes(1, 2)[:, ::-1],
)


def saliency(image: NDArray[np.uint8]) -> Field:
    """s(g stretched(smoothed(D + U))): D by `barrier_distances`, U by `border_contrast`, s a sigmoid about 1/2,
    g = exp(-r^2 / (2 CENTRE^2)) of the distance r from the centre.

    Args:
        image: (H, W, 3) RGB.
    Returns:
        (H, W) in (0, 1); an image of one colour is all but 0.
    """
    lab = _small_lab(image)
    distance = barrier_distances(np.ascontiguousarray(lab.transpose(2, 0, 1))).sum(axis=0)
    seen = smoothed(_stretched(_stretched(distance) + border_contrast(lab)), DETAIL)
    seen = _stretched(seen * _centredness(*seen.shape))
    steep = 1 / (1 + np.exp(-STEEPNESS * (seen - 0.5)))
    return np.asarray(cv2.resize(steep, image.shape[1::-1], interpolation=cv2.INTER_LINEAR), dtype=np.float32)


def barrier_distances(channels: Field, passes: int = PASSES) -> Field:
    """Of every pixel the least of max(path) - min(path), over paths to the border of the image; or a little more.

    A row knows one path a pixel, its best, and the best of the next row may have begun otherwise. Few passes do: each
    follows a path around as many corners as there are directions.

    Args:
        channels: (K, H, W), each by itself.
    Returns:
        (K, H, W) >= 0; 0 on the border.
    """
    distance = np.full_like(channels, np.inf)
    for edge in (np.s_[:, 0], np.s_[:, -1], np.s_[:, :, 0], np.s_[:, :, -1]):
        distance[edge] = 0
    high, low = channels.copy(), channels.copy()  # of the best path that is known
    for _ in range(passes):
        for view in _VIEWS:
            _sweep(view(channels), view(distance), view(high), view(low))
    return distance


def border_contrast(lab: Field) -> Field:
    """sum_k u_k - max_k u_k,   u_k = |x - m_k| in units of the spread C_k, by its maximum

    m_k, C_k: mean and covariance of the colours along each of the four edges. An edge that an object touches is the one
    that the rest differs from most: the largest is left out.

    Args:
        lab: (H, W, 3).
    Returns:
        (H, W) in [0, 1], by its maximum.
    """
    width = max(1, round(BORDER * min(lab.shape[:2])))
    edges = (lab[:width], lab[-width:], lab[:, :width], lab[:, -width:])
    apart = np.stack([_by_maximum(_mahalanobis(lab, edge.reshape(-1, 3))) for edge in edges])
    return _by_maximum(apart.sum(axis=0) - apart.max(axis=0))


def smoothed(values: Field, side: int) -> Field:
    """What is brighter than its surroundings and narrower than `side` pixels is levelled, then what is darker.

    By reconstruction, so that edges of what stays are as they were.

    Args:
        values: (H, W) in [0, 1].
    Source: Vincent, "Morphological grayscale reconstruction in image analysis", IEEE TIP 1993.
    """
    square = np.ones((side, side), dtype=np.uint8)
    opened = _reconstructed(cv2.erode(values, square), values)
    return 1 - _reconstructed(1 - cv2.dilate(opened, square), 1 - opened)


def _small_lab(image: NDArray[np.uint8]) -> Field:
    """(h, w, 3) CIE Lab, long side SIDE at most."""
    height, width = image.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.float32)
    return np.asarray(cv2.cvtColor(small / 255, cv2.COLOR_RGB2LAB), dtype=np.float32)


def _sweep(channels: Field, distance: Field, high: Field, low: Field) -> None:
    """Each row takes over, in place, the paths of the row before where they are better."""
    for row in range(1, channels.shape[1]):
        highest = np.maximum(high[:, row - 1], channels[:, row])
        lowest = np.minimum(low[:, row - 1], channels[:, row])
        barrier = highest - lowest
        better = barrier < distance[:, row]
        np.copyto(distance[:, row], barrier, where=better)
        np.copyto(high[:, row], highest, where=better)
        np.copyto(low[:, row], lowest, where=better)


def _mahalanobis(lab: Field, of: NDArray[Any]) -> Field:
    """(H, W) distance of each colour from those of (N, 3)."""
    mean = of.mean(axis=0)
    spread = (of - mean).T @ (of - mean) / len(of) + VARIANCE * np.eye(3)
    apart = lab - mean
    squares = np.einsum("hwi,ij,hwj->hw", apart, np.linalg.inv(spread), apart)
    return np.sqrt(np.maximum(squares, 0)).astype(np.float32)


def _reconstructed(marker: Field, mask: Field) -> Field:
    """The marker grown, below the mask, until nothing changes; marker <= mask."""
    grown = np.minimum(cv2.dilate(marker, np.ones((3, 3), dtype=np.uint8)), mask)
    while not np.array_equal(grown, marker):
        marker, grown = grown, np.minimum(cv2.dilate(grown, np.ones((3, 3), dtype=np.uint8)), mask)
    return np.asarray(grown, dtype=np.float32)


def _centredness(height: int, width: int) -> Field:
    y = (np.arange(height, dtype=np.float32)[:, None] + 0.5) / height - 0.5
    x = (np.arange(width, dtype=np.float32)[None] + 0.5) / width - 0.5
    return np.exp(-(x * x + y * y) / np.float32(2 * CENTRE**2))


def _stretched(values: Field) -> Field:
    """Into [0, 1]; values that are all the same become 0."""
    low, high = values.min(), values.max()
    return (values - low) / np.float32(max(high - low, 1e-6))


def _by_maximum(values: Field) -> Field:
    return values / np.float32(max(values.max(), 1e-6))
