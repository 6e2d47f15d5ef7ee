"""YOLO's polygons: there and back, and as OpenCV fills them."""

import cv2
import numpy as np
import pytest
from hypothesis import given

from tests.weakseg.masks.label_maps import CLASSES, MANY, SEEDS, random_map, small_maps, without_ignore
from weakseg.errors import DataError, UnknownClassError
from weakseg.masks.yolo import dataset_yaml, labels_from_txt, txt_from_labels


@given(small_maps)
def test_there_and_back(labels):
    text = txt_from_labels(labels, CLASSES)
    np.testing.assert_array_equal(labels_from_txt(text, *labels.shape, CLASSES), without_ignore(labels))


def test_500_maps():
    for seed in SEEDS:
        classes = MANY if seed % 2 else CLASSES
        labels = random_map(seed, len(classes))
        back = labels_from_txt(txt_from_labels(labels, classes), *labels.shape, classes)
        np.testing.assert_array_equal(back, without_ignore(labels))


def test_half_a_pixel_of_tolerance_changes_no_pixel():
    for seed in SEEDS[::5]:
        labels = random_map(seed, 4)
        text = txt_from_labels(labels, CLASSES, tolerance_px=0.5)
        np.testing.assert_array_equal(labels_from_txt(text, *labels.shape, CLASSES), without_ignore(labels))


def test_as_a_rasteriser_that_draws_the_line_fills_it():
    """cv2.fillPoly, with 8 bits of fraction; areas of more than 64 pixels."""
    yy, xx = np.mgrid[:200, :260]
    labels = np.zeros((200, 260), np.uint8)
    labels[np.hypot(yy - 90, xx - 110) < 80] = 1
    labels[np.hypot(yy - 90, xx - 90) < 25] = 0
    labels[np.hypot(yy - 100, xx - 150) < 20] = 2
    masks = {}
    for line in txt_from_labels(labels, CLASSES).splitlines():
        index, *shares = line.split()
        points = np.array(shares, np.float64).reshape(-1, 2) * [260, 200] - 0.5  # OpenCV's pixel i is at i
        mask = masks.setdefault(int(index) + 1, np.zeros(labels.shape, np.uint8))
        cv2.fillPoly(mask, [np.rint(points * 256).astype(np.int32)], 1, shift=8)
    for value, mask in masks.items():
        wanted = (labels == value).astype(np.uint8)
        assert (mask >= wanted).all() and (mask <= cv2.dilate(wanted, np.ones((3, 3)))).all(), "a line around it"
    assert not masks[1][90, 90], "no hole is lost"


def test_one_line_by_hand():
    labels = np.zeros((4, 8), np.uint8)
    labels[1:3, 2:6] = 2
    assert txt_from_labels(labels, CLASSES) == "1 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75\n"
    assert txt_from_labels(np.zeros((3, 3), np.uint8), CLASSES) == ""


def test_overlapping_lines():
    text = "0 0 0 1 0 1 1 0 1\n0 0 0 0.5 0 0.5 1 0 1\n\n1 0.5 0 1 0 1 1 0.5 1\n"
    np.testing.assert_array_equal(labels_from_txt(text, 2, 4, CLASSES), [[1, 1, 2, 2]] * 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.1 0.2", "line 2: expected `class x1 y1 x2 y2 x3 y3"),
        ("0 a b c d e f", "line 2: expected `class"),
        ("0 nan 0 1 0 1 1", "line 2: expected `class"),
        ("1.5 0 0 1 0 1 1", "line 2: expected `class"),
        ("4 0 0 1 0 1 1", "line 2: expected a class from 0 to 3, got 4"),
        ("-1 0 0 1 0 1 1", "line 2: expected a class from 0 to 3, got -1"),
    ],
)
def test_damaged_lines(line, message):
    with pytest.raises(DataError, match=message):
        labels_from_txt(f"0 0 0 1 0 1 1\n{line}\n", 4, 4, CLASSES)


def test_a_value_without_a_class():
    with pytest.raises(UnknownClassError):
        txt_from_labels(np.array([[9]], np.uint8), CLASSES)


def test_the_description():
    import yaml

    said = yaml.safe_load(dataset_yaml(CLASSES))
    assert said["names"] == dict(enumerate(CLASSES.names)) and said["train"] == "images"
