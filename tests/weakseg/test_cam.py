import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weakseg import cam
from weakseg.classes import BACKGROUND
from weakseg.errors import ConfigError, DataError

sizes = st.integers(1, 40)


def grid(height: int, width: int) -> tuple[int, int]:
    return math.ceil(height / 4), math.ceil(width / 4)


def by_formula(maps: np.ndarray, height: int, width: int, in_height: int, in_width: int) -> np.ndarray:
    """The docstring's equation in float64, one pixel at a time."""
    out = np.empty((len(maps), height, width))
    for y in range(height):
        v = np.clip((y + 0.5) * in_height / (4 * height) - 0.5, 0, maps.shape[1] - 1)
        for x in range(width):
            u = np.clip((x + 0.5) * in_width / (4 * width) - 0.5, 0, maps.shape[2] - 1)
            i, j = int(v), int(u)
            i1, j1 = min(i + 1, maps.shape[1] - 1), min(j + 1, maps.shape[2] - 1)
            top = maps[:, i, j] * (1 - u + j) + maps[:, i, j1] * (u - j)
            bottom = maps[:, i1, j] * (1 - u + j) + maps[:, i1, j1] * (u - j)
            out[:, y, x] = top * (1 - v + i) + bottom * (v - i)
    return out


def test_max_divides_each_map_by_its_own_maximum() -> None:
    maps = np.array([[[0, 2], [4, -1]], [[1, 1], [1, 1]]], dtype=np.float32)
    expected = np.array([[[0, 0.5], [1, 0]], [[1, 1], [1, 1]]])
    np.testing.assert_allclose(cam.normalise(maps), expected, atol=2e-5)


def test_minmax_spans_zero_to_one() -> None:
    maps = np.array([[[1, 2], [3, 5]], [[7, 7], [7, 7]]], dtype=np.float32)
    expected = np.array([[[0, 0.25], [0.5, 1]], [[0, 0], [0, 0]]])
    np.testing.assert_allclose(cam.normalise(maps, "minmax"), expected, atol=2e-5)


@given(
    hnp.arrays(np.float16, st.tuples(st.integers(0, 3), sizes, sizes), elements=st.floats(-8, 8, width=16)),
    st.sampled_from(["max", "minmax"]),
)
def test_normalised_maps_stay_in_range_and_leave_the_input_alone(maps: np.ndarray, method: str) -> None:
    before = maps.copy()
    cam01 = cam.normalise(maps, method)
    assert cam01.dtype == np.float32
    assert cam01.shape == maps.shape
    assert ((cam01 >= 0) & (cam01 <= 1)).all()
    np.testing.assert_array_equal(maps, before)


def test_normalise_refuses_what_it_cannot_read() -> None:
    with pytest.raises(DataError, match="finite"):
        cam.normalise(np.full((1, 2, 2), np.nan))
    with pytest.raises(DataError, match=r"\(K, h, w\)"):
        cam.normalise(np.zeros((2, 2)))
    with pytest.raises(ConfigError, match="expected max or minmax"):
        cam.normalise(np.zeros((1, 2, 2)), "mean")


@given(sizes, sizes, sizes, sizes, st.integers(0, 3), st.integers(0, 99))
@settings(max_examples=40)
def test_upsample_follows_its_formula(height: int, width: int, in_h: int, in_w: int, n: int, seed: int) -> None:
    maps = np.random.default_rng(seed).random((n, *grid(in_h, in_w)), dtype=np.float32)
    expected = by_formula(maps, height, width, in_h, in_w)
    np.testing.assert_allclose(cam.upsample(maps, height, width, in_h, in_w), expected, atol=1e-5)


@given(sizes, sizes)
@settings(max_examples=30)
def test_upsample_without_scaling_follows_the_same_formula(height: int, width: int) -> None:
    maps = np.random.default_rng(0).random((2, *grid(height, width)), dtype=np.float32)
    expected = by_formula(maps, height, width, height, width)
    np.testing.assert_allclose(cam.upsample(maps, height, width), expected, atol=1e-5)


@pytest.mark.parametrize(("height", "in_height"), [(30, 30), (90, 30), (17, 30), (31, 63)])
def test_upsample_puts_positions_where_they_were(height: int, in_height: int) -> None:
    cells = math.ceil(in_height / 4)
    ramp = np.repeat((4 * np.arange(cells) + 1.5)[None, :, None], 2, axis=2)  # each cell holds its centre, in pixels
    out = cam.upsample(ramp, height, 8, in_height, 8)[0, :, 0]
    where = (np.arange(height) + 0.5) * in_height / height - 0.5
    np.testing.assert_allclose(out, where.clip(1.5, 4 * cells - 2.5), atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 4)])
def test_upsample_takes_thin_images(size: tuple[int, int]) -> None:
    maps = np.full((2, *grid(*size)), 0.25, dtype=np.float16)
    np.testing.assert_array_equal(cam.upsample(maps, *size), np.full((2, *size), 0.25))
    np.testing.assert_array_equal(cam.upsample(maps, 7, 9, *size), np.full((2, 7, 9), 0.25))


def test_upsample_takes_many_maps() -> None:
    maps = np.random.default_rng(0).random((600, 2, 2), dtype=np.float32)
    np.testing.assert_array_equal(cam.upsample(maps, 8, 8)[599], cam.upsample(maps[599:], 8, 8)[0])


def test_upsample_refuses_maps_of_another_input() -> None:
    with pytest.raises(DataError, match=r"\(K, 3, 4\) for an input of 12 x 13"):
        cam.upsample(np.zeros((1, 4, 4)), 12, 13)


@pytest.mark.parametrize(
    ("alpha", "t"),
    [(1, 0.5), (2, 0.382), (4, 0.276), (6, 0.222), (8, 0.188), (16, 0.123), (24, 0.094), (32, 0.077)],
)
def test_alpha_and_threshold_match_the_known_table(alpha: float, t: float) -> None:
    assert cam.threshold_from_alpha(alpha) == pytest.approx(t, abs=6e-4)
    assert cam.alpha_from_threshold(cam.threshold_from_alpha(alpha)) == pytest.approx(alpha, rel=1e-9)


@given(st.floats(0.01, 0.99))
def test_alpha_puts_the_background_at_the_threshold(t: float) -> None:
    flat = np.full((1, 1, 1), t, dtype=np.float32)
    assert cam.background_from_alpha(flat, cam.alpha_from_threshold(t))[0, 0] == pytest.approx(t, rel=1e-4)


@pytest.mark.parametrize("t", [0.0, 1.0, -0.1, math.nan])
def test_a_threshold_without_an_alpha_is_refused(t: float) -> None:
    with pytest.raises(ConfigError, match=r"\(0, 1\)"):
        cam.alpha_from_threshold(t)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_an_alpha_without_a_threshold_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match="positive"):
        cam.threshold_from_alpha(alpha)


def test_labels_name_the_strongest_class_and_give_ties_to_background() -> None:
    cam01 = np.array([[[0.2, 0.3, 0.9, 0.5]], [[0.1, 0.2, 0.4, 0.6]]], dtype=np.float32)
    labels = cam.labels_from_cam(cam01, np.array([4, 0]), 0.3, 5)
    assert labels.dtype == np.uint8
    assert labels.tolist() == [[BACKGROUND, BACKGROUND, 5, 1]]


def test_no_class_is_all_background() -> None:
    empty = np.zeros((0, 2, 3), dtype=np.float32)
    assert cam.labels_from_cam(empty, np.array([], dtype=int), 0.3, 300).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert cam.labels_from_cam(empty, np.array([], dtype=int), 0.3, 300).dtype == np.uint16
    assert (cam.background_from_alpha(empty, 4) == 1).all()


def test_labels_refuse_classes_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="one length"):
        cam.labels_from_cam(np.zeros((2, 1, 1), dtype=np.float32), np.array([0]), 0.3, 5)
    with pytest.raises(DataError, match=r"0\.\.4"):
        cam.labels_from_cam(np.zeros((1, 1, 1), dtype=np.float32), np.array([5]), 0.3, 5)


@given(st.integers(0, 99), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_threshold_adds_no_foreground(seed: int, a: float, b: float) -> None:
    cam01 = np.random.default_rng(seed).random((2, 6, 6), dtype=np.float32)
    low, high = (cam.labels_from_cam(cam01, np.array([0, 1]), t, 2) for t in sorted((a, b)))
    assert (low[high != BACKGROUND] == high[high != BACKGROUND]).all()
