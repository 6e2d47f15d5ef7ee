"""From the decoded image to what the network sees. Normalisation and padding are inside the graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from weakseg.errors import ConfigError, DataError, ImageError


@dataclass(frozen=True)
class InputPolicy:
    """What a model takes.

    max_side: longest side in pixels that the network may see.
    policy: what happens to larger images: `fit` scales them down, `refuse` is an error.
    stride: sides that are multiples of it need no padding inside the graph; batches may be formed on that grid.
    """

    max_side: int
    policy: Literal["fit", "refuse"] = "fit"
    stride: int = 32

    def __post_init__(self) -> None:
        if self.max_side < 1 or self.stride < 1:
            raise ConfigError(f"max_side and stride must be at least 1, got {self.max_side} and {self.stride}")
        if self.policy not in ("fit", "refuse"):
            raise ConfigError(f"unknown input policy {self.policy!r}: expected fit or refuse")


def fitted_size(height: int, width: int, policy: InputPolicy) -> tuple[int, int]:
    """(height, width) that the network sees of an image of this size; known from the header, before decoding.

    The long side becomes max_side, the other one is rounded half up and is at least 1; smaller images stay as they are.

    Raises:
        ImageError: IMAGE_TOO_LARGE under the policy `refuse`.
    """
    longest = max(height, width)
    if longest <= policy.max_side:
        return height, width
    if policy.policy == "refuse":
        raise ImageError(
            f"expected an image of at most {policy.max_side} pixels a side, got {width}x{height}: scale it down",
            "IMAGE_TOO_LARGE",
        )
    return _scaled(height, policy.max_side, longest), _scaled(width, policy.max_side, longest)


def prepare(rgb: NDArray[np.uint8], policy: InputPolicy, whole: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Scale an image down by area averaging to `fitted_size`; never up.

    Args:
        rgb: (H, W, 3) uint8.
        whole: (height, width) of the image, where `rgb` was decoded at less; None = those of `rgb`.
    Returns:
        (h, w, 3) uint8, C-contiguous; `rgb` itself where nothing is to be done.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or 0 in rgb.shape:
        raise DataError(f"expected an image (H, W, 3) uint8, got {rgb.shape} {rgb.dtype}: convert it to RGB first")
    height, width = rgb.shape[:2] if whole is None else whole
    size = fitted_size(height, width, policy)
    if size == rgb.shape[:2]:
        return np.ascontiguousarray(rgb)
    return np.asarray(cv2.resize(rgb, (size[1], size[0]), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _scaled(side: int, max_side: int, longest: int) -> int:
    return max(1, (2 * side * max_side + longest) // (2 * longest))
