"""Gaussian filtering in high dimensions on the permutohedral lattice: splat, blur, slice.

Source: Adams, Baek & Davis, "Fast high-dimensional filtering using the permutohedral lattice", Eurographics 2010.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from weakseg.crf import kernels
from weakseg.errors import ConfigError, DataError

MAX_KEY = 1 << 62
MEMORY_LIMIT = 2 << 30  # bytes that one call may need for its lattices and values
CACHED_PIXELS = 1 << 20  # lattices of positions alone are kept for images up to this size
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Filter:
    """w K of one kernel, symmetrically normalised: K = diag(n) k diag(n), n = 1 / sqrt(sum_j k_ij), i = j included.

    offsets: (N, d + 1) uint32, the vertices of the simplex that a pixel lies in.
    weights: (N, d + 1) float32, its barycentric coordinates times n sqrt(w): splat and slice use the same.
    neighbours: (d + 1, M, 2) uint32 along each direction; M where there is none.
    mass: (N,) float32, w K 1: what all labels of a pixel receive together.
    """

    offsets: NDArray[np.uint32]
    weights: Array
    neighbours: NDArray[np.uint32]
    mass: Array

    @property
    def dimension(self) -> int:
        return int(self.offsets.shape[1]) - 1

    @property
    def n_vertices(self) -> int:
        return int(self.neighbours.shape[1])


def bilateral(image: NDArray[np.uint8], sxy: float, srgb: float, weight: float) -> Filter:
    """The kernel on (x / sxy, y / sxy, r / srgb, g / srgb, b / srgb) of the pixels of image (H, W, 3)."""
    pixels = np.require(image.reshape(-1, 3), requirements=["W"])  # kernels would be compiled anew for constants
    return _filter(pixels, image.shape[1], (sxy, sxy, srgb, srgb, srgb), weight)


def gaussian(height: int, width: int, sxy: float, weight: float) -> Filter:
    """The kernel on (x / sxy, y / sxy). The same for every image of a size, hence kept for small ones."""
    make = _kept_gaussian if height * width <= CACHED_PIXELS else _gaussian
    return make(height, width, sxy, weight)


def _gaussian(height: int, width: int, sxy: float, weight: float) -> Filter:
    no_colours = np.empty((height * width, 0), dtype=np.uint8)
    return _filter(no_colours, width, (sxy, sxy), weight)


_kept_gaussian = lru_cache(maxsize=8)(_gaussian)


def _filter(pixels: NDArray[np.uint8], width: int, sigmas: tuple[float, ...], weight: float) -> Filter:
    """The lattice of the pixels' features, normalised."""
    d, n_pixels = len(sigmas), len(pixels)
    # So that splat, blur and slice together have the standard deviation 1 along each feature.
    scales = [float(np.float32(math.sqrt(2 / 3) * (d + 1))) / math.sqrt((i + 1) * (i + 2)) for i in range(d)]
    highest = [width - 1, (n_pixels - 1) // width, 255, 255, 255]
    tops = [top / sigma * scale for top, sigma, scale in zip(highest, sigmas, scales, strict=False)]
    strides, base = _digits(tops)
    limit = MEMORY_LIMIT // bytes_per_vertex(d)
    offsets, weights, neighbours = kernels.build(d)(
        pixels, width, np.array(sigmas, np.float32), np.array(scales, np.float32), strides, base, limit
    )
    if not neighbours.shape[1]:
        raise too_large(n_pixels)
    weights *= np.sqrt(weight / (_apply(offsets, weights, neighbours) + 1e-20), dtype=np.float32)[:, None]
    return Filter(offsets, weights, neighbours, _apply(offsets, weights, neighbours))


def blurred(vertices: Array, spare: Array, neighbours: NDArray[np.uint32]) -> Array:
    """The vertices (M + 1, width) after the blur along every direction; in one of the two arrays, both last rows 0."""
    for along in neighbours:
        kernels.blur(vertices.shape[1])(vertices, along, spare)
        vertices, spare = spare, vertices
    return vertices


def _apply(offsets: NDArray[np.uint32], weights: Array, neighbours: NDArray[np.uint32]) -> Array:
    """(N,) the filter of 1."""
    d, n_pixels = offsets.shape[1] - 1, len(offsets)
    vertices = np.zeros((neighbours.shape[1] + 1, 1), dtype=np.float32)
    kernels.splat(d, 1)(vertices, offsets, weights, np.ones((1, n_pixels), dtype=np.float32))
    out = np.zeros((1, n_pixels), dtype=np.float32)
    kernels.gather(d, 1)(blurred(vertices, np.zeros_like(vertices), neighbours), offsets, weights, out)
    total: Array = out[0]
    return total


def _digits(tops: list[float]) -> tuple[NDArray[np.int64], int]:
    """Strides and base of the number that a vertex's first d coordinates are packed into.

    Args:
        tops: largest value of each scaled feature; the smallest is 0.
    Raises:
        ConfigError: the number would not fit.
    """
    d = len(tops)
    margin = 4 * (d + 1)  # from a feature to its simplex, and on to the neighbours of that
    lowest = [-j * tops[j - 1] if j else 0.0 for j in range(d)]
    ranges = [math.ceil(sum(tops[j:]) - lowest[j]) + 2 * margin for j in range(d)]
    if math.prod(ranges) > MAX_KEY:
        raise ConfigError("a width of the CRF is too small for this image: the lattice would have too many places")
    strides = [math.prod(ranges[j + 1 :]) for j in range(d)]
    base = sum((math.ceil(-low) + margin) * stride for low, stride in zip(lowest, strides, strict=True))
    return np.array(strides, dtype=np.int64), base


def bytes_per_vertex(dimension: int) -> int:
    """Of the lattice while it is built: hash table at most four times its entries, keys, neighbours."""
    return 4 * 12 + 2 * 8 + 8 * (dimension + 1)


def too_large(n_pixels: int) -> DataError:
    return DataError(
        f"the dense CRF of {n_pixels / 1e6:.1f} megapixels would need more than {MEMORY_LIMIT >> 20} MiB: "
        "use resolution 'half' (a quarter of that) or a smaller image"
    )
