"""Our backend: mean field on permutohedral lattices that all sets of unaries and all iterations share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weakseg.crf import kernels, permutohedral
from weakseg.crf.permutohedral import Filter
from weakseg.crf.unary import unary_from_probabilities
from weakseg.recipe import CrfConfig

CHUNK_VALUES = 1 << 15  # a chunk's messages stay in the processor's cache between gather, softmax and splat
BYTES_PER_PIXEL = 8 * (6 + 3) + 8 + 24  # tables of both lattices, their mass, the hash table; without values
Array = NDArray[np.float32]


def marginals(image: NDArray[np.uint8], probabilities: NDArray[Any], config: CrfConfig) -> Array:
    """(S, K, H, W) from C-contiguous image (H, W, 3) and probabilities (S, K, H, W), K >= 2.

    Only K - 1 of K labels are filtered: the messages to all labels of a pixel add up to `mass`, what the kernels make
    of 1, so the first label's is `mass` less the others' (kernels.softmax).

    Raises DataError when lattices and values would take more than `MEMORY_LIMIT` bytes.
    """
    n_sets, n_labels, height, width = probabilities.shape
    n_values, n_pixels = n_sets * (n_labels - 1), height * width
    _check_memory(n_pixels, n_pixels * (BYTES_PER_PIXEL + 16 * n_sets * n_labels))
    filters = _filters(image, config)
    _check_memory(n_pixels, sum(f.n_vertices for f in filters) * 12 * n_values)

    unary = unary_from_probabilities(probabilities)
    logits = -unary[:, 1:].reshape(n_values, n_pixels)
    background = -unary[:, 0].reshape(n_sets, n_pixels)
    background += logits.reshape(n_sets, n_labels - 1, n_pixels).sum(axis=1)
    out = np.empty((n_sets, n_labels, n_pixels), dtype=np.float32)
    messages = [Messages(f, n_values) for f in filters]
    _sweep(messages, False, logits, background, out)
    background += sum((f.mass for f in filters), start=np.zeros(n_pixels, dtype=np.float32))
    labels: NDArray[np.intp] | None = None
    for i in range(config.iterations):
        for message in messages:
            message.blur()
        last = i == config.iterations - 1
        _sweep(messages, True, logits, background, out if last or config.early_stop else None)
        if config.early_stop:
            before, labels = labels, out.argmax(axis=1)
            if before is not None and np.array_equal(before, labels):
                break
    return out.reshape(probabilities.shape)


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


def _check_memory(n_pixels: int, n_bytes: int) -> None:
    if n_bytes > permutohedral.MEMORY_LIMIT:
        raise permutohedral.too_large(n_pixels)


class Messages:
    """What one filter carries from pixels to pixels: values on the vertices of its lattice, in blocks (M + 1, width).

    Blocks of 8 values, the last of 1, 2, 4 or 8: widths of registers, and few enough to compile.
    """

    def __init__(self, f: Filter, n_values: int) -> None:
        self.filter = f
        self.widths = block_widths(n_values)
        self.sent, self.received, self.spare = ([f.vertices(width) for width in self.widths] for _ in range(3))

    def blur(self) -> None:
        """What was sent can be received, and nothing is sent."""
        for b in range(len(self.widths)):
            free = self.received[b]
            self.received[b], self.spare[b] = permutohedral.blurred(self.sent[b], self.spare[b], self.filter.neighbours)
            self.sent[b] = free
            free.fill(0)

    def send(self, start: int, values: Array) -> None:
        """Splat values (V, P) of the pixels from `start` on."""
        for b, first, width in self._blocks():
            kernel = kernels.splat(self.filter.dimension, width)
            kernel(self.sent[b], self.filter.offsets, self.filter.weights, start, values[first : first + width])

    def add_received(self, start: int, values: Array) -> None:
        """Slice onto values (V, P) of the pixels from `start` on."""
        for b, first, width in self._blocks():
            kernel = kernels.gather(self.filter.dimension, width)
            kernel(self.received[b], self.filter.offsets, self.filter.weights, start, values[first : first + width])

    def _blocks(self) -> Iterator[tuple[int, int, int]]:
        first = 0
        for b, width in enumerate(self.widths):
            yield b, first, width
            first += width


def block_widths(n_values: int) -> list[int]:
    """How many values each block holds; the last may have some to spare."""
    rest = n_values % 8
    return [8] * (n_values // 8) + [width for width in (1, 2, 4, 8) if width >= rest > width // 2]


def _sweep(messages: list[Messages], receive: bool, logits: Array, background: Array, out: Array | None) -> None:
    """One pass over the pixels: receive, softmax, send; probabilities go to out (S, K, N) when it is given."""
    n_values, n_pixels = logits.shape
    n_sets = len(background)
    size = CHUNK_VALUES // n_values + 16  # no power of two: columns a page apart would share cache lines
    for start in range(0, n_pixels, size):
        chunk = slice(start, start + size)
        first = background[:, chunk].copy()
        padded = np.zeros((sum(block_widths(n_values)), first.shape[1]), dtype=np.float32)
        values = padded[:n_values]
        values[:] = logits[:, chunk]
        if receive:
            for message in messages:
                message.add_received(start, padded)
        kernels.softmax(values, first)
        for message in messages:
            message.send(start, padded)
        if out is not None:
            out[:, 0, chunk] = first
            out[:, 1:, chunk] = values.reshape(n_sets, -1, values.shape[1])
