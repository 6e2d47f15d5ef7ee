"""Which channel is largest at each pixel of maps that are interpolated bilinearly to the size of an image.

Interpolation mixes the four cells around a pixel. What is largest in all four is largest between them, too, and what is
nowhere above another channel does not pass it: so only pixels along outlines are computed, of the few channels that
meet there. With 21 smooth maps of a photograph of 12 megapixels that takes a sixth of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weakseg.cam import linear_taps, upsample_one
from weakseg.classes import mask_dtype

STRIP_PIXELS = 2**17  # that are there beside the result
DENSE = 1 / 16  # of squares times channels, those that may win, from which on it is faster to compute all: noise

Axis = tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]


def upsampled_argmax(maps: NDArray[np.float32], height: int, width: int, in_height: int, in_width: int) -> NDArray[Any]:
    """The largest channel of each pixel, of equal ones the lowest; not of those that only rounding makes equal.

    Args:
        maps: (K, h, w) float32, finite, at least two channels. height, width, in_height, in_width: as in
            `weakseg.cam.upsample`, whose values these are, to the last bit.
    Returns:
        (height, width) in `mask_dtype(K - 1)`.
    """
    n_rows, n_columns = maps.shape[1:]
    down, along = linear_taps(n_rows, height, in_height), linear_taps(n_columns, width, in_width)
    largest = maps.argmax(axis=0)
    # A square is named by its first cell; those at the end are cells alone.
    corners = [(i, j) for i in (0, 1) for j in (0, 1)]
    rows, columns = np.arange(n_rows), np.arange(n_columns)
    at = [np.ix_(np.minimum(rows + i, n_rows - 1), np.minimum(columns + j, n_columns - 1)) for i, j in corners]
    winners = [largest[corner] for corner in at]
    mixed: NDArray[np.bool_] = np.any([winner != largest for winner in winners], axis=0)
    labels: NDArray[Any] = _enlarged(largest.astype(mask_dtype(len(maps) - 1)), down[0], along[0])
    if not mixed.any():
        return labels
    may_win = _may_win(maps, at, winners, mixed)
    channels = [int(c) for c in np.union1d(largest, np.flatnonzero(may_win.any(axis=(1, 2))))]
    is_noise = may_win.sum() > DENSE * len(channels) * mixed.size
    n = max(1, STRIP_PIXELS // width)
    for part in (slice(top, top + n) for top in range(0, height, n)):
        if is_noise:
            strip = partial(upsample_one, height=height, width=width, in_height=in_height, in_width=in_width, rows=part)
            argmax_into(labels[part], maps, channels, strip)
        else:
            _compute_mixed(labels[part], maps, may_win, mixed, [tap[part] for tap in down], along)
    return labels


def argmax_into(
    labels: NDArray[Any],
    maps: NDArray[np.float32],
    channels: Sequence[int],
    upsampled: Callable[[NDArray[np.float32]], NDArray[np.float32]],
) -> None:
    """The largest of some channels, in rising order, at each pixel of `labels`; `upsampled` makes maps of that size."""
    first, *others = channels
    labels[:] = first
    best = upsampled(maps[first])
    for channel in others:
        value = upsampled(maps[channel])
        np.copyto(labels, channel, where=value > best)
        np.maximum(best, value, out=best)


def _enlarged(cells: NDArray[Any], rows: NDArray[np.intp], columns: NDArray[np.intp]) -> NDArray[Any]:
    return cells.take(rows, axis=0).take(columns, axis=1)  # in C order, which indices would not keep


def _may_win(
    maps: NDArray[np.float32], at: list[Any], winners: list[NDArray[np.intp]], mixed: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """(K, h, w): whether a channel may be largest somewhere in a square that is mixed.

    It is not if another channel, one that wins a corner, is at least as large at every corner; one of a higher number
    must be larger, as of equal ones the lowest wins.
    """
    squares = np.flatnonzero(mixed)
    cells = [np.ravel_multi_index(np.broadcast_arrays(*corner), mixed.shape).ravel()[squares] for corner in at]
    flat = maps.reshape(len(maps), -1)
    won_by = [winner.ravel()[squares] for winner in winners]
    of_winners = [[flat[winner, cell] for cell in cells] for winner in won_by]
    found = np.zeros((len(maps), mixed.size), np.bool_)
    for c, plane in enumerate(flat):
        values = [plane[cell] for cell in cells]
        beaten = np.zeros(len(squares), np.bool_)
        for winner, its in zip(won_by, of_winners, strict=True):
            above = np.all([v < w for v, w in zip(values, its, strict=True)], axis=0)
            level = np.all([v <= w for v, w in zip(values, its, strict=True)], axis=0)
            beaten |= (winner < c) & level | above
        found[c, squares] = ~beaten
    return found.reshape(maps.shape)


def _compute_mixed(
    labels: NDArray[Any],
    maps: NDArray[np.float32],
    may_win: NDArray[np.bool_],
    mixed: NDArray[np.bool_],
    down: list[NDArray[Any]],
    along: Axis,
) -> None:
    """The pixels of some rows that lie in mixed squares, in place; the steps are those of `upsample_one`."""
    y, x = np.nonzero(_enlarged(mixed, down[0], along[0]))
    if not len(y):
        return
    top, bottom, lower = (tap[y] for tap in down)
    left, right, later = (tap[x] for tap in along)
    n_columns = mixed.shape[1]
    square = top * n_columns + left
    cells = (square, top * n_columns + right, bottom * n_columns + left, bottom * n_columns + right)
    earlier, upper = 1 - later, 1 - lower
    best, won = np.full(len(y), -np.inf, np.float32), np.zeros(len(y), labels.dtype)
    for c in np.flatnonzero(may_win[:, top[0] : top[-1] + 1].any(axis=(1, 2))):
        here = np.flatnonzero(may_win[c].take(square))
        first, second, third, fourth = (maps[c].take(cell.take(here)) for cell in cells)
        before, after = earlier.take(here), later.take(here)
        value = (first * before + second * after) * upper.take(here)
        value += (third * before + fourth * after) * lower.take(here)
        larger = value > best.take(here)
        here = here[larger]
        won[here] = c
        best[here] = value[larger]
    labels[y, x] = won
