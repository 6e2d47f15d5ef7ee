import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weakseg.drift import LEAST_STD, brightness, psi, psi_of_frequencies, psi_of_normals, tenths

MANY = 10**9  # images: the half that is added to each bin does not show
SHARES = hnp.arrays(float, 5, elements=st.floats(0.01, 1)).map(lambda weights: weights / weights.sum())
STDS = st.floats(LEAST_STD, 1)


def test_brightness_is_the_mean_grey_value():
    assert brightness(np.full((3, 5, 3), 255, np.uint8)) == pytest.approx(1)
    assert brightness(np.zeros((1, 1, 3), np.uint8)) == 0
    red = np.zeros((4, 4, 3), np.uint8)
    red[:2, :, 0] = 255
    assert brightness(red) == pytest.approx(0.299 / 2)


def test_tenths_of_the_ends():
    assert tenths(np.array([0, 0.099, 0.1, 0.95, 1])).tolist() == [0, 0, 1, 9, 9]


def test_psi_of_two_bins():
    expected = (0.75 - 0.25) * np.log(3) + (0.25 - 0.75) * np.log(1 / 3)
    assert psi([0.75, 0.25], MANY, [0.25, 0.75], MANY) == pytest.approx(expected)
    assert psi_of_frequencies([0.75, 0.5], MANY, [0.25, 0.5], MANY) == pytest.approx([expected, 0])


@given(p=SHARES, q=SHARES)
def test_psi_is_symmetric_not_negative_and_zero_of_equals(p, q):
    assert psi(p, 100, q, 100) == pytest.approx(psi(q, 100, p, 100))
    assert psi(p, 100, q, 100) >= 0
    assert psi(p, 100, p, 100) == pytest.approx(0, abs=1e-12)


def test_empty_bins_are_finite_and_matter_less_with_fewer_images():
    few, many = (psi([1, 0], n, [0, 1], n) for n in (10, 1000))
    assert 0 < few < many < np.inf


@given(distance=st.floats(0, 5), std=STDS)
def test_of_equal_deviations_it_is_the_distance_in_deviations_squared(distance, std):
    assert psi_of_normals(0.3, std, 0.3 + distance * std, std) == pytest.approx(distance**2, abs=1e-9)


@given(mean_p=st.floats(0, 1), mean_q=st.floats(0, 1), std_p=STDS, std_q=STDS)
def test_of_normals_it_is_symmetric_and_not_negative(mean_p, mean_q, std_p, std_q):
    there, back = psi_of_normals(mean_p, std_p, mean_q, std_q), psi_of_normals(mean_q, std_q, mean_p, std_p)
    assert there == pytest.approx(back) and there >= -1e-12


def test_of_normals_it_is_that_of_their_bins():
    edges = np.linspace(-8, 8, 4001)
    p, q = (np.exp(-(((edges - mean) / std) ** 2) / 2) for mean, std in ((0, 1), (0.7, 1.3)))
    assert psi_of_normals(0, 1, 0.7, 1.3) == pytest.approx(psi(p / p.sum(), 10**12, q / q.sum(), 10**12), rel=1e-3)


def test_no_deviation_at_all_is_finite():
    assert psi_of_normals(0.5, 0, 0.5, 0) == 0
    assert psi_of_normals(0.5, 0, 0.52, 0) == pytest.approx(1)
