import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weakseg.cam import upsample
from weakseg.errors import DataError
from weakseg.segmentation import confidence, labels_from_logits


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


def test_bad_logits_are_refused() -> None:
    with pytest.raises(DataError, match=r"\(C \+ 1, h, w\)"):
        labels_from_logits(np.zeros((1, 3, 2, 2)), 8, 8)
    with pytest.raises(DataError, match="finite"):
        labels_from_logits(np.full((3, 2, 2), np.nan), 8, 8)
