"""Polygons with holes as single rings."""

import cv2
import numpy as np
from hypothesis import given

from tests.weakseg.masks.label_maps import small_maps
from weakseg.masks.keyholes import one_ring
from weakseg.masks.polygons import Polygon, labels_from_polygons, polygons_from_labels


@given(small_maps)
def test_the_inside_is_the_same(labels):
    rings = [Polygon(polygon.value, one_ring(polygon)) for polygon in polygons_from_labels(labels)]
    np.testing.assert_array_equal(labels_from_polygons(rings, *labels.shape), labels)


@given(small_maps)
def test_by_the_nonzero_rule_too(labels):
    """The number of times a ring winds around each pixel's centre."""
    for polygon in polygons_from_labels(labels):
        ring = one_ring(polygon)
        winding = np.zeros(labels.shape, int)
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            for y in range(labels.shape[0]):
                if min(y0, y1) <= y + 0.5 < max(y0, y1):
                    x = x0 + (y + 0.5 - y0) * (x1 - x0) / (y1 - y0)
                    winding[y, np.arange(labels.shape[1]) + 0.5 > x] += 1 if y1 > y0 else -1
        inside = labels_from_polygons([polygon], *labels.shape) > 0
        np.testing.assert_array_equal(winding != 0, inside)


def test_bridges_are_short():
    labels = np.ones((40, 60), np.uint8)
    cv2.circle(labels, (30, 20), 15, 0, -1)
    (polygon,) = polygons_from_labels(labels)
    ring = one_ring(polygon)
    assert len(ring) == len(polygon.outer) + len(polygon.holes[0]) + 2
