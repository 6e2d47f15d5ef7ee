"""Random fields that textures are made of."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Field = NDArray[Any]  # float32; OpenCV's and NumPy's type hints agree on no more


def fractal_noise(
    rng: np.random.Generator, shape: tuple[int, int], cell: tuple[float, float], octaves: int = 4, gain: float = 0.5
) -> Field:
    """Sum of smoothly interpolated white noise at cell sizes cell / 2^k with weights gain^k.

    Args:
        cell: (y, x) size of the coarsest features in pixels; unequal sizes stretch the texture.
    Returns:
        `shape` float32, mean near 0, most values in [-1, 1].
    Source: value noise in octaves ("fractional Brownian motion"), Ebert et al., Texturing and Modeling, ch. 2.
    """
    height, width = shape
    out = np.zeros(shape, dtype=np.float32)
    weight, total = 1.0, 0.0
    for octave in range(octaves):
        cell_y, cell_x = max(cell[0] / 2**octave, 1.0), max(cell[1] / 2**octave, 1.0)
        grid = (int(np.ceil(height / cell_y)) + 3, int(np.ceil(width / cell_x)) + 3)
        coarse = rng.random(grid, dtype=np.float32) * 2 - 1
        # Cells are cut from a larger grid at a random phase, so that no grid line stands at a fixed place.
        full = cv2.resize(coarse, (round(grid[1] * cell_x), round(grid[0] * cell_y)), interpolation=cv2.INTER_CUBIC)
        top = int(rng.integers(0, max(full.shape[0] - height, 0) + 1))
        left = int(rng.integers(0, max(full.shape[1] - width, 0) + 1))
        out += weight * full[top : top + height, left : left + width]
        total += weight**2
        weight *= gain
    return out * np.float32(1.3 / np.sqrt(total))


def blend(a: Field, b: Field, share: Field) -> Field:
    """a where share is 0, b where it is 1; share (H, W) in [0, 1] against colours (3,) or (H, W, 3)."""
    weight = np.clip(share, 0, 1)[..., None]
    mixed: Field = a * (1 - weight) + b * weight
    return mixed


def colour(rng: np.random.Generator, rgb: tuple[int, int, int], spread: float = 0.06) -> Field:
    """(3,) float32 in [0, 1]: an 8-bit colour with a little variation, mostly of brightness."""
    base = np.asarray(rgb, dtype=np.float32) / 255
    varied = base * (1 + rng.normal(0, spread)) + rng.normal(0, spread / 6, 3)
    return np.clip(varied, 0.02, 0.98).astype(np.float32)
