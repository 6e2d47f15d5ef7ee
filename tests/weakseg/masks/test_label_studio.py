"""Label Studio: run lengths, predictions, and corrected exports back."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given

from tests.weakseg.masks.label_maps import (
    CLASSES,
    MANY,
    assert_same,
    random_images,
    random_map,
    small_maps,
    without_ignore,
)
from weakseg.errors import DataError, UnknownClassError
from weakseg.masks.label_studio import label_config, read_export, regions_from_labels, tasks_json
from weakseg.masks.label_studio_rle import rle_from_mask
from weakseg.masks.labelled import LabelledImage


def export(tasks):
    """What Label Studio exports once somebody has accepted every prediction."""
    for i, task in enumerate(tasks):
        result = task.pop("predictions")[0]["result"]
        task |= {"id": i, "annotations": [{"id": i, "was_cancelled": False, "result": result}]}
    return json.dumps(tasks).encode()


def predicted(images, classes=CLASSES, **options):
    return json.loads(b"".join(tasks_json(images, classes, **options)))


@pytest.mark.parametrize("kind", ["brush", "polygon"])
@given(labels=small_maps)
def test_there_and_back(kind, labels):
    images = list(read_export(export(predicted([LabelledImage("a.jpg", labels)], kind=kind)), CLASSES))
    if without_ignore(labels).any():
        np.testing.assert_array_equal(images[0].labels, without_ignore(labels))
    else:
        assert images == [], "without a region nobody knows how large it is"


@pytest.mark.parametrize(("classes", "kind"), [(CLASSES, "brush"), (MANY, "brush"), (CLASSES, "polygon")])
def test_500_maps(classes, kind):
    images = list(random_images(classes))
    some = [image for image in images if without_ignore(image.labels).any()]
    back = list(read_export(export(predicted(images, classes, kind=kind)), classes))
    for found, image in zip(back, some, strict=True):
        assert_same(found, image)


def test_tasks():
    image = LabelledImage("sub/a b.jpg", random_map(7, 4), {1: 0.25, 2: 0.75, 3: 0.5, 4: 1.0})
    pieces = list(tasks_json([image, image], CLASSES, model_version="toy/1", image_url=lambda name: f"s3://b/{name}"))
    assert len(pieces) == 3, "a task at a time"
    first, second = json.loads(b"".join(pieces))
    assert first == second and first["data"] == {"image": "s3://b/sub/a b.jpg"}
    (prediction,) = first["predictions"]
    regions = prediction["result"]
    assert prediction["model_version"] == "toy/1"
    assert prediction["score"] == pytest.approx(np.mean([region["score"] for region in regions]), abs=1e-6)
    assert len({region["id"] for region in regions}) == len(regions)
    height, width = image.labels.shape
    assert {(region["original_height"], region["original_width"]) for region in regions} == {(height, width)}
    assert predicted([]) == []


def test_regions_of_polygons_are_told_apart():
    labels = np.array([[1, 0, 1]], np.uint8)
    one, other = regions_from_labels(LabelledImage("a.jpg", labels), CLASSES, "polygon")
    assert one["id"] != other["id"] and one["value"]["polygonlabels"] == ["cat"]


@pytest.mark.parametrize("kind", ["brush", "polygon"])
def test_the_interface_shows_the_regions(kind):
    view = ET.fromstring(label_config(CLASSES, kind))
    (region, *_) = regions_from_labels(LabelledImage("a.jpg", np.ones((2, 2), np.uint8)), CLASSES, kind)
    tag = view.find("BrushLabels" if kind == "brush" else "PolygonLabels")
    assert (tag.get("name"), tag.get("toName")) == (region["from_name"], region["to_name"])
    assert view.find("Image").get("name") == region["to_name"]
    assert [label.get("value") for label in tag] == list(CLASSES.names)
    assert tag[0].get("background") == "#800000"


def annotated(*annotations, image="a.jpg", **task):
    return json.dumps([{"data": {"image": image}, "annotations": list(annotations)} | task]).encode()


def brush(name, mask, **fields):
    region = {"type": "brushlabels", "original_height": mask.shape[0], "original_width": mask.shape[1]}
    return region | {"value": {"format": "rle", "rle": rle_from_mask(mask), "brushlabels": [name]}} | fields


ALL, LEFT = np.ones((2, 4), bool), np.array([[True, True, False, False]] * 2)


def test_the_newest_annotation_that_was_not_skipped():
    old = {"result": [brush("cat", ALL)], "updated_at": "2026-01-01T00:00:00Z"}
    new = {"result": [brush("dog", LEFT)], "updated_at": "2026-02-01T00:00:00Z"}
    skipped = {"result": [brush("cat", LEFT)], "updated_at": "2026-03-01T00:00:00Z", "was_cancelled": True}
    (image,) = read_export(annotated(new, old, skipped), CLASSES)
    np.testing.assert_array_equal(image.labels, [[2, 2, 0, 0]] * 2)


def test_later_regions_lie_over_earlier_ones():
    answers = {"type": "choices", "value": {"choices": ["good"]}}
    (image,) = read_export(annotated({"result": [brush("cat", ALL), answers, brush("dog", LEFT)]}), CLASSES)
    np.testing.assert_array_equal(image.labels, [[2, 2, 1, 1]] * 2)


def test_tasks_that_nobody_annotated_are_left_out():
    assert list(read_export(annotated(), CLASSES)) == []
    assert list(read_export(annotated({"result": []}), CLASSES)) == []
    assert list(read_export(b"[]", CLASSES)) == []


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("sub/a.jpg", "sub/a.jpg"),
        ("/data/local-files/?d=photos%2Fsub/a%20b.jpg", "photos/sub/a b.jpg"),
        ("/data/upload/3/0a1b2c3d-a.jpg", "a.jpg"),
        ("https://host/x/a%20b.jpg?token=1", "x/a b.jpg"),
        ("s3://bucket/sub/a.jpg", "sub/a.jpg"),
    ],
)
def test_names_of_images(url, name):
    (image,) = read_export(annotated({"result": [brush("cat", ALL)]}, image=url), CLASSES)
    assert image.name == name


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"{", DataError, "got no JSON"),
        (b'{"a": 1}', DataError, "a list of tasks"),
        (b'[{"image": "a.jpg", "brush": []}]', DataError, "not JSON-MIN"),
        (annotated({"result": [brush("cow", ALL)]}), UnknownClassError, "task 1: unknown class 'cow'"),
        (annotated({"result": [brush("cat", ALL), brush("cat", ALL[:1])]}), DataError, "regions of one image size"),
        (
            annotated({"result": [brush("cat", ALL, original_width=5)]}),
            DataError,
            "task 1: expected run lengths of 2 x 5",
        ),
        (annotated({"result": [brush("cat", ALL, original_width=10**9)]}), DataError, "expected images of 1 to"),
        (annotated({"result": [brush("cat", ALL, type="rectanglelabels")]}), DataError, "got 'rectanglelabels'"),
        (annotated({"result": [brush("cat", ALL, image_rotation=90)]}), DataError, "by 90 degrees"),
        (annotated({"result": [brush("cat", ALL, value={})]}), DataError, "task 1: expected Label Studio's fields"),
        (annotated({"result": [brush("cat", np.ones((64, 64), bool))] * 5000}), DataError, "cover an image at most"),
        (annotated({"result": 3}), DataError, "task 1: expected Label Studio's fields"),
        (annotated({"result": [brush("cat", ALL, value={"brushlabels": ["cat", "dog"]})]}), DataError, "one label"),
    ],
)
def test_exports_that_cannot_be_used(data, error, message):
    with pytest.raises(error, match=message):
        list(read_export(data, CLASSES))
