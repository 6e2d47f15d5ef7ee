import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from weakseg.errors import ConfigError, DataError, ImageError
from weakseg.preprocess import InputPolicy, fitted_size, prepare

sides = st.integers(1, 6000)


@given(sides, sides, st.integers(1, 2000))
def test_size(height, width, max_side):
    h, w = fitted_size(height, width, InputPolicy(max_side))
    assert 1 <= h <= height
    assert 1 <= w <= width
    assert max(h, w) == min(max_side, max(height, width))
    scale = max(h, w) / max(height, width)
    assert abs(h - height * scale) <= 0.5 or h == 1
    assert abs(w - width * scale) <= 0.5 or w == 1


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_prepare_has_fitted_size_and_never_enlarges(height, width, max_side):
    rgb = np.full((height, width, 3), 77, dtype=np.uint8)
    out = prepare(rgb, InputPolicy(max_side))
    assert out.shape == (*fitted_size(height, width, InputPolicy(max_side)), 3)
    assert (out == 77).all()
    assert out.flags.c_contiguous


def test_small_image_is_untouched():
    rgb = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    np.testing.assert_array_equal(prepare(rgb, InputPolicy(4)), rgb)


def test_halving_averages_areas():
    rgb = np.zeros((2, 4, 3), dtype=np.uint8)
    rgb[0, 0], rgb[1, 1], rgb[0, 2] = 100, 100, 200
    np.testing.assert_array_equal(prepare(rgb, InputPolicy(2))[..., 0], [[50, 50]])


@pytest.mark.parametrize(("shape", "expected"), [((1, 1), (1, 1)), ((1, 5000), (1, 1024)), ((5000, 1), (1024, 1))])
def test_extreme_shapes(shape, expected):
    assert prepare(np.zeros((*shape, 3), np.uint8), InputPolicy(1024)).shape == (*expected, 3)


def test_refuse():
    with pytest.raises(ImageError, match="at most 8 pixels a side, got 9x3") as caught:
        fitted_size(3, 9, InputPolicy(8, "refuse"))
    assert caught.value.reason == "IMAGE_TOO_LARGE"
    assert fitted_size(3, 8, InputPolicy(8, "refuse")) == (3, 8)


def test_other_arrays_are_refused():
    for bad in (
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
    ):
        with pytest.raises(DataError, match=r"\(H, W, 3\) uint8"):
            prepare(bad, InputPolicy(8))


def test_bad_policy():
    with pytest.raises(ConfigError, match="at least 1"):
        InputPolicy(0)
    with pytest.raises(ConfigError, match="fit or refuse"):
        InputPolicy(8, "tile")
