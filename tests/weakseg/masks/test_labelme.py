"""labelme's files: there and back, and what people draw."""

import base64
import contextlib
import io
import json

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from PIL import Image

from tests.weakseg.masks.label_maps import CLASSES, MANY, assert_same, random_images, small_maps, without_ignore
from weakseg.errors import DataError, UnknownClassError
from weakseg.masks.labelled import LabelledImage
from weakseg.masks.labelme import json_from_labels, labels_from_json


@given(small_maps, st.sampled_from(["mask", "polygon"]), st.sampled_from([0, 0.25, 0.5]))
def test_there_and_back(labels, kind, tolerance):
    before = labels.copy()
    written = json_from_labels(LabelledImage("a.jpg", labels), CLASSES, kind=kind, tolerance_px=tolerance)
    np.testing.assert_array_equal(labels, before)
    np.testing.assert_array_equal(labels_from_json(written, CLASSES).labels, without_ignore(labels))


@pytest.mark.parametrize(("classes", "kind"), [(CLASSES, "mask"), (MANY, "mask"), (CLASSES, "polygon")])
def test_500_maps(classes, kind):
    for image in random_images(classes):
        written = json_from_labels(image, classes, kind=kind)
        found = labels_from_json(written, classes)
        assert_same(found, image)
        assert found.confidence == image.confidence
        assert json_from_labels(image, classes, kind=kind) == written


def test_shapes_by_hand():
    labels = np.zeros((4, 6), np.uint8)
    labels[1:3, 2:5] = 2
    image = LabelledImage("sub/a.jpg", labels, {2: 0.75})
    (mask,) = json.loads(json_from_labels(image, CLASSES))["shapes"]
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(mask.pop("mask")))))
    assert pixels.all() and pixels.shape == (2, 3)
    common = {"label": "dog", "group_id": None, "description": "", "flags": {}, "score": 0.75}
    assert mask == common | {"shape_type": "mask", "points": [[2, 1], [4, 2]]}
    content = json.loads(json_from_labels(image, CLASSES, kind="polygon"))
    (polygon,) = content.pop("shapes")
    assert polygon == common | {"shape_type": "polygon", "points": [[2, 1], [5, 1], [5, 3], [2, 3]], "mask": None}
    assert content.pop("version") and content == {
        "flags": {}, "imagePath": "sub/a.jpg", "imageData": None, "imageHeight": 4, "imageWidth": 6
    }  # fmt: skip


def drawn(*shapes, **fields):
    content = {"imagePath": "a.jpg", "imageHeight": 4, "imageWidth": 6, "shapes": list(shapes)} | fields
    return json.dumps(content).encode()


def polygon(label, *points):
    return {"label": label, "shape_type": "polygon", "points": points}


def test_polygons_that_overlap():
    one = polygon("cat", [0, 0], [6, 0], [6, 4], [0, 4])
    other = polygon("dog", [3, 0], [6, 0], [6, 4], [3, 4])
    np.testing.assert_array_equal(labels_from_json(drawn(one, other), CLASSES).labels, [[1, 1, 1, 2, 2, 2]] * 4)


def test_rectangles_may_go_from_any_corner_to_any():
    shape = {"label": "dog", "shape_type": "rectangle", "points": [[5, 1], [2, 3]]}
    expected = [[0] * 6, [0, 0, 2, 2, 2, 0], [0, 0, 2, 2, 2, 0], [0] * 6]
    np.testing.assert_array_equal(labels_from_json(drawn(shape), CLASSES).labels, expected)


def test_shapes_without_a_type_are_polygons_and_paths_of_windows_are_paths():
    shape = polygon("cat", [0, 0], [6, 0], [6, 4], [0, 4]) | {"shape_type": None}
    image = labels_from_json(drawn(shape, imagePath="..\\sub\\a.jpg"), CLASSES)
    assert image.name == "../sub/a.jpg" and (image.labels == 1).all()


def test_the_highest_score_counts():
    shape = polygon("cat", [0, 0], [1, 0], [1, 1])
    shapes = [shape | {"score": 0.5}, shape | {"score": 0.75}, shape | {"score": None}, shape | {"label": "dog"}]
    assert labels_from_json(drawn(*shapes), CLASSES).confidence == {1: 0.75}


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
        (drawn(MASK | {"mask": None}), DataError, "whose fields are others"),
        (drawn(MASK | {"points": 3}), DataError, "whose fields are others"),
        (drawn(MASK | {"points": [[float("nan"), 0], [5, 3]]}), DataError, "whose fields are others"),
        (drawn(MASK | {"score": 1.5}), DataError, "scores from 0 to 1"),
        (drawn({"label": "cat", "shape_type": "rectangle", "points": [[1, 1]]}), DataError, "whose fields are others"),
        (drawn(3), DataError, "whose fields are others"),
    ],
)
def test_files_that_cannot_be_used(data, error, message):
    with pytest.raises(error, match=message):
        labels_from_json(data, CLASSES)


def test_shapes_that_cost_too_much():
    ring = polygon("cat", [0, 0], [400, 0], [400, 400], [0, 400])
    with pytest.raises(DataError, match="cover an image at most"):
        labels_from_json(drawn(*[ring] * 5000, imageHeight=400, imageWidth=400), CLASSES)


def test_a_mask_that_promises_too_much():
    large = json.loads(json_from_labels(LabelledImage("a.jpg", np.ones((500, 500), np.uint8)), CLASSES))["shapes"][0]
    with pytest.raises(DataError, match="expected at most 24 pixels"):
        labels_from_json(drawn(large), CLASSES)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)


@given(
    st.sampled_from(["label", "points", "shape_type", "mask", "score", "imagePath", "imageWidth", "shapes"]),
    json_values,
)
def test_any_value_in_any_place_is_read_or_refused(key, value):
    content = json.loads(drawn(MASK, polygon("cat", [0, 0], [6, 0], [6, 4])))
    for one in (content, *content["shapes"]):
        if key in one or key == "score":
            one[key] = value
    with contextlib.suppress(DataError):
        assert labels_from_json(json.dumps(content).encode(), CLASSES).labels.size


@given(st.integers(0, 200), st.binary(max_size=4))
def test_any_damage_of_a_mask_is_seen_or_harmless(at, damage):
    png = base64.b64decode(MASK["mask"])
    png = png[:at] + damage + png[at + len(damage) :]
    with contextlib.suppress(DataError):
        shape = MASK | {"mask": base64.b64encode(png).decode()}
        assert labels_from_json(drawn(shape), CLASSES).labels.shape == (4, 6)
