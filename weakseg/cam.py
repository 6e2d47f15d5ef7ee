"""Class activation maps as arrays: normalise, bring to full size, threshold.

`cam` is >= 0 and unnormalised, `cam01` in [0, 1]; both hold only the K classes that are present, named by `classes`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from weakseg.classes import BACKGROUND, mask_dtype
from weakseg.errors import ConfigError, DataError

MAP_STRIDE = 4  # pixels of the network's input per cell of the maps it returns


def normalise(cam: NDArray[Any], method: Literal["max", "minmax"] = "max", eps: float = 1e-5) -> NDArray[np.float32]:
    """Bring each map into [0, 1] by its own extremes.

    max:    ReLU(m) / (max m + eps)
    minmax: (m - min m - eps) / (max m - min m + eps), 0 where m < min m + eps, with m = ReLU(m)

    Args:
        cam: (K, h, w), any float type, any scale; K = 0 is legal.
    Returns:
        (K, h, w) float32; a map that is constant is 0 under `minmax`.
    Raises:
        DataError: another shape, no cell, or a value that is not finite.
    Source: AffinityNet, Ahn & Kwak 2018 (`max`); SEAM, Wang et al. 2020, inference (`minmax`).
    """
    cam = _maps(cam, "cam")
    if not np.isfinite(cam).all():
        raise DataError("cam must be finite, got NaN or infinity: the network or its input is damaged")
    cam = np.maximum(cam, 0)
    high = cam.max(axis=(1, 2), keepdims=True)
    if method == "max":
        return np.asarray(cam / (high + np.float32(eps)))
    if method == "minmax":
        low = cam.min(axis=(1, 2), keepdims=True)
        return np.asarray(np.maximum((cam - low - np.float32(eps)) / (high - low + np.float32(eps)), 0))
    raise ConfigError(f"unknown normalisation {method!r}: expected max or minmax")


def upsample(
    maps: NDArray[Any], height: int, width: int, in_height: int | None = None, in_width: int | None = None
) -> NDArray[np.float32]:
    """Bilinear maps at the pixels of an image, from maps at stride 4 of what the network saw.

    Cell j is centred at pixel 4 j + 1.5 of the network's input; pixel y of the image is at (y + 0.5) in_height / height
    - 0.5 of that input. Both together: y lies at cell (y + 0.5) in_height / (4 height) - 0.5. Beyond the outermost cell
    centres the outermost value holds.

    Args:
        maps: (K, ceil(in_height / 4), ceil(in_width / 4)) float; K = 0 is legal.
        height, width: size of the image that the maps are wanted for.
        in_height, in_width: size of the network's input without padding, where the image was scaled; None = the same.
    Returns:
        (K, height, width) float32, each value within the range of its map.
    Raises:
        DataError: the maps are not of that size.
    """
    in_height, in_width = in_height or height, in_width or width
    maps = _maps(maps, "maps")
    check_cells(maps, in_height, in_width)
    out = np.empty((len(maps), height, width), dtype=np.float32)
    for k in range(len(maps)):
        out[k] = upsample_one(maps[k], height, width, in_height, in_width)
    return out


def check_cells(maps: NDArray[Any], in_height: int, in_width: int) -> None:
    """Raises DataError for maps (K, h, w) that are not those of an input of this size."""
    expected = (math.ceil(in_height / MAP_STRIDE), math.ceil(in_width / MAP_STRIDE))
    if maps.shape[1:] != expected:
        raise DataError(
            f"maps must be (K, {expected[0]}, {expected[1]}) for an input of {in_height} x {in_width}, "
            f"got {maps.shape}: give the size that the network saw, without its padding"
        )


def upsample_one(
    cells: NDArray[np.float32],
    height: int,
    width: int,
    in_height: int,
    in_width: int,
    rows: slice = slice(None),
) -> NDArray[np.float32]:
    """`upsample` of one map (h, w) whose size has been checked, or some rows of it, the same as in the whole."""
    if (height, width) == (in_height, in_width):
        # A plain resize by 4 has the same grid and is some ten times faster; the last cell may reach past the image.
        grown = cv2.resize(
            cells, (cells.shape[1] * MAP_STRIDE, cells.shape[0] * MAP_STRIDE), interpolation=cv2.INTER_LINEAR
        )
        return np.asarray(grown[:height, :width][rows], dtype=np.float32)
    # cv2.resize derives its scale from the two sizes, which cannot express a cropped last cell.
    top, bottom, down = (taps[rows] for taps in linear_taps(cells.shape[0], height, in_height))
    cells = cells[top[0] : bottom[-1] + 1]
    left, right, along = linear_taps(cells.shape[1], width, in_width)
    wide = cells[:, left] * (1 - along) + cells[:, right] * along
    out: NDArray[np.float32] = wide[top - top[0]]
    out *= (1 - down)[:, None]
    lower = wide[bottom - top[0]]
    lower *= down[:, None]
    out += lower
    return out


def background_from_alpha(cam01: NDArray[np.float32], alpha: float) -> NDArray[np.float32]:
    """(H, W) background probability (1 - max_c cam01)^alpha from (K, H, W); all ones when K = 0."""
    if not len(cam01):
        return np.ones(cam01.shape[1:], dtype=np.float32)
    return np.asarray(np.clip(1 - cam01.max(axis=0), 0, 1) ** np.float32(alpha))


def alpha_from_threshold(t: float) -> float:
    """The alpha whose background (1 - m)^alpha equals m at m = t: ln t / ln(1 - t); t in (0, 1)."""
    if not 0 < t < 1:
        raise ConfigError(f"a threshold must lie in (0, 1) to have an alpha, got {t}: choose a value between")
    return math.log(t) / math.log1p(-t)


def threshold_from_alpha(alpha: float) -> float:
    """The m in (0, 1) with (1 - m)^alpha = m, found by bisection to 1e-12; alpha > 0."""
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ConfigError(f"alpha must be positive and finite, got {alpha}: 1 to 32 are usual")
    low, high = 0.0, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        # (1 - m)^alpha falls and m rises, so the left side is larger below the solution.
        low, high = (middle, high) if (1 - middle) ** alpha > middle else (low, middle)
    return (low + high) / 2


def labels_from_cam(
    cam01: NDArray[np.float32], classes: NDArray[Any], threshold: float, n_classes: int
) -> NDArray[Any]:
    """The strongest class of each pixel, background where it is not above a constant threshold.

    Args:
        cam01: (K, H, W) in [0, 1].
        classes: (K,) class indices of the maps, K = 0 is legal.
        threshold: compared in float32; background where max <= threshold. Equal classes: the first of `classes`.
    Returns:
        (H, W) label map in `mask_dtype(n_classes)`; all background when K = 0.
    """
    values = mask_values(classes, n_classes)
    if len(values) != len(cam01):
        raise DataError(f"cam01 and classes must have one length, got {len(cam01)} and {len(values)}")
    if not len(values):
        return np.full(cam01.shape[1:], BACKGROUND, dtype=mask_dtype(n_classes))
    strongest = cam01.max(axis=0)
    labels: NDArray[Any] = values[cam01.argmax(axis=0)]
    labels[~(strongest > np.float32(threshold))] = BACKGROUND
    return labels


def mask_values(classes: NDArray[Any], n_classes: int) -> NDArray[Any]:
    """(K,) mask values of class indices, in the dtype of a label map; DataError for an index out of range."""
    classes = np.asarray(classes, dtype=np.int64).reshape(-1)
    if len(classes) and not 0 <= classes.min() <= classes.max() < n_classes:
        raise DataError(f"class indices must lie in 0..{n_classes - 1}, got {classes.min()}..{classes.max()}")
    return (classes + 1).astype(mask_dtype(n_classes))


def _maps(maps: NDArray[Any], name: str) -> NDArray[np.float32]:
    if maps.ndim != 3 or 0 in maps.shape[1:]:
        raise DataError(f"{name} must be (K, h, w) with at least one cell, got {maps.shape}: add the class axis")
    return np.ascontiguousarray(maps, dtype=np.float32)


def linear_taps(
    n_cells: int, size: int, in_size: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """First cell, second cell and weight of the second, for every pixel along one axis."""
    at = (np.arange(size) + 0.5) * (in_size / (MAP_STRIDE * size)) - 0.5
    at = at.clip(0, n_cells - 1)
    first = np.floor(at).astype(np.intp)
    return first, np.minimum(first + 1, n_cells - 1), (at - first).astype(np.float32)
