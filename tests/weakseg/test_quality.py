import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weakseg.errors import DataError
from weakseg.quality import ClassQuality, entropy, mask_quality

NAMES = ("red", "green", "blue")
IGNORE = 255


def uint8(rows):
    return np.array(rows, dtype=np.uint8)


def planes(*values):
    return np.array(values, dtype=np.float32)


def test_figures_of_a_mask_as_fine_as_its_probabilities():
    likely = planes([[0.5, 0.25, 1.0]], [[0.5, 0.75, 0.0]])
    made = mask_quality(uint8([[0, 1, 0]]), NAMES, likely)
    assert made.classes == (ClassQuality(0, "background", 2, 0.75), ClassQuality(1, "red", 1, 0.75))
    assert (made.undecided_px, made.confidence) == (0, 0.75)
    quarter = (0.25 * math.log(4) + 0.75 * math.log(4 / 3)) / math.log(2)
    assert made.entropy == pytest.approx((1 + quarter + 0) / 3)


def test_undecided_pixels_count_for_entropy_alone():
    likely = planes([[0.5, 0.0]], [[0.5, 1.0]])
    made = mask_quality(uint8([[IGNORE, 3]]), NAMES, likely, np.array([0, 3]))
    assert made.classes == (ClassQuality(3, "blue", 1, 1.0),)
    assert (made.undecided_px, made.confidence, made.entropy) == (1, 1.0, 0.5)


def test_a_mask_that_is_undecided_everywhere_has_no_confidence():
    made = mask_quality(uint8([[IGNORE] * 3]), NAMES, np.full((2, 1, 3), 0.5, np.float32))
    assert (made.classes, made.undecided_px, made.confidence, made.entropy) == ((), 3, None, 1.0)


def test_without_probabilities_there_are_areas():
    made = mask_quality(uint8([[0, 2, 2, IGNORE]]), NAMES, None)
    assert made.classes == (ClassQuality(0, "background", 1), ClassQuality(2, "green", 2))
    assert (made.undecided_px, made.confidence, made.entropy) == (1, None, None)


def test_a_cell_counts_as_often_as_pixels_lie_in_it():
    """Five pixels of the network's input are cells of 4 and 1; an image of twice the size has 8 and 2 in them."""
    likely = planes([[0.25, 1.0]], [[0.75, 0.0]])
    made = mask_quality(np.zeros((2, 10), np.uint8), NAMES, likely, in_size=(1, 5), stride=4)
    assert made.classes == (ClassQuality(0, "background", 20, (8 * 0.25 + 2 * 1.0) / 10),)
    assert made.entropy == pytest.approx(0.8 * float(entropy(planes([[0.25]], [[0.75]]))[0, 0]))


def test_many_classes():
    labels = np.array([[300, 65535]], dtype=np.uint16)
    likely = np.zeros((301, 1, 2), np.float32)
    likely[300] = 1
    made = mask_quality(labels, [str(i) for i in range(1, 301)], likely)
    assert (made.classes, made.undecided_px) == ((ClassQuality(300, "300", 1, 1.0),), 1)


def test_entropy_is_0_for_one_and_1_for_all_alike():
    assert entropy(np.eye(3, dtype=np.float32)[..., None]).tolist() == [[0], [0], [0]]
    np.testing.assert_allclose(entropy(np.full((21, 2, 2), 1 / 21, np.float32)), 1, atol=1e-6)


@given(st.integers(2, 5), st.integers(1, 30), st.integers(1, 30), st.integers(1, 3), st.integers(0, 99))
def test_the_parts_make_the_whole(n, in_height, in_width, factor, seed):
    rng = np.random.default_rng(seed)
    likely = rng.dirichlet(np.ones(n), (-(-in_height // 4), -(-in_width // 4))).transpose(2, 0, 1).astype(np.float32)
    labels = rng.integers(0, n, (in_height * factor, in_width * factor), dtype=np.uint8)
    made = mask_quality(labels, "abcd", likely, in_size=(in_height, in_width), stride=4)
    assert sum(one.area_px for one in made.classes) == labels.size
    mean = sum(one.area_px * one.confidence for one in made.classes) / labels.size
    assert made.confidence == pytest.approx(mean)
    rows, columns = (np.arange(side) // (4 * factor) for side in labels.shape)
    assert made.confidence == pytest.approx(float(likely[labels, rows[:, None], columns].mean()), abs=1e-6)
    assert made.entropy == pytest.approx(float(entropy(likely)[rows][:, columns].mean()), abs=1e-5)


def test_the_order_of_the_blocks_does_not_show(monkeypatch):
    rng = np.random.default_rng(0)
    likely, labels = rng.dirichlet(np.ones(3), (20, 30)).transpose(2, 0, 1), rng.integers(0, 3, (20, 30), np.uint8)
    whole = mask_quality(labels, NAMES, likely.astype(np.float32))
    monkeypatch.setattr("weakseg.quality._BLOCK_PX", 70)
    assert mask_quality(labels, NAMES, likely.astype(np.float32)).confidence == pytest.approx(whole.confidence)


def test_probabilities_of_another_size_are_refused():
    with pytest.raises(DataError, match=r"likely must be \(n, 1, 2\)"):
        mask_quality(np.zeros((4, 8), np.uint8), NAMES, np.ones((2, 4, 8), np.float32), stride=4)
