"""Outlines of the regions of a label map, along the edges of its pixels (crack following), all classes at once.

An edge between two pixels of different values belongs to each of them that is no background: it is directed so that
its owner lies at its right hand on the screen. Straight runs of edges are found and linked with NumPy; a plain loop
then puts them in the order of their rings. What bounds it is the number of corners, a few hundred thousand a second;
pixels are only compared with their neighbours (0.3 ms of the 1.2 ms for 500 x 375 pixels with 2,700 corners).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weakseg.classes import BACKGROUND

_RIGHT, _LEFT, _UP, _DOWN = range(4)
_RIGHT_TURN = np.array([_DOWN, _UP, _RIGHT, _LEFT])  # by heading
_LEFT_TURN = np.array([_UP, _DOWN, _LEFT, _RIGHT])


@dataclass(frozen=True, eq=False)
class Outlines:
    """Closed rings around 4-connected regions and around the holes in them.

    corners: (N, 2) int64 x, y of all rings, one after the other; they alternate between horizontal and vertical edges.
    starts: (R,) where in `corners` each ring starts.
    values: (R,) mask value of each ring.
    outer: (R,) the ring of its region's outline; of a ring that is an outline itself, its own number.
    touched: (N,) whether another ring of the same value passes through the corner.
    """

    corners: NDArray[np.int64]
    starts: NDArray[np.int64]
    values: NDArray[np.int64]
    outer: NDArray[np.int64]
    touched: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class _Runs:
    """Straight runs of edges as long as can be, sorted by heading, then grid line, then place on it.

    line: y of horizontal runs, x of vertical ones. start, end: the other coordinate, in the order of the heading.
    """

    heading: NDArray[np.int64]
    line: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    value: NDArray[np.int64]


def outlines_from_labels(labels: NDArray[Any]) -> Outlines:
    """Trace every value but BACKGROUND.

    Regions are 4-connected: pixels that meet only at a corner are two regions. Where a region touches itself at a
    corner, what it encloses is a hole. So no ring passes twice through a point, none cross, and the inside of each
    region is connected: polygons of them are valid in the sense of the OGC's Simple Features.

    Args:
        labels: (H, W) integers >= 0, not all BACKGROUND.
    Returns:
        Rings in reading order of their first top edge. Outlines go clockwise on the screen, so that their shoelace area
        is positive; holes go the other way.
    """
    padded = np.pad(labels, 1, constant_values=BACKGROUND)
    runs = _runs(padded)
    keys = _key(runs.heading, runs.line, runs.start, labels.shape)
    right, turns_right = _next(runs, keys, _RIGHT_TURN, labels.shape)
    left, turns_left = _next(runs, keys, _LEFT_TURN, labels.shape)
    successor = np.where(turns_right, right, left)  # where both are: at its own pixel, so that regions are 4-connected
    order, starts, ring = _cycles(successor)
    # A ring that meets itself is cut in two there. Its ways from a place back to that place never interleave, because
    # rings do not cross, so all cuts can be made at once.
    meets = turns_right & turns_left
    cut = meets & (ring[left] == ring)
    if cut.any():
        order, starts, ring = _cycles(np.where(cut, left, successor))
    horizontal = runs.heading <= _LEFT
    x, y = np.where(horizontal, (runs.start, runs.line), (runs.line, runs.start))
    area = np.add.reduceat(np.where(horizontal, y * (runs.start - runs.end), 0)[order], starts)
    touched = np.zeros(len(order), dtype=bool)
    touched[right[meets]] = True  # `meets` is about a run's end, which is the start of the next
    return Outlines(
        corners=np.stack([x, y], axis=1)[order],
        starts=starts,
        values=runs.value[order[starts]],
        outer=_outer_rings(padded, runs, keys, ring, area > 0),
        touched=touched[order],
    )


def _runs(padded: NDArray[Any]) -> _Runs:
    found = []
    for grid, headings in ((padded, (_RIGHT, _LEFT)), (np.ascontiguousarray(padded.T), (_UP, _DOWN))):
        n_cells = grid.shape[1]
        before, after = grid[:-1].reshape(-1), grid[1:].reshape(-1)
        edges = np.flatnonzero(before != after)
        for heading, owners in zip(headings, (after, before), strict=True):
            values = owners[edges]
            owned = values != BACKGROUND
            place, value = edges[owned], values[owned]
            # The padding has no edges along its own side, so a run never goes on into the next line.
            breaks = np.flatnonzero((np.diff(place) != 1) | (value[1:] != value[:-1]))
            firsts, lasts = np.concatenate([[0], breaks + 1]), np.append(breaks, len(place) - 1)
            line = place[firsts] // n_cells
            low, high = place[firsts] % n_cells - 1, place[lasts] % n_cells
            start, end = (low, high) if heading in (_RIGHT, _DOWN) else (high, low)
            found.append((np.full(len(line), heading), line, start, end, value[firsts].astype(np.int64)))
    return _Runs(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _key(heading: Any, line: NDArray[np.int64], place: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.int64]:
    """One number for a heading and a point, in the order of `_Runs`."""
    height, width = shape
    per_line = np.where(np.asarray(heading) <= _LEFT, width + 1, height + 1)
    key: NDArray[np.int64] = heading * (height + 1) * (width + 1) + line * per_line + place
    return key


def _next(
    runs: _Runs, keys: NDArray[np.int64], turn: NDArray[np.int64], shape: tuple[int, ...]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The run of the same value that starts with this turn where a run ends, and whether there is one."""
    wanted = _key(turn[runs.heading], runs.end, runs.line, shape)
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return index, (keys[index] == wanted) & (runs.value[index] == runs.value)


def _cycles(successor: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Cycles of a permutation: its elements cycle by cycle, where each cycle starts, and each element's cycle."""
    # A plain loop takes 0.1 us an element; pointer doubling in NumPy is no faster.
    after, seen = successor.tolist(), bytearray(len(successor))
    order: list[int] = []
    starts: list[int] = []
    for first in range(len(after)):
        if not seen[first]:
            starts.append(len(order))
            i = first
            while not seen[i]:
                seen[i] = 1
                order.append(i)
                i = after[i]
    elements, begins = np.array(order), np.array(starts)
    cycle = np.empty(len(order), dtype=np.int64)
    cycle[elements] = np.repeat(np.arange(len(begins)), np.diff(np.append(begins, len(order))))
    return elements, begins, cycle


def _outer_rings(
    padded: NDArray[Any], runs: _Runs, keys: NDArray[np.int64], ring: NDArray[np.int64], is_outline: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """For each ring the outline of its region: from a hole's leftmost edge leftwards, through pixels of the region, to
    the next edge. That is the outline's, or it is that of a hole further left, which leads on."""
    outer = np.arange(len(is_outline))
    holes = np.flatnonzero(~is_outline)
    if not len(holes):
        return outer
    downs = np.flatnonzero(runs.heading == _DOWN)  # sorted by x, so that a ring's first is its leftmost
    leftmost = downs[np.unique(ring[downs], return_index=True)[1]][holes]
    x, y = runs.line[leftmost], runs.start[leftmost]
    n_columns = padded.shape[1] - 1
    edges = np.flatnonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    x = edges[np.searchsorted(edges, y * n_columns + x) - 1] % n_columns
    # The run upwards through (x, y): of those on its line, the first that starts below.
    shape = (padded.shape[0] - 2, padded.shape[1] - 2)
    outer[holes] = ring[np.searchsorted(keys, _key(_UP, x, y, shape), side="right")]
    while ((further := outer[outer]) != outer).any():
        outer = further
    return outer
