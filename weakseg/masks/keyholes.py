"""Polygons with holes as single rings, for formats that know no holes.

A ring goes around the outline, over a bridge to each hole, around the hole the other way, and back over the bridge.
Bridges are walked once in each direction, so they enclose nothing: by the even-odd rule and by the nonzero rule the
inside is the polygon's, wherever a bridge may lie. Rasterisers that also draw the line itself (cv2.fillPoly) draw it;
bridges are short, so that this is little.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from weakseg.masks.polygons import Polygon


def one_ring(polygon: Polygon) -> NDArray[np.float32]:
    """(n, 2) float32 x, y of an outline that goes clockwise on the screen and holes that go the other way."""
    ring = polygon.outer
    for hole in sorted(polygon.holes, key=lambda points: float(points[:, 0].min())):
        start = int(
            hole[:, 0].argmin()
        )  # leftmost: what lies to the left of it is outline, or a hole that is in already
        distance = np.square(ring - hole[start]).sum(axis=1)
        at = int(distance.argmin())
        around = np.roll(hole, -start, axis=0)
        ring = np.concatenate([ring[: at + 1], around, around[:1], ring[at:]])
    return ring
