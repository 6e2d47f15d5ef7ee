"""Polygons with holes as single rings, for formats that know no holes.

A ring goes around the outline, over a bridge to each hole, around the hole the other way, and back over the bridge.
Bridges run from the leftmost point of a hole straight to the left, through the inside of the polygon, to the outline or
to another hole. They are walked once in each direction, so they enclose nothing: by the even-odd rule and by the
nonzero rule the inside is the polygon's. Horizontal edges cross no row of pixels, so that a fill at pixel centres does
not depend on how it rounds. Rasterisers that also draw the line itself (cv2.fillPoly) draw it where the polygon is
anyway.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from weakseg.masks.polygons import Polygon


def one_ring(polygon: Polygon) -> NDArray[np.float64]:
    """(n, 2) x, y, of a polygon as `polygons_from_labels` gives it; it passes twice over bridges and where they begin.

    Where bridges begin is found for all holes at once, by scan lines through their leftmost points.
    """
    if not polygon.holes:
        return polygon.outer.astype(np.float64)
    rings = [polygon.outer, *(_leftmost_first(hole) for hole in polygon.holes)]
    points = np.concatenate(rings).astype(np.float64)
    sizes = np.array([len(ring) for ring in rings])
    starts = np.cumsum(sizes) - sizes
    following = np.arange(1, len(points) + 1)
    following[starts + sizes - 1] = starts
    doors = starts[1:]
    edge, bridgeheads = _left_of(points, following, np.repeat(np.arange(len(rings)), sizes), doors)
    # Each hole adds three points: the bridgehead on the way there and on the way back, and the door on the way back.
    n_holes = len(doors)
    there, door_again, back = len(points) + np.arange(3 * n_holes).reshape(3, n_holes)
    after = np.concatenate([following, doors, back, np.zeros(n_holes, np.int64)])
    after[(starts + sizes - 1)[1:]] = door_again
    # Of bridges that begin on one edge, one after the other in its direction; from the last one on as it was.
    order = np.lexsort([np.abs(bridgeheads[:, 1] - points[edge, 1]), edge])
    first = np.diff(edge[order], prepend=-1) != 0
    last = np.append(first[1:], True)
    after[back[order[last]]] = after[edge[order[last]]]
    after[back[order[~last]]] = there[order[~first]]
    after[edge[order[first]]] = there[order[first]]
    ring = np.concatenate([points, bridgeheads, points[doors], bridgeheads])[_walk(after)]
    repeated: NDArray[np.bool_] = (ring == np.roll(ring, 1, axis=0)).all(axis=1)
    return ring[~repeated]


def _leftmost_first(hole: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same ring from its leftmost point on, of several the topmost."""
    return np.roll(hole, -int(np.lexsort([hole[:, 1], hole[:, 0]])[0]), axis=0)


def _left_of(
    points: NDArray[np.float64], following: NDArray[np.int64], ring: NDArray[np.int64], doors: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each door the nearest edge of another ring to its left, as the number of its first point, and where on it."""
    rows, row_of_door = np.unique(points[doors, 1], return_inverse=True)
    (x0, y0), (x1, y1) = points.T, points[following].T
    first = np.searchsorted(rows, np.minimum(y0, y1))
    n_rows = np.where(y0 == y1, 0, np.searchsorted(rows, np.maximum(y0, y1), side="right") - first)
    edge = np.repeat(np.arange(len(points)), n_rows)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(n_rows) - n_rows, n_rows) + first[edge]
    x = x0[edge] + (rows[row] - y0[edge]) / (y1 - y0)[edge] * (x1 - x0)[edge]
    # Crossings and doors in reading order, a door behind what is crossed there.
    n = len(edge)
    order = np.lexsort(
        [np.arange(n + len(doors)) >= n, np.concatenate([x, points[doors, 0]]), np.concatenate([row, row_of_door])]
    )
    is_door = order >= n
    crossings = order[~is_door]
    nearest = np.empty(len(doors), np.int64)
    nearest[order[is_door] - n] = np.cumsum(~is_door)[is_door] - 1
    # A hole's own edges that are not to the right of its door are those that meet in it.
    while (own := ring[edge[crossings[nearest]]] == ring[doors]).any():
        nearest = nearest - own
    nearest = crossings[nearest]
    return edge[nearest], np.stack([x[nearest], points[doors, 1]], axis=1)


def _walk(after: NDArray[np.int64]) -> NDArray[np.int64]:
    """What comes after 0, up to 0."""
    following = after.tolist()
    order, i = [0], following[0]
    while i:
        order.append(i)
        i = following[i]
    return np.array(order)
