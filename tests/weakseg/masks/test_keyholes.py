"""Polygons with holes as single rings."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.weakseg.masks.label_maps import SEEDS, random_map, small_maps
from weakseg.masks.keyholes import one_ring
from weakseg.masks.polygons import Polygon, labels_from_polygons, polygons_from_labels

tolerances = st.sampled_from([0, 0.25, 0.5])


def assert_the_inside_is_the_same(labels, tolerance=0.0):
    rings = [Polygon(polygon.value, one_ring(polygon)) for polygon in polygons_from_labels(labels, tolerance)]
    np.testing.assert_array_equal(labels_from_polygons(rings, *labels.shape, labels.dtype), labels)


def area_of(ring):
    (x, y), (x1, y1) = ring.astype(float).T, np.roll(ring, -1, axis=0).astype(float).T
    return (x * y1 - x1 * y).sum() / 2


def bridges(ring):
    """The edges that are also walked the other way."""
    edges = [(*one, *other) for one, other in zip(ring.tolist(), np.roll(ring, -1, axis=0).tolist(), strict=True)]
    return [edge for edge in edges if (*edge[2:], *edge[:2]) in edges]


@given(small_maps, tolerances)
def test_the_inside_is_the_same(labels, tolerance):
    assert_the_inside_is_the_same(labels, tolerance)


@pytest.mark.parametrize("tolerance", [0, 0.5])
def test_the_inside_of_500_maps_is_the_same(tolerance):
    for seed in SEEDS:
        assert_the_inside_is_the_same(random_map(seed, 4), tolerance)


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


@given(small_maps, tolerances)
def test_no_hole_is_lost_and_no_point_is_repeated_at_once(labels, tolerance):
    for polygon in polygons_from_labels(labels, tolerance):
        ring = one_ring(polygon)
        assert area_of(ring) == pytest.approx(sum(map(area_of, (polygon.outer, *polygon.holes))), abs=1e-6)
        assert (ring != np.roll(ring, 1, axis=0)).any(axis=1).all()


@given(small_maps)
def test_bridges_are_horizontal_and_run_through_the_polygon(labels):
    for polygon in polygons_from_labels(labels):
        inside = labels_from_polygons([polygon], *labels.shape) > 0
        for x0, y0, x1, y1 in bridges(one_ring(polygon)):
            assert y0 == y1 and y0 % 1 == 0
            left, right = sorted((int(x0), int(x1)))
            assert inside[int(y0) - 1 : int(y0) + 1, left:right].all(), "on both sides of it"


def test_a_frame_by_hand():
    labels = np.ones((4, 5), np.uint8)
    labels[1:3, 2:4] = 0
    (polygon,) = polygons_from_labels(labels)
    outline, hole = [[0, 0], [5, 0], [5, 4], [0, 4]], [[2, 1], [2, 3], [4, 3], [4, 1]]
    assert one_ring(polygon).tolist() == [*outline, [0, 1], *hole, [2, 1], [0, 1]]


def test_holes_that_meet_at_a_corner_need_no_bridge():
    labels = np.ones((4, 4), np.uint8)
    labels[1, 1] = labels[2, 2] = 0
    (polygon,) = polygons_from_labels(labels)
    assert bridges(one_ring(polygon)) == [(0, 1, 1, 1), (1, 1, 0, 1)]


def test_noise_of_thousands_of_holes():
    labels = (np.random.default_rng(0).random((375, 500)) < 0.9).astype(np.uint8)
    assert max(len(polygon.holes) for polygon in polygons_from_labels(labels)) > 10_000
    assert_the_inside_is_the_same(labels)


def test_a_row_of_a_thousand_holes():
    labels = np.ones((3, 2001), np.uint8)
    labels[1, 1::2] = 0
    assert_the_inside_is_the_same(labels)
