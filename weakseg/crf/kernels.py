"""The loops of the dense CRF, compiled by numba on first use, without the GIL, in float32.

Innermost loops have a length that the compiler knows (the dimension of the lattice, the width of a block of values, a
chunk of pixels), which is what lets it vectorise them: every kernel exists once per dimension or width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np

from weakseg.crf.simd import blur_row, slice_row, splat_row

CHUNK = 256  # pixels that are computed together
EMPTY = -1  # of a slot of the hash table; keys are >= 0
HASH = -7046029254386353131  # odd, bits well mixed: 2^64 / golden ratio, as int64
LOG2_E = np.float32(1.4426950408889634)


def _jit(function: Callable[..., Any], fastmath: bool = True) -> Any:
    """Compiled on the first call; kept on disk where there is a folder to write to, else in this process only."""
    options = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # no folder for the cache: a read-only file system and no NUMBA_CACHE_DIR
        return numba.njit(function, **options)


@_jit
def _slot(table: Any, key: Any) -> Any:
    """Where the key is, or the empty slot where it belongs; open addressing with linear probing."""
    mask = table.shape[0] - 1
    slot = ((key * np.int64(HASH)) >> np.int64(32)) & mask
    while table[slot] != key and table[slot] != EMPTY:
        slot = (slot + 1) & mask
    return slot


@_jit
def _grown(table: Any, ids: Any) -> Any:
    """The same entries in a table of twice the size."""
    larger = np.full(2 * table.shape[0], EMPTY, np.int64)
    larger_ids = np.empty(2 * table.shape[0], np.uint32)
    for old in range(table.shape[0]):
        if table[old] != EMPTY:
            slot = _slot(larger, table[old])
            larger[slot] = table[old]
            larger_ids[slot] = ids[old]
    return larger, larger_ids


@_jit
def _neighbours(keys: Any, n_vertices: Any, steps: Any, table: Any, ids: Any) -> Any:
    """(d + 1, M, 2) vertices one step down and up each direction; M where there is none."""
    found = np.full((steps.shape[0], n_vertices, 2), n_vertices, np.uint32)
    for j in range(steps.shape[0]):
        for m in range(n_vertices):
            slot = _slot(table, keys[m] + steps[j])
            if table[slot] != EMPTY:
                found[j, m, 0] = ids[slot]
                found[j, ids[slot], 1] = m
    return found


@cache
def build(dimension: int) -> Any:
    """Kernel: (pixels (N, 3) uint8, width, sigmas (d,), scales (d,), strides (d,), base, limit) to a lattice's arrays.

    See `permutohedral`, which prepares them. No vertices at all when there are more than `limit`.

    Many pixels lie on the very face of a simplex, and the side they round to decides which vertices there are: hence
    the order of operations of Krähenbühl's code, which then gives the same lattice, and no fast math.
    """
    d1 = dimension + 1

    def kernel(pixels: Any, width: Any, sigmas: Any, scales: Any, strides: Any, base: Any, limit: Any) -> Any:
        n_pixels = pixels.shape[0]
        offsets = np.empty((n_pixels, d1), np.uint32)
        weights = np.empty((n_pixels, d1), np.float32)
        n_slots = 1
        # At most half of the slots are taken, by a chunk at least; photographs rarely have more vertices than that.
        while n_slots < max(n_pixels, 2 * d1 * CHUNK):
            n_slots *= 2
        table, ids = np.full(n_slots, EMPTY, np.int64), np.empty(n_slots, np.uint32)
        keys = np.empty(n_slots // 2, np.int64)
        n_vertices = 0

        residual = np.empty((d1, CHUNK), np.float32)
        remainder = np.empty((d1, CHUNK), np.float32)
        rank = np.empty((d1, CHUNK), np.int32)
        place = np.zeros((dimension, CHUNK), np.float32)
        above = np.empty(CHUNK, np.float32)
        excess = np.empty(CHUNK, np.int32)
        step, per_step = np.float32(d1), np.float32(1) / np.float32(d1)  # between remainder-0 points on an axis
        by_rank = np.empty(d1, np.float32)
        step_by_rank = np.empty(d1, np.int64)
        steps = np.zeros(d1, np.int64)  # the last coordinate follows from the others: it has no digit in the key
        one_up = np.int64(0)
        for j in range(dimension):
            steps[j] = strides[j] * d1
            one_up += strides[j]

        for start in range(0, n_pixels, CHUNK):
            n = min(CHUNK, n_pixels - start)
            x, y = start % width, start // width
            for p in range(n):
                place[0, p] = np.float32(x)
                place[1, p] = np.float32(y)
                x += 1
                if x == width:
                    x, y = 0, y + 1
            for j in range(2, dimension):
                for p in range(n):
                    place[j, p] = np.float32(pixels[start + p, j - 2])

            # Into the hyperplane sum = 0, coordinate by coordinate from the last.
            for p in range(CHUNK):
                above[p] = 0
                excess[p] = 0
            for j in range(dimension, 0, -1):
                for p in range(CHUNK):
                    scaled = place[j - 1, p] / sigmas[j - 1] * scales[j - 1]
                    residual[j, p] = above[p] - np.float32(j) * scaled
                    above[p] += scaled
            for p in range(CHUNK):
                residual[0, p] = above[p]

            # The nearest remainder-0 point by rounding; ranks order the residuals, the largest first.
            for j in range(d1):
                for p in range(CHUNK):
                    below = np.floor(residual[j, p] * per_step)
                    nearer = np.float32(below * step + step - residual[j, p] < residual[j, p] - below * step)
                    remainder[j, p] = below + nearer
                    excess[p] += np.int32(remainder[j, p])
                    residual[j, p] -= remainder[j, p] * step
                    rank[j, p] = 0
            for i in range(dimension):
                for j in range(i + 1, d1):
                    for p in range(CHUNK):
                        less = np.int32(residual[i, p] < residual[j, p])
                        rank[i, p] += less
                        rank[j, p] += 1 - less
            # Where rounding left the hyperplane, the coordinates with the largest error go back by one step.
            for j in range(d1):
                for p in range(CHUNK):
                    moved = rank[j, p] + excess[p]
                    turn = np.int32(moved < 0) - np.int32(moved > dimension)
                    rank[j, p] = moved + d1 * turn
                    remainder[j, p] += np.float32(turn)
                    residual[j, p] -= np.float32(turn) * step

            for p in range(n):
                key = base
                for j in range(d1):
                    by_rank[rank[j, p]] = residual[j, p] * per_step
                    step_by_rank[rank[j, p]] = steps[j]
                    key += np.int64(remainder[j, p]) * steps[j]
                for r in range(d1):  # the simplex: from the remainder-0 point one coordinate less at a time
                    if r == 0:
                        weights[start + p, r] = by_rank[dimension] + np.float32(1) - by_rank[0]
                    else:
                        weights[start + p, r] = by_rank[dimension - r] - by_rank[d1 - r]
                    slot = _slot(table, key)
                    if table[slot] == EMPTY:
                        table[slot] = key
                        ids[slot] = n_vertices
                        keys[n_vertices] = key
                        n_vertices += 1
                    offsets[start + p, r] = ids[slot]
                    if r < dimension:
                        key += one_up - step_by_rank[dimension - r]

            if n_vertices > limit:
                break
            if 2 * (n_vertices + d1 * CHUNK) > table.shape[0]:  # half full is full
                table, ids = _grown(table, ids)
                keys = np.concatenate((keys, np.empty(keys.shape[0], np.int64)))

        if n_vertices > limit:
            return offsets, weights, np.empty((d1, 0, 2), np.uint32)
        return offsets, weights, _neighbours(keys, n_vertices, steps - one_up, table, ids)

    return _jit(kernel, fastmath=False)


@cache
def splat(dimension: int, width: int) -> Any:
    """Kernel: vertices (M + 1, width) += weights (N, d + 1) x values (width, N)."""

    def kernel(vertices: Any, offsets: Any, weights: Any, values: Any) -> None:
        for pixel in range(values.shape[1]):
            splat_row(dimension, width, vertices, offsets, weights, values, pixel)

    return _jit(kernel)


@cache
def gather(dimension: int, width: int) -> Any:
    """Kernel (the slice of splat, blur, slice): values (width, N) += weights (N, d + 1) x vertices (M + 1, width)."""

    def kernel(vertices: Any, offsets: Any, weights: Any, values: Any) -> None:
        for pixel in range(values.shape[1]):
            slice_row(dimension, width, vertices, offsets, weights, values, pixel)

    return _jit(kernel)


@cache
def blur(width: int) -> Any:
    """Kernel: out (M + 1, width) = vertices with [1/2 1 1/2] along the direction of neighbours (M, 2).

    The last row, the neighbour that is not there, is zero and stays so.
    """

    def kernel(vertices: Any, neighbours: Any, out: Any) -> None:
        for m in range(neighbours.shape[0]):
            blur_row(width, vertices, neighbours, m, out)

    return _jit(kernel)


@_jit
def _exp(x: Any) -> Any:
    """e^x for x <= 0, to 1e-6 of itself; libm's would not be vectorised. 2^fraction is its Taylor polynomial."""
    t = max(x, np.float32(-87)) * LOG2_E
    whole = np.floor(t + np.float32(0.5))
    f = t - whole
    power = np.float32(1.5353362e-4)
    power = power * f + np.float32(1.3398874e-3)
    power = power * f + np.float32(9.6184374e-3)
    power = power * f + np.float32(5.5503325e-2)
    power = power * f + np.float32(2.4022648e-1)
    power = power * f + np.float32(6.9314720e-1)
    power = power * f + np.float32(1)
    return power * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@_jit
def softmax(logits: Any, background: Any) -> None:
    """In place: logits (S * (K - 1), N) of the labels but the first, background (S, N) the first's plus their sum.

    That sum is taken off again: messages to all labels of a pixel add up to a constant, so the first label's message
    is that constant (part of `background`) less the others'. Afterwards both hold probabilities.
    """
    n_sets, n_pixels = background.shape
    n_others = logits.shape[0] // n_sets
    top, total = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for s in range(n_sets):
        labels = range(s * n_others, (s + 1) * n_others)
        for start in range(0, n_pixels, CHUNK):
            n = min(CHUNK, n_pixels - start)
            first = background[s][start : start + n]
            for c in labels:
                other = logits[c][start : start + n]
                for p in range(n):
                    first[p] -= other[p]
            for p in range(n):
                top[p] = first[p]
            for c in labels:
                other = logits[c][start : start + n]
                for p in range(n):
                    top[p] = max(top[p], other[p])
            for p in range(n):
                first[p] = _exp(first[p] - top[p])
                total[p] = first[p]
            for c in labels:
                other = logits[c][start : start + n]
                for p in range(n):
                    other[p] = _exp(other[p] - top[p])
                    total[p] += other[p]
            for p in range(n):
                total[p] = np.float32(1) / total[p]
                first[p] *= total[p]
            for c in labels:
                other = logits[c][start : start + n]
                for p in range(n):
                    other[p] *= total[p]


@_jit
def relabel(q: Any, background: Any, labels: Any) -> Any:
    """Write the most likely label of each pixel to labels (S, N), 0 = background; returns how many changed.

    Labels are float32 as well: lanes of one width are what makes vectors.
    """
    n_sets, n_pixels = background.shape
    n_others = q.shape[0] // n_sets
    n_changed = np.int32(0)
    best, best_label = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for s in range(n_sets):
        for start in range(0, n_pixels, CHUNK):
            n = min(CHUNK, n_pixels - start)
            first = background[s][start : start + n]
            before = labels[s][start : start + n]
            for p in range(n):
                best[p] = first[p]
                best_label[p] = 0
            for c in range(n_others):
                other = q[s * n_others + c][start : start + n]
                for p in range(n):
                    best_label[p] = np.float32(c + 1) if other[p] > best[p] else best_label[p]
                    best[p] = max(best[p], other[p])
            for p in range(n):
                n_changed += np.int32(best_label[p] != before[p])
                before[p] = best_label[p]
    return n_changed
