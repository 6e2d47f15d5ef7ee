import cv2
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image, ImageDraw

from weakseg.errors import DataError, UsageError
from weakseg.masks.polygons import Polygon, labels_from_polygons, polygons_from_labels

shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12)
label_maps = hnp.arrays(np.uint8, shapes, elements=st.sampled_from([0, 0, 1, 1, 2, 7, 255]))
masks = hnp.arrays(np.uint8, shapes, elements=st.integers(0, 1))
tolerances = st.floats(0, 0.5) | st.just(0.5)


def map_of(*rows):
    """A label map drawn in characters: '.' is background."""
    return np.array([[0 if c == "." else int(c) for c in row] for row in rows], dtype=np.uint8)


def rings_of(polygons):
    return [ring for polygon in polygons for ring in (polygon.outer, *polygon.holes)]


def n_points(polygons):
    return sum(map(len, rings_of(polygons)))


def area_of(ring):
    """Shoelace; positive for rings that go clockwise on the screen, where y points down."""
    (x, y), (x1, y1) = ring.astype(float).T, np.roll(ring, -1, axis=0).astype(float).T
    return (x * y1 - x1 * y).sum() / 2


def ellipses(seed, shape=(120, 160)):
    """Overlapping turned ellipses of five classes."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    for _ in range(12):
        centre, axes = rng.integers([0, 0], shape[::-1]).tolist(), rng.integers(3, 30, 2).tolist()
        cv2.ellipse(labels, centre, axes, int(rng.integers(180)), 0, 360, int(rng.integers(6)), -1)
    return labels


# Closed forms ---------------------------------------------------------------------------------------------------------


def test_a_rectangle_is_its_four_corners():
    labels = map_of("....", ".333", ".333", "....")
    (polygon,) = polygons_from_labels(labels)
    assert (polygon.value, polygon.holes) == (3, ())
    np.testing.assert_array_equal(polygon.outer, [[1, 1], [4, 1], [4, 3], [1, 3]])
    assert polygon.outer.dtype == np.float32


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1), (3, 6)])
def test_full_and_empty(shape):
    height, width = shape
    (polygon,) = polygons_from_labels(np.full(shape, 2, np.uint8))
    np.testing.assert_array_equal(polygon.outer, [[0, 0], [width, 0], [width, height], [0, height]])
    assert polygons_from_labels(np.zeros(shape, np.uint8)) == []
    assert not labels_from_polygons([], *shape).any()


def test_a_hole_goes_the_other_way_and_an_island_in_it_is_another_part():
    labels = map_of("11111", "1...1", "1.1.1", "1...1", "11111")
    frame, island = polygons_from_labels(labels)
    assert [area_of(ring) for ring in (frame.outer, *frame.holes, island.outer)] == [25, -9, 1]


def test_a_class_fills_the_hole_of_another():
    one, two = polygons_from_labels(map_of("111", "121", "111"))
    assert (one.value, two.value) == (1, 2)
    assert sorted(one.holes[0].tolist()) == sorted(two.outer.tolist())


def test_pixels_that_meet_at_a_corner_are_two_parts():
    one, two = polygons_from_labels(map_of("1.", ".1"))
    np.testing.assert_array_equal(one.outer, [[0, 0], [1, 0], [1, 1], [0, 1]])
    np.testing.assert_array_equal(two.outer, [[1, 1], [2, 1], [2, 2], [1, 2]])


def test_a_part_that_meets_itself_at_a_corner_has_a_hole_there():
    (polygon,) = polygons_from_labels(map_of("111", "1.1", "11."))
    assert area_of(polygon.outer) == 8 and area_of(polygon.holes[0]) == -1
    assert [2, 2] in polygon.outer.tolist() and [2, 2] in polygon.holes[0].tolist()


def test_holes_in_a_row_belong_to_the_outline_around_them():
    labels = map_of("1111111", "1.1.1.1", "11.1.11", "1111111", ".......", "11111..", "1.1.1..", "11111..")
    assert [len(polygon.holes) for polygon in polygons_from_labels(labels)] == [5, 2]


def test_a_checkerboard_is_as_many_squares():
    labels = (np.indices((6, 7)).sum(axis=0) % 2).astype(np.uint8)
    polygons = polygons_from_labels(labels)
    assert len(polygons) == labels.sum() and all(len(polygon.outer) == 4 for polygon in polygons)


def test_parts_come_by_value_then_in_reading_order():
    labels = map_of("..2.1", "1...2", "..1..")
    polygons = polygons_from_labels(labels)
    assert [polygon.value for polygon in polygons] == [1, 1, 1, 2, 2]
    assert [polygon.outer[0].tolist() for polygon in polygons] == [[4, 0], [0, 1], [2, 2], [2, 0], [4, 1]]


def test_ids_of_16_bits_and_the_ignore_value_are_classes_like_others():
    labels = np.array([[0, 300, 300], [65535, 0, 1]], np.uint16)
    polygons = polygons_from_labels(labels)
    assert [polygon.value for polygon in polygons] == [1, 300, 65535]
    np.testing.assert_array_equal(labels_from_polygons(polygons, 2, 3, np.uint16), labels)


# Along pixel edges ----------------------------------------------------------------------------------------------------


@given(label_maps)
def test_the_map_comes_back(labels):
    before = labels.copy()
    polygons = polygons_from_labels(labels)
    np.testing.assert_array_equal(labels_from_polygons(polygons, *labels.shape), labels)
    np.testing.assert_array_equal(labels, before)
    assert {polygon.value for polygon in polygons} == set(np.unique(labels)) - {0}


@given(label_maps)
def test_corners_alternate_and_areas_add_up(labels):
    polygons = polygons_from_labels(labels)
    for polygon in polygons:
        assert area_of(polygon.outer) > 0 and all(area_of(hole) < 0 for hole in polygon.holes)
    for ring in rings_of(polygons):
        steps = np.roll(ring, -1, axis=0) - ring
        np.testing.assert_array_equal((steps != 0).sum(axis=1), 1)
        assert ((steps[:, 0] == 0) != (np.roll(steps[:, 0], 1) == 0)).all(), "a corner at every point"
    for value in np.unique(labels[labels > 0]):
        rings = rings_of(polygon for polygon in polygons if polygon.value == value)
        assert sum(map(area_of, rings)) == (labels == value).sum()


@given(masks)
def test_parts_and_holes_are_opencvs(mask):
    polygons = polygons_from_labels(mask)
    n_parts, parts = cv2.connectedComponents(mask, connectivity=4)
    assert len(polygons) == n_parts - 1
    for polygon in polygons:
        part = labels_from_polygons([polygon], *mask.shape)
        assert len(np.unique(parts[part > 0])) == 1
        outside = np.pad(1 - part, 1, constant_values=1)
        # Holes that meet at a corner, or meet the outside there, are holes of their own.
        assert len(polygon.holes) == cv2.connectedComponents(outside, connectivity=4)[0] - 2


def by_opencv(polygons, height, width, scale):
    """Filled on a finer grid, as boundaries count as inside for OpenCV, and read next to the pixels' centres."""
    labels = np.zeros((height, width), np.uint8)
    for polygon in polygons:
        canvas = np.zeros((height * scale, width * scale), np.uint8)
        rings = [np.rint(ring * scale).astype(np.int32) for ring in (polygon.outer, *polygon.holes)]
        cv2.fillPoly(canvas, rings, 1)
        labels[canvas[scale // 2 :: scale, scale // 2 :: scale] > 0] = polygon.value
    return labels


def by_pillow(polygons, height, width, scale):
    labels = np.zeros((height, width), np.uint8)
    for polygon in polygons:
        canvas = Image.new("L", (width * scale, height * scale))
        draw = ImageDraw.Draw(canvas)
        draw.polygon((polygon.outer * scale).ravel().tolist(), fill=1)
        for hole in polygon.holes:
            draw.polygon((hole * scale).ravel().tolist(), fill=0)
        labels[np.asarray(canvas)[scale // 2 :: scale, scale // 2 :: scale] > 0] = polygon.value
    return labels


@pytest.mark.parametrize("rasterised", [by_opencv, by_pillow])
@settings(max_examples=50)
@given(labels=label_maps)
def test_other_rasterisers_draw_the_same(rasterised, labels):
    np.testing.assert_array_equal(rasterised(polygons_from_labels(labels), *labels.shape, scale=4), labels)


# With a tolerance -----------------------------------------------------------------------------------------------------


def n_crossings(rings):
    """Pairs of edges that have more in common than a point that is an end of both."""
    a = np.concatenate(rings).astype(float)
    b = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings]).astype(float)

    def side(p, q, r):
        """(N, N): of the points `r` as seen from the lines p, q."""
        (px, py), (dx, dy) = p.T[:, :, None], (q - p).T[:, :, None]
        return np.sign(dx * (r[:, 1] - py) - dy * (r[:, 0] - px))

    def inside(r):
        """(N, N): whether the points `r` lie on the edges, not at their ends."""
        along = ((r - a[:, None]) * (b - a)[:, None]).sum(axis=2)
        return (side(a, b, r) == 0) & (along > 0) & (along < ((b - a) ** 2).sum(axis=1)[:, None])

    proper = (side(a, b, a) * side(a, b, b) < 0) & ((side(a, b, a) * side(a, b, b)).T < 0)
    return int(proper.sum() // 2 + inside(a).sum() + inside(b).sum())


def depart(ring, exact):
    """The most that the corners of `exact` lie off `ring`, and the points of `ring` off `exact`."""

    def most(points, other):
        along = np.roll(other, -1, axis=0) - other
        offset = points[:, None] - other
        place = np.clip((offset * along).sum(axis=2) / (along**2).sum(axis=1), 0, 1)
        return np.hypot(*np.moveaxis(offset - place[..., None] * along, 2, 0)).min(axis=1).max()

    return max(most(ring.astype(float), exact.astype(float)), most(exact.astype(float), ring.astype(float)))


@given(label_maps, tolerances)
def test_the_map_still_comes_back_and_rings_stay_sound(labels, tolerance):
    exact, polygons = polygons_from_labels(labels), polygons_from_labels(labels, tolerance)
    np.testing.assert_array_equal(labels_from_polygons(polygons, *labels.shape), labels)
    assert [(p.value, len(p.holes)) for p in polygons] == [(p.value, len(p.holes)) for p in exact]
    for polygon in polygons:
        assert area_of(polygon.outer) > 0 and all(area_of(hole) < 0 for hole in polygon.holes)
    for ring, edges in zip(rings_of(polygons), rings_of(exact), strict=True):
        assert len(np.unique(ring, axis=0)) == len(ring) >= 3
        assert depart(ring, edges) <= tolerance + 1e-9
    for value in np.unique(labels[labels > 0]):
        assert n_crossings(rings_of(polygon for polygon in polygons if polygon.value == value)) == 0


def test_the_check_for_crossings_sees_them():
    square = np.array([[0, 0], [4, 0], [4, 4], [0, 4]])
    assert n_crossings([square]) == n_crossings([square, square + 4]) == n_crossings([square, square + 9]) == 0
    assert n_crossings([square[[0, 2, 1, 3]]]) == 1
    assert n_crossings([square, square + 1]) == 2
    assert n_crossings([square, square + np.array([4, 1])]) > 0, "a corner on an edge"


def test_rectangles_stay_as_they_are():
    labels = map_of("........", ".222222.", ".222222.", ".22..22.", ".22..22.", ".222222.", ".222222.", ".......3")
    frames = polygons_from_labels(labels, 0.5)[:1], polygons_from_labels(labels)[:1]
    for ring, corners in zip(*map(rings_of, frames), strict=True):
        assert sorted(ring.tolist()) == sorted(corners.tolist())


@pytest.mark.parametrize(("run", "rise"), [(1, 1), (2, 1), (1, 2), (4, 1), (1, 4)])
def test_a_slanted_edge_is_one_line_through_the_middles_of_its_stairs(run, rise):
    ys, xs = np.indices((12 * rise, 12 * run))
    labels = (xs // run <= ys // rise).astype(np.uint8)  # the lower left half
    (polygon,), (exact,) = polygons_from_labels(labels, 0.5), polygons_from_labels(labels)
    assert len(polygon.outer) <= 4 and len(exact.outer) == 26
    assert [run / 2, 0] in polygon.outer.tolist() or [0, rise / 2] in polygon.outer.tolist()
    assert area_of(polygon.outer) == pytest.approx(labels.sum(), rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_round_things_keep_their_area_with_half_of_the_points(seed):
    labels = ellipses(seed)
    exact, polygons = polygons_from_labels(labels), polygons_from_labels(labels, 0.5)
    assert n_points(polygons) < n_points(exact) / 2
    drawn = by_opencv(polygons, *labels.shape, scale=16)
    np.testing.assert_array_equal(labels_from_polygons(polygons, *labels.shape), labels)
    for value in np.unique(labels[labels > 0]):
        here, there = labels == value, drawn == value
        if here.sum() > 64:
            assert (here & there).sum() / (here | there).sum() >= 0.99
            area = sum(area_of(ring) for p in polygons if p.value == value for ring in (p.outer, *p.holes))
            assert area == pytest.approx(here.sum(), rel=0.03)


@pytest.mark.parametrize("tolerance", [-0.1, 0.51, float("nan")])
def test_tolerances_that_cannot_be(tolerance):
    with pytest.raises(UsageError, match="from 0 to 0.5"):
        polygons_from_labels(np.ones((2, 2), np.uint8), tolerance)


# Back, from polygons of others ----------------------------------------------------------------------------------------


def ring(*points):
    return np.array(points, np.float32)


def test_a_pixel_belongs_where_its_centre_is():
    triangle = Polygon(1, ring((0, 0), (4, 0), (0, 4)))
    # The centres on the slanted edge are to its left: not inside.
    np.testing.assert_array_equal(labels_from_polygons([triangle], 4, 4), map_of("111.", "11..", "1...", "...."))
    inner = Polygon(1, ring((0.6, 0.6), (2.4, 0.6), (2.4, 2.4), (0.6, 2.4)))
    np.testing.assert_array_equal(labels_from_polygons([inner], 3, 3), map_of("...", ".1.", "..."))
    assert not labels_from_polygons([Polygon(1, ring((0.1, 0.1), (0.4, 0.1), (0.4, 0.4)))], 2, 2).any()


def test_rings_may_go_either_way_and_begin_anywhere():
    (polygon,) = polygons_from_labels(map_of("1111", "1..1", "1111"))
    turned = Polygon(1, np.roll(polygon.outer, 2, axis=0), (polygon.holes[0][::-1],))
    np.testing.assert_array_equal(labels_from_polygons([turned], 3, 4), map_of("1111", "1..1", "1111"))


def test_of_classes_that_overlap_the_last_wins():
    square = ring((0, 0), (2, 0), (2, 2), (0, 2))
    polygons = [Polygon(1, square), Polygon(2, square + 1)]
    np.testing.assert_array_equal(labels_from_polygons(polygons, 3, 3), map_of("11.", "122", ".22"))
    np.testing.assert_array_equal(labels_from_polygons(polygons[::-1], 3, 3), map_of("11.", "112", ".22"))


def test_what_lies_beyond_the_image_is_cut_off():
    wide = Polygon(1, ring((-9, 1), (99, 1), (99, 2), (-9, 2)))
    np.testing.assert_array_equal(labels_from_polygons([wide], 3, 3), map_of("...", "111", "..."))
    for shift in ((-50, 0), (50, 0), (0, -50), (0, 50)):
        assert not labels_from_polygons([Polygon(1, ring((0, 0), (3, 0), (3, 3)) + ring(shift))], 3, 3).any()


@pytest.mark.parametrize(
    "polygon",
    [
        Polygon(1, ring((0, 0), (1, 1))),
        Polygon(1, ring((0, 0), (1, 1), (0, np.inf))),
        Polygon(1, ring((0, 0), (1, 0), (1, 1)), (np.zeros((3, 3), np.float32),)),
        Polygon(256, ring((0, 0), (1, 0), (1, 1))),
    ],
)
def test_damaged_polygons_are_refused(polygon):
    with pytest.raises(DataError, match="expected"):
        labels_from_polygons([polygon], 2, 2)
