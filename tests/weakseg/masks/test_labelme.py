"""labelme's files: there and back, and what people draw."""

import json

import numpy as np
import pytest
from hypothesis import given

from tests.weakseg.masks.label_maps import CLASSES, MANY, assert_same, random_images, small_maps, without_ignore
from weakseg.errors import DataError, UnknownClassError
from weakseg.masks.labelled import LabelledImage
from weakseg.masks.labelme import json_from_labels, labels_from_json


@given(small_maps)
def test_there_and_back(labels):
    back = labels_from_json(json_from_labels(LabelledImage("a.jpg", labels), CLASSES), CLASSES)
    np.testing.assert_array_equal(back.labels, without_ignore(labels))


@pytest.mark.parametrize("classes", [CLASSES, MANY])
def test_500_maps(classes):
    for image in random_images(classes):
        assert_same(labels_from_json(json_from_labels(image, classes), classes), image)


def drawn(*shapes, **fields):
    content = {"imagePath": "a.jpg", "imageHeight": 4, "imageWidth": 6, "shapes": list(shapes)} | fields
    return json.dumps(content).encode()


def polygon(label, *points):
    return {"label": label, "shape_type": "polygon", "points": points}


def test_polygons_that_overlap():
    one = polygon("cat", [0, 0], [6, 0], [6, 4], [0, 4])
    other = polygon("dog", [3, 0], [6, 0], [6, 4], [3, 4])
    np.testing.assert_array_equal(labels_from_json(drawn(one, other), CLASSES).labels, [[1, 1, 1, 2, 2, 2]] * 4)


MASK = json.loads(json_from_labels(LabelledImage("a.jpg", np.ones((4, 6), np.uint8)), CLASSES))["shapes"][0]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"{", DataError, "expected a labelme file, got no JSON"),
        (b"[]", DataError, "expected a labelme file, got other JSON"),
        (b"{}", DataError, "whose fields are others: 'imageWidth'"),
        (drawn(imageWidth=10**9), DataError, "expected images of 1 to"),
        (drawn(polygon("cow", [0, 0], [1, 0], [1, 1])), UnknownClassError, "unknown class 'cow'"),
        (drawn(polygon("cat", [0, 0], [1, 0])), DataError, "expected a polygon"),
        (drawn({"label": "cat", "shape_type": "circle", "points": [[1, 1], [2, 2]]}), DataError, "got 'circle'"),
        (drawn(MASK | {"points": [[1, 0], [6, 3]]}), DataError, "expected masks inside the image"),
        (drawn(MASK | {"mask": "no base64!"}), DataError, "expected a mask as PNG in base64"),
        (drawn(MASK | {"mask": MASK["mask"][:40]}), DataError, "expected|damaged"),
        (drawn(MASK | {"points": 3}), DataError, "whose fields are others"),
    ],
)
def test_files_that_cannot_be_used(data, error, message):
    with pytest.raises(error, match=message):
        labels_from_json(data, CLASSES)


def test_a_mask_that_promises_too_much():
    large = json.loads(json_from_labels(LabelledImage("a.jpg", np.ones((500, 500), np.uint8)), CLASSES))["shapes"][0]
    with pytest.raises(DataError, match="expected at most 24 pixels"):
        labels_from_json(drawn(large), CLASSES)
