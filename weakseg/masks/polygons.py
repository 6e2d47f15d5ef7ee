"""Label maps as polygons with holes, and back.

Points are x, y in pixels; pixel i covers [i, i + 1), so its centre is i + 0.5.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weakseg.classes import BACKGROUND
from weakseg.errors import DataError, UsageError
from weakseg.masks.outlines import outlines_from_labels
from weakseg.masks.simplify import simplified

MAX_TOLERANCE_PX = 0.5


@dataclass(frozen=True, eq=False)
class Polygon:
    """One part of a class: everything inside `outer` but outside `holes`.

    outer, holes: rings, (n, 2) float32 x, y; the last point joins the first, which is not repeated. Of
        `polygons_from_labels`, `outer` goes clockwise on the screen (positive shoelace area), holes the other way.
    """

    value: int
    outer: NDArray[np.float32]
    holes: tuple[NDArray[np.float32], ...] = ()


def polygons_from_labels(labels: NDArray[Any], tolerance_px: float = 0.0) -> list[Polygon]:
    """Outlines of every value of a label map but background, IGNORE included, by mask value, then in reading order.

    A polygon is a 4-connected part: pixels that meet only at a corner are two. Polygons are valid in the sense of the
    OGC's Simple Features: rings may touch at points, but none cross and none passes twice through a point.

    With a tolerance, slanted edges lose their stairs; corners between sides of 2 pixels and more stay. No point of a
    ring is as far as the tolerance from the edges of the pixels, nor the reverse. A pixel's centre is 0.5 from its
    edges: up to that, which is the most, every centre stays on its side, so that no part vanishes, no rings cross, and
    `labels_from_polygons` gives the very same map. Classes are simplified each by itself: the outlines of neighbours
    may part or overlap by less than a pixel.

    Args:
        labels: (H, W) integers >= 0.
        tolerance_px: 0 = along pixel edges, exactly.
    """
    if not 0 <= tolerance_px <= MAX_TOLERANCE_PX:
        raise UsageError(f"tolerance_px must lie from 0 to {MAX_TOLERANCE_PX}, got {tolerance_px}")
    if not labels.any():
        return []
    outlines = outlines_from_labels(labels)
    points, starts = outlines.corners.astype(np.float64), outlines.starts
    if tolerance_px:
        points, starts = simplified(points, starts, outlines.touched, tolerance_px)
    rings = np.split(points.astype(np.float32), starts[1:])
    values, outer = outlines.values.tolist(), outlines.outer.tolist()
    holes = defaultdict(list)
    for i, of in enumerate(outer):
        if i != of:
            holes[of].append(rings[i])
    outers = sorted((i for i, of in enumerate(outer) if i == of), key=values.__getitem__)
    return [Polygon(values[i], rings[i], tuple(holes[i])) for i in outers]


def labels_from_polygons(
    polygons: Iterable[Polygon], height: int, width: int, dtype: type[np.uint8 | np.uint16] = np.uint8
) -> NDArray[Any]:
    """The label map of polygons: a pixel has a class where its centre is inside; exact for rings along pixel edges.

    Inside means within an odd number of a class's rings, whichever way they go. A centre on an edge belongs to what is
    to the right of it, or below a horizontal one. Where classes overlap, the last wins; what lies beyond the image is
    cut off.

    Raises:
        DataError: a ring that is not (n, 2), finite, n >= 3, or a value that `dtype` does not hold.
    """
    labels = np.full((height, width), BACKGROUND, dtype=dtype)
    for value, parts in groupby(polygons, key=lambda polygon: polygon.value):
        if not 0 <= value <= np.iinfo(dtype).max:
            raise DataError(f"expected class ids up to {np.iinfo(dtype).max}, got a polygon of {value}")
        rings = [np.asarray(ring, dtype=np.float64) for part in parts for ring in (part.outer, *part.holes)]
        _fill(labels, value, rings)
    return labels


def _fill(labels: NDArray[Any], value: int, rings: list[NDArray[np.float64]]) -> None:
    """Set what an odd number of rings encloses, by scan lines through the centres of the rows."""
    for ring in rings:
        if ring.ndim != 2 or ring.shape[1] != 2 or len(ring) < 3 or not np.isfinite(ring).all():
            raise DataError(f"expected a ring of at least 3 finite points x, y, got an array {ring.shape}")
    here = np.concatenate(rings)
    there = np.concatenate([part for ring in rings for part in (ring[1:], ring[:1])])
    (x0, y0), (x1, y1) = here.T, there.T
    upper, lower = np.where(y0 < y1, (y0, y1), (y1, y0))
    # Rows whose centre y + 0.5 lies in [upper, lower), so that a corner counts once and horizontal edges never.
    first, last = (np.clip(np.ceil(y - 0.5), 0, len(labels)).astype(np.int64) for y in (upper, lower))
    n_rows = last - first
    if not n_rows.any():
        return
    edge = np.repeat(np.arange(len(here)), n_rows)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(n_rows) - n_rows, n_rows) + first[edge]
    x = x0[edge] + (row + 0.5 - y0[edge]) * ((x1 - x0) / np.where(y1 == y0, 1, y1 - y0))[edge]
    column = np.clip(np.ceil(x - 0.5), 0, labels.shape[1]).astype(np.int64)
    top, left = row.min(), column.min()
    inside = np.zeros((row.max() + 1 - top, column.max() + 1 - left), dtype=np.uint8)
    np.bitwise_xor.at(inside, (row - top, column - left), 1)
    np.bitwise_xor.accumulate(inside, axis=1, out=inside)
    # The last column holds only ends of spans.
    box = labels[top : top + len(inside), left : left + inside.shape[1] - 1]
    box[inside[:, :-1].astype(bool)] = value
