"""YOLO's polygons: there and back, and as OpenCV fills them."""

import contextlib

import cv2
import hypothesis.strategies as st
import numpy as np
import pytest
import yaml
from hypothesis import given

from tests.weakseg.masks.label_maps import CLASSES, MANY, SEEDS, random_map, small_maps, without_ignore
from weakseg.classes import ClassTable
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


def filled_by_opencv(text, shape, scale=16):
    """As OpenCV fills it on a finer grid, for it also draws the line, read beside the pixels' centres."""
    labels = np.zeros(shape, np.uint8)
    for line in text.splitlines():
        index, *shares = line.split()
        points = np.array(shares, np.float64).reshape(-1, 2) * [shape[1] * scale, shape[0] * scale]
        canvas = np.zeros((shape[0] * scale, shape[1] * scale), np.uint8)
        cv2.fillPoly(canvas, [np.rint(points).astype(np.int32)], 1)
        labels[canvas[scale // 2 :: scale, scale // 2 :: scale] > 0] = int(index) + 1
    return labels


@pytest.mark.parametrize("tolerance", [0, 0.5])
def test_opencv_fills_the_same(tolerance):
    n_compared = 0
    for seed in SEEDS[4::9]:
        labels = random_map(seed, 4)
        found = filled_by_opencv(txt_from_labels(labels, CLASSES, tolerance_px=tolerance), labels.shape)
        if tolerance == 0:
            np.testing.assert_array_equal(found, without_ignore(labels))
        for value in range(1, 5):
            here, there = labels == value, found == value
            if here.sum() > 64:
                assert (here & there).sum() / (here | there).sum() >= 0.99
                n_compared += 1
    assert n_compared > 50


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
        ("0 0.5 0.5 0.2 0.1", "line 2: expected `class .* a box"),
        ("0 0 0 1 0 1 1.02", "line 2: expected shares of the image's size, from 0 to 1, got 0 to 1.02"),
        ("0 0 0 640 0 640 480", "got 0 to 640: are they pixels"),
        ("0 0 0 1 0 1 -0.02", "line 2: .*got -0.02 to 1"),
        ("0 0 0 inf 0 1 1", "line 2: expected `class"),
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


def test_a_little_beyond_is_cut_off():
    text = "0 -0.001 -0.001 1.005 -0.001 1.005 1.005 -0.001 1.005\n"
    assert labels_from_txt(text, 3, 5, CLASSES).tolist() == [[1] * 5] * 3


@given(st.text(alphabet="01 .-\nexnaif_", max_size=60))
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(DataError):
        assert labels_from_txt(text, 3, 5, CLASSES).shape == (3, 5)


def test_lines_that_cost_too_much():
    with pytest.raises(DataError, match="cover an image at most"):
        labels_from_txt("0 0 0 1 0 1 1 0 1\n" * 5000, 400, 400, CLASSES)


def test_the_description():
    names = (
        "cat",
        'a "bird": [1]',
        "Füße",
        "no",
        "1",
        "null",
        "- x",
        "# y",
        "😀",
        "two\nlines",
        "\x7f\x85\u2028\ufeff",
    )
    said = yaml.safe_load(dataset_yaml(ClassTable(names)))
    assert said == {"train": "images", "val": "images", "names": dict(enumerate(names))}
    assert yaml.safe_load(dataset_yaml(MANY, "parts/images/a"))["val"] == "parts/images/a"
