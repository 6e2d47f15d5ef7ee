from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weakseg import crf
from weakseg.cam import upsample
from weakseg.errors import DataError
from weakseg.recipe import CrfConfig
from weakseg.segmentation import confidence, crf_labels, labels_from_logits, probabilities_from_logits


@given(
    st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(2, 9), st.integers(0, 999), st.booleans()
)
@settings(max_examples=60)
def test_labels_are_the_argmax_of_the_upsampled_logits(
    height: int, width: int, in_height: int, n: int, seed: int, peaked: bool
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, -(-in_height // 4), -(-width // 4))).astype(np.float32)
    logits[0] += 4 if peaked else 0  # most channels win nowhere
    labels = labels_from_logits(logits, height, width, in_height, width)
    np.testing.assert_array_equal(labels, upsample(logits, height, width, in_height, width).argmax(axis=0))


def test_equal_logits_give_the_lowest_channel() -> None:
    logits = np.zeros((4, 2, 2), dtype=np.float32)
    logits[0] = -1
    assert (labels_from_logits(logits, 8, 8) == 1).all()


def test_a_class_may_win_between_cells_where_it_wins_nowhere() -> None:
    logits = np.array([[[5, 0]], [[0, 5]], [[4, 4]]], dtype=np.float32)
    assert 2 in labels_from_logits(logits, 4, 8)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_thin_images(size: tuple[int, int]) -> None:
    logits = np.zeros((3, -(-size[0] // 4), -(-size[1] // 4)), dtype=np.float32)
    logits[2] = 1
    labels = labels_from_logits(logits, *size)
    assert labels.shape == size
    assert (labels == 2).all()


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(1, 40), st.integers(1, 900))
def test_strips_make_the_whole(height: int, width: int, in_height: int, in_width: int, strip_pixels: int) -> None:
    rng = np.random.default_rng(height * 61 + width)
    logits = rng.normal(size=(4, -(-in_height // 4), -(-in_width // 4))).astype(np.float32)
    expected = upsample(logits, height, width, in_height, in_width).argmax(axis=0)
    for dense in (0.0, 1.0):  # everywhere, and along outlines only
        with mock.patch.multiple("weakseg.upsampled_argmax", STRIP_PIXELS=strip_pixels, DENSE=dense):
            labels = labels_from_logits(logits, height, width, in_height, in_width)
        np.testing.assert_array_equal(labels, expected)


def test_many_classes_need_two_bytes() -> None:
    logits = np.zeros((301, 1, 1), dtype=np.float32)
    logits[300] = 1
    labels = labels_from_logits(logits, 2, 2)
    assert labels.dtype == np.uint16
    assert (labels == 300).all()


def test_confidence_is_the_winners_mean_probability() -> None:
    logits = np.log(np.array([[[0.5, 0.1]], [[0.25, 0.7]], [[0.25, 0.2]]]))
    assert confidence(logits) == pytest.approx((0.5 + 0.7) / 2)
    assert confidence(logits + 1000) == pytest.approx(0.6, abs=1e-4)


def test_probabilities_are_a_softmax() -> None:
    likely = np.array([[[0.5, 0.1]], [[0.25, 0.7]], [[0.25, 0.2]]])
    np.testing.assert_allclose(probabilities_from_logits(np.log(likely) + 50), likely, atol=1e-5)


def test_bad_logits_are_refused() -> None:
    with pytest.raises(DataError, match=r"\(C \+ 1, h, w\)"):
        labels_from_logits(np.zeros((1, 3, 2, 2)), 8, 8)
    with pytest.raises(DataError, match="finite"):
        labels_from_logits(np.full((3, 2, 2), np.nan), 8, 8)


def test_crf_moves_the_border_to_the_edge_of_the_image() -> None:
    image = np.zeros((32, 48, 3), dtype=np.uint8)
    image[:, 20:] = 230
    logits = np.full((4, 8, 12), -9, dtype=np.float32)  # channels 2 and 3 are nowhere likely
    logits[0, :, :6], logits[1, :, 6:] = 1, 1  # the border at column 24
    logits[0, :, 6:], logits[1, :, :6] = 0, 0
    config = CrfConfig(bilateral_sxy=20, gaussian_weight=1)
    labels = crf_labels(image, logits, config)
    assert labels.dtype == np.uint8
    assert (labels[:, :19] == 0).all() and (labels[:, 21:] == 1).all()
    assert (labels_from_logits(logits, 32, 48)[:, 21] == 0).all()


def test_crf_of_logits_is_that_of_their_probabilities() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (20, 28, 3), dtype=np.uint8)
    logits = rng.normal(size=(4, 5, 7)).astype(np.float32)
    likely = np.exp(logits) / np.exp(logits).sum(axis=0)
    expected = crf.refine(image, upsample(likely, 20, 28), CrfConfig()).argmax(axis=0)
    np.testing.assert_array_equal(crf_labels(image, logits, CrfConfig()), expected)


def test_crf_of_many_classes_keeps_those_that_win() -> None:
    """Of 301 weak logits none is as likely as a hundredth."""
    logits = np.random.default_rng(0).normal(scale=0.1, size=(301, 4, 5)).astype(np.float32)
    labels = crf_labels(np.zeros((16, 20, 3), np.uint8), logits, CrfConfig(iterations=0))
    assert labels.dtype == np.uint16
    assert set(np.unique(labels)) <= set(np.unique(logits.argmax(axis=0)))


@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 999), st.integers(1, 3))
def test_the_largest_between_cells_is_that_of_all_values_where_many_are_equal(
    n: int, n_values: int, seed: int, times: int
) -> None:
    """Small whole numbers: ties at corners, along edges and in whole squares. What is computed of them is exact."""
    logits = np.random.default_rng(seed).integers(0, n_values, (n, 4, 5)).astype(np.float32)
    height, width = 16 * 2**times, 20 * 2**times
    with mock.patch("weakseg.upsampled_argmax.DENSE", 1.0):
        labels = labels_from_logits(logits, height, width, 16, 20)
    np.testing.assert_array_equal(labels, upsample(logits, height, width, 16, 20).argmax(axis=0))
