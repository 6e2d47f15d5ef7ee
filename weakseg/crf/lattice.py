"""Our backend: mean field on permutohedral lattices that all sets of unaries and all iterations share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from weakseg.crf import kernels, permutohedral
from weakseg.crf.permutohedral import Filter
from weakseg.crf.unary import unary_from_probabilities
from weakseg.recipe import CrfConfig
from weakseg.stopping import Check

WIDTHS = (1, 2, 4, 8)  # values that are filtered together: what fills a register; kernels exist for these
BYTES_PER_PIXEL = 8 * (6 + 3) + 8 + 24  # tables of both lattices, their mass, the hash table; without values
Array = NDArray[np.float32]


def marginals(image: NDArray[np.uint8], probabilities: NDArray[Any], config: CrfConfig, check: Check) -> Array:
    """(S, K, H, W) from C-contiguous image (H, W, 3) and probabilities (S, K, H, W), K >= 2.

    Only K - 1 of K labels are filtered: the messages to all labels of a pixel add up to `mass`, what the kernels make
    of 1, so the first label's is `mass` less the others' (kernels.softmax).

    Raises DataError when lattices and values would take more than `permutohedral.MEMORY_LIMIT` bytes.
    """
    n_sets, n_labels, height, width = probabilities.shape
    n_pixels = height * width
    if n_pixels * (BYTES_PER_PIXEL + 20 * n_sets * n_labels) > permutohedral.MEMORY_LIMIT:
        raise permutohedral.too_large(n_pixels)
    filters = _filters(image, config)

    unary = unary_from_probabilities(probabilities).reshape(n_sets, n_labels, n_pixels)
    logits = _padded(-unary[:, 1:].reshape(-1, n_pixels))
    n_values = n_sets * (n_labels - 1)
    background = logits[:n_values].reshape(n_sets, n_labels - 1, n_pixels).sum(axis=1) - unary[:, 0]
    q, q_background = logits.copy(), background.copy()
    kernels.softmax(q[:n_values], q_background)

    background += sum((f.mass for f in filters), start=np.zeros(n_pixels, dtype=np.float32))
    messages = np.empty_like(q)
    buffers = [np.empty((2, (f.n_vertices + 1) * WIDTHS[-1]), dtype=np.float32) for f in filters]
    labels = np.zeros((n_sets, n_pixels), dtype=np.float32)
    if config.early_stop:
        kernels.relabel(q[:n_values], q_background, labels)
    for _ in range(config.iterations):
        check()
        messages[:], q_background[:] = logits, background
        for f, buffer in zip(filters, buffers, strict=True):
            _add_filtered(f, q, messages, buffer)
        q, messages = messages, q
        kernels.softmax(q[:n_values], q_background)
        if config.early_stop and not kernels.relabel(q[:n_values], q_background, labels):
            break
    return _joined(q[:n_values], q_background).reshape(probabilities.shape)


def _add_filtered(f: Filter, values: Array, out: Array, buffers: Array) -> None:
    """out (V, N) += w K values, V as `_padded` makes it; buffers (2, (M + 1) * 8) are written over."""
    first = 0
    for width in _widths(len(values)):
        # One block after the other: its vertices stay in the processor's cache from splat to slice.
        block = slice(first, first + width)
        vertices, spare = (flat[: (f.n_vertices + 1) * width].reshape(-1, width) for flat in buffers)
        vertices.fill(0)
        spare[-1] = 0
        kernels.splat(f.dimension, width)(vertices, f.offsets, f.weights, values[block])
        vertices = permutohedral.blurred(vertices, spare, f.neighbours)
        kernels.gather(f.dimension, width)(vertices, f.offsets, f.weights, out[block])
        first += width


def _filters(image: NDArray[np.uint8], config: CrfConfig) -> list[Filter]:
    """The kernels that have a weight."""
    height, width = image.shape[:2]
    filters = []
    if config.gaussian_weight > 0:
        filters.append(permutohedral.gaussian(height, width, config.gaussian_sxy, config.gaussian_weight))
    if config.bilateral_weight > 0:
        widths = config.bilateral_sxy, config.bilateral_srgb
        filters.append(permutohedral.bilateral(image, *widths, config.bilateral_weight))
    return filters


def _padded(values: Array) -> Array:
    """Zeros below values (V, N), so that the blocks of `_widths` cover them."""
    return np.pad(values, ((0, sum(_widths(len(values))) - len(values)), (0, 0)))


def _widths(n_values: int) -> list[int]:
    """Blocks of 8 values; the last has what is left, and may have some to spare."""
    rest = n_values % WIDTHS[-1]
    return [WIDTHS[-1]] * (n_values // WIDTHS[-1]) + [width for width in WIDTHS if width >= rest > width // 2]


def _joined(q: Array, background: Array) -> Array:
    """(S, K, N) from (S (K - 1), N) and (S, N)."""
    n_sets, n_pixels = background.shape
    return np.concatenate([background[:, None], q.reshape(n_sets, -1, n_pixels)], axis=1)
