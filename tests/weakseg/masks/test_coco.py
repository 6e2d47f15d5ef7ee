import contextlib
import io
import json
from collections import Counter
from itertools import islice

import cv2
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from pycocotools.coco import COCO

from tests.weakseg.masks.label_maps import (
    CLASSES,
    MANY,
    assert_same,
    random_images,
    small_maps,
    wide_maps,
    without_ignore,
)
from weakseg.classes import ClassTable
from weakseg.errors import DataError, UnknownClassError, UsageError
from weakseg.masks import coco
from weakseg.masks.coco import instances_json, read_instances
from weakseg.masks.coco_rle import string_from_counts
from weakseg.masks.labelled import LabelledImage

# pycocotools 2.0.11 predates NumPy 2's `copy` keyword and is warned about it.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

kinds = st.sampled_from(["rle", "polygon"])


def file_of(images, classes=CLASSES, **options):
    return b"".join(instances_json(images, classes, **options))


def content_of(labels, classes=CLASSES, **options):
    return json.loads(file_of([LabelledImage("a.jpg", labels)], classes, **options))


def read(content, classes=CLASSES, **options):
    return list(read_instances(json.dumps(content).encode(), classes, **options))


def opened(data):
    """As pycocotools sees it."""
    found = COCO()
    found.dataset = json.loads(data)
    with contextlib.redirect_stdout(io.StringIO()):
        found.createIndex()
    return found


def drawn(found, image_id, shape):
    """The label map that pycocotools draws."""
    labels = np.zeros(shape, np.uint16)
    for annotation in found.loadAnns(found.getAnnIds(imgIds=[image_id])):
        labels[found.annToMask(annotation) > 0] = annotation["category_id"]
    return labels


# There and back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "kind", "parts"),
    [(CLASSES, "rle", False), (CLASSES, "polygon", True), (MANY, "polygon", False)],
)
def test_500_maps_come_back_and_are_what_pycocotools_draws(classes, kind, parts, tmp_path):
    images = list(random_images(classes))
    data = file_of(images, classes, kind=kind, parts=parts)
    (tmp_path / "instances.json").write_bytes(data)
    with contextlib.redirect_stdout(io.StringIO()):
        found = COCO(str(tmp_path / "instances.json"))
    assert found.getImgIds() == list(range(1, 501))
    back = list(read_instances(data, classes))
    for image_id, (image, again) in enumerate(zip(images, back, strict=True), 1):
        assert_same(again, image)
        assert again.confidence == image.confidence
        np.testing.assert_array_equal(drawn(found, image_id, image.labels.shape), without_ignore(image.labels))


@given(small_maps, kinds, st.booleans(), st.sampled_from([0, 0.25, 0.5]), st.sampled_from([None, "unsure"]))
def test_a_map_comes_back(labels, kind, parts, tolerance, ignore):
    before, image = labels.copy(), LabelledImage("a/b.png", labels, {1: 0.25})
    data = file_of([image], kind=kind, parts=parts, tolerance_px=tolerance, ignore=ignore)
    np.testing.assert_array_equal(labels, before)
    (again,) = read_instances(data, CLASSES, ignore=ignore)
    assert_same(again, image, ignore=ignore is not None)
    assert again.confidence == ({1: 0.25} if (labels == 1).any() else {})


@given(wide_maps, kinds)
def test_a_map_of_16_bits_comes_back(labels, kind):
    image = LabelledImage("a.png", labels)
    assert_same(next(read_instances(file_of([image], MANY, kind=kind, ignore="?"), MANY, ignore="?")), image, True)


@given(small_maps, kinds, st.booleans())
def test_annotations_are_sound(labels, kind, parts):
    shown = without_ignore(labels)
    content = content_of(labels, kind=kind, parts=parts)
    found = opened(json.dumps(content))
    for annotation in content["annotations"]:
        mask = found.annToMask(annotation)
        assert annotation["area"] == mask.sum() > 0
        assert annotation["bbox"] == list(cv2.boundingRect(mask))
        assert annotation["iscrowd"] == 0
        assert (shown[mask > 0] == annotation["category_id"]).all()
        assert not parts or cv2.connectedComponents(mask, connectivity=4)[0] == 2
    counted = Counter(annotation["category_id"] for annotation in content["annotations"])
    expected = {
        value: cv2.connectedComponents((shown == value).astype(np.uint8), connectivity=4)[0] - 1 if parts else 1
        for value in np.unique(shown[shown > 0]).tolist()
    }
    assert counted == expected


@given(small_maps)
def test_parts_come_by_class_then_in_reading_order(labels):
    content = content_of(labels, parts=True)
    found = opened(json.dumps(content))
    places = [
        (annotation["category_id"], int(np.flatnonzero(found.annToMask(annotation))[0]))
        for annotation in content["annotations"]
    ]
    assert places == sorted(places)


def test_pycocotools_draws_simplified_outlines_almost_so():
    rng = np.random.default_rng(3)
    for _ in range(100):
        labels = np.zeros((120, 160), np.uint8)
        centre, axes = rng.integers([20, 20], [140, 100]).tolist(), rng.integers(5, 40, 2).tolist()
        cv2.ellipse(labels, centre, axes, int(rng.integers(180)), 0, 360, 1, -1)
        found = opened(file_of([LabelledImage("a", labels)], kind="polygon", tolerance_px=0.5))
        other = drawn(found, 1, labels.shape)
        around = cv2.morphologyEx(np.pad(labels, 1), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
        border = around[1:-1, 1:-1] > 0
        np.testing.assert_array_equal(other[~border], labels[~border])
        assert (other & labels).sum() / (other | labels).sum() >= 0.97


# The file -------------------------------------------------------------------------------------------------------------


def test_a_file_of_two_images():
    labels = np.array([[0, 2, 2], [0, 2, 2]], np.uint8)
    images = [LabelledImage("x/a.jpg", labels, {2: np.float32(0.5)}), LabelledImage("b.jpg", labels[:1] * 0)]
    content = json.loads(file_of(images, info={"version": "7"}))
    assert content == {
        "info": {"version": "7"},
        "licenses": [],
        "categories": [{"id": i, "name": name, "supercategory": ""} for i, name in enumerate(CLASSES.names, 1)],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 2,
                "segmentation": {"size": [2, 3], "counts": "24"},
                "area": 4,
                "bbox": [1, 0, 2, 2],
                "iscrowd": 0,
                "score": 0.5,
            }
        ],
        "images": [
            {"id": 1, "file_name": "x/a.jpg", "width": 3, "height": 2},
            {"id": 2, "file_name": "b.jpg", "width": 3, "height": 1},
        ],
    }
    polygons = json.loads(file_of(images, kind="polygon"))["annotations"]
    assert [one["segmentation"] for one in polygons] == [[[1, 0, 3, 0, 3, 2, 1, 2]]]


def test_a_class_with_a_hole_is_written_as_run_lengths():
    labels = np.zeros((5, 9), np.uint8)
    labels[:, :5], labels[2, 2], labels[1:4, 7] = 1, 0, 1
    (annotation,) = content_of(labels, kind="polygon")["annotations"]
    assert set(annotation["segmentation"]) == {"size", "counts"}
    holed, whole = content_of(labels, kind="polygon", parts=True)["annotations"]
    assert set(holed["segmentation"]) == {"size", "counts"}
    assert whole["segmentation"] == [[7, 1, 8, 1, 8, 4, 7, 4]]


def test_no_image_at_all():
    content = json.loads(file_of([]))
    assert content["images"] == content["annotations"] == [] == read(content)


def test_images_are_taken_one_at_a_time():
    taken = []

    def images():
        for i in range(20):
            taken.append(i)
            yield LabelledImage(f"{i}.jpg", np.ones((2, 2), np.uint8))

    chunks = instances_json(images(), CLASSES)
    assert not taken
    next(chunks)
    assert not taken
    for i in range(20):
        assert next(chunks).count(b"image_id") == 1 and taken == [*range(i + 1)]
    assert len(json.loads(b"{" + b"".join(chunks).partition(b"\n")[2])["images"]) == 20


def test_the_list_of_images_may_be_longer_than_memory_should_hold(monkeypatch):
    monkeypatch.setattr(coco, "_SPOOL_BYTES", 100)
    monkeypatch.setattr(coco, "_READ_BYTES", 7)
    images = [LabelledImage(f"{i}.jpg", np.zeros((1, 1), np.uint8)) for i in range(100)]
    assert [image.name for image in read_instances(file_of(images), CLASSES)] == [image.name for image in images]


def test_the_same_images_give_the_same_bytes():
    some = [*islice(random_images(), 50)]
    assert file_of(some, kind="polygon") == file_of(some, kind="polygon")


def test_values_and_names_that_cannot_be():
    with pytest.raises(UnknownClassError, match="up to 4.*got 7"):
        content_of(np.array([[0, 7]], np.uint8))
    with pytest.raises(UnknownClassError, match="got 300"):
        content_of(np.array([[300]], np.uint16))
    for name in ("dog", "background"):
        with pytest.raises(UsageError, match="choose another"):
            content_of(np.array([[1]], np.uint8), ignore=name)
    with pytest.raises(UsageError, match="tolerance_px"):
        content_of(np.array([[1]], np.uint8), kind="polygon", tolerance_px=2)


# Corrected files of others --------------------------------------------------------------------------------------------


def instances(*annotations, width=4, height=3, names=("dog", "cat"), **fields):
    """A file of one image; categories count from 7 on."""
    return {
        "images": [{"id": 5, "file_name": "a.jpg", "width": width, "height": height}],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, 7)],
        "annotations": [{"id": i, "image_id": 5, **one} for i, one in enumerate(annotations, 100)],
    } | fields


def polygon(*numbers, category=7, **fields):
    return {"category_id": category, "segmentation": [list(numbers)], **fields}


def labels_of(content, **options):
    (image,) = read(content, **options)
    return image.labels.tolist()


def test_categories_count_by_name():
    assert labels_of(instances(polygon(0, 0, 2, 0, 2, 1, 0, 1), width=3, height=1)) == [[2, 2, 0]]


def test_later_annotations_lie_over_earlier_ones():
    under, over = polygon(0, 0, 3, 0, 3, 1, 0, 1), polygon(1, 0, 4, 0, 4, 1, 1, 1, category=8)
    assert labels_of(instances(under, over, height=1)) == [[2, 1, 1, 1]]
    assert labels_of(instances(over, under, height=1)) == [[2, 2, 2, 1]]


def test_polygons_of_a_class_that_overlap_are_united():
    one, two = [0, 0, 3, 0, 3, 1, 0, 1], [1, 0, 4, 0, 4, 1, 1, 1]
    together = {"category_id": 7, "segmentation": [one, two]}
    assert labels_of(instances(together, height=1)) == [[2, 2, 2, 2]]
    assert labels_of(instances(polygon(*one), polygon(*two), height=1)) == [[2, 2, 2, 2]]


def test_polygons_may_leave_the_image_and_have_decimals():
    wide = polygon(-900.5, 0.6, 900.25, 0.6, 900.25, 1.7, -900.5, 1.7)
    assert labels_of(instances(wide, polygon(50, 50, 60, 50, 60, 60))) == [[0] * 4, [2] * 4, [0] * 4]


def test_uncompressed_run_lengths_go_column_by_column():
    crowd = {"category_id": 8, "segmentation": {"size": [2, 3], "counts": [1, 2, 3]}, "iscrowd": 1}
    assert labels_of(instances(crowd, width=3, height=2)) == [[0, 1, 0], [1, 0, 0]]
    full = {"category_id": 8, "segmentation": {"size": [2, 3], "counts": [0, 6]}}
    assert labels_of(instances(full, width=3, height=2)) == [[1, 1, 1], [1, 1, 1]]


def test_background_can_be_painted_and_what_is_not_used_need_not_be_known():
    content = instances(
        polygon(0, 0, 4, 0, 4, 1, 0, 1), polygon(1, 0, 2, 0, 2, 1, 1, 1, category=8), height=1,
        names=("dog", "background", "car"),
    )  # fmt: skip
    assert labels_of(content) == [[2, 0, 2, 2]]
    with pytest.raises(UnknownClassError, match="annotation 101 of image 'a.jpg': unknown class 'Background'"):
        read(content | {"categories": [{"id": 7, "name": "dog"}, {"id": 8, "name": "Background"}]})


def test_images_without_annotations_are_background():
    assert labels_of(instances()) == [[0] * 4] * 3


def test_ids_may_be_texts():
    content = instances(polygon(0, 0, 1, 0, 1, 1, 0, 1), width=2, height=1)
    content["images"][0]["id"] = content["annotations"][0]["image_id"] = "five"
    assert labels_of(content) == [[2, 0]]


def test_label_studios_form():
    """As label_studio_sdk's converter writes polygons: ids from 0 on, no licences, more fields than COCO's."""
    content = {
        "images": [{"width": 4, "height": 2, "id": 0, "file_name": "images/1f2-a.jpg"}],
        "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
        "annotations": [
            {
                "id": 0,
                "image_id": 0,
                "category_id": 1,
                "segmentation": [[1.0, 0.0, 3.0, 0.0, 3.0, 2.0, 1.0, 2.0]],
                "bbox": [1.0, 0.0, 2.0, 2.0],
                "ignore": 0,
                "iscrowd": 0,
                "area": 4.0,
            }
        ],
        "info": {"year": 2026, "version": "1.0", "contributor": "Label Studio"},
    }
    (image,) = read(content)
    assert (image.name, image.labels.tolist()) == ("images/1f2-a.jpg", [[0, 2, 2, 0]] * 2)


def test_the_nearest_class_is_named():
    with pytest.raises(UnknownClassError, match="annotation 100 of image 'a.jpg': .*'dogg': did you mean 'dog'"):
        read(instances(polygon(0, 0, 1, 0, 1, 1), names=("dogg",)))


def test_the_highest_score_counts():
    ring = (0, 0, 1, 0, 1, 1)
    content = instances(polygon(*ring, score=0.5), polygon(*ring, score=0.75), polygon(*ring, category=8, score=None))
    assert read(content)[0].confidence == {2: 0.75}


def rle(counts, size=(3, 4)):
    return {"category_id": 7, "segmentation": {"size": list(size), "counts": counts}}


WRAPS = [2**58] * 63 + [2**58 + 12]  # adds up to 2^64 + 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (instances(rle("04")), "annotation 100 of image 'a.jpg': expected run lengths of 3 x 4 pixels"),
        (instances(rle("0P")), "damaged"),
        (instances(rle("é")), "ASCII"),
        (instances(rle([1, 2])), "3 x 4 pixels"),
        (instances(rle([13, -1])), "3 x 4 pixels"),
        (instances(rle([])), "3 x 4 pixels"),
        (instances(rle(WRAPS)), "3 x 4 pixels"),
        (instances(rle([10**400])), "3 x 4 pixels"),
        (instances(rle([1.5, 10.5])), "list of integers"),
        (instances(rle([True, 11])), "list of integers"),
        (instances(rle(None)), "list of integers"),
        (instances(rle("0<", size=(4, 3))), r"height, width \[3, 4\].*\[4, 3\]"),
        (instances({"category_id": 7, "segmentation": []}), "got none: draw a mask"),
        (instances({"category_id": 7}), "got none: draw a mask"),
        (instances({"category_id": 7, "segmentation": [1, 2, 3, 4, 5, 6]}), "x1, y1, x2"),
        (instances(polygon(0, 0, 1, 1)), "x1, y1, x2"),
        (instances(polygon(0, 0, 1, 1, 2, 2, 3)), "x1, y1, x2"),
        (instances(polygon(0, 0, 1, 1, "2", 2)), "x1, y1, x2"),
        (instances(polygon([0, 0], [1, 1], 2)), "x1, y1, x2"),
        (instances(polygon(0, 0, 1, 1, 2, float("nan"))), "beyond 16777216"),
        (instances(polygon(0, 0, 1, 1, 2, 1e300)), "beyond 16777216"),
        (instances(polygon(0, 0, 1, 1, 2, -(2**63))), "beyond 16777216"),
        (instances(polygon(0, 0, 1, 1, 2, 2, category=99)), "a category of the file, got 99"),
        (instances(polygon(0, 0, 1, 1, 2, 2, category=True)), "type int, got bool"),
        (instances(polygon(0, 0, 1, 1, 2, 2, score=7)), "from 0 to 1, got 7"),
        (instances(polygon(0, 0, 1, 1, 2, 2) | {"image_id": 6}), "got one of image 6"),
        (instances(width=0), "image 'a.jpg': expected images of 1 to .*, got 0x3"),
        (instances(width=10**6, height=10**6), "got 1000000x1000000"),
        (instances(width="4"), "'width' of each image to be of type int, got str"),
        (instances(images=[{"id": 1}]), "'file_name' of each image"),
        (instances(images=[{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]), "more than once"),
        (instances(images={}), "list of objects as its 'images'"),
        (instances(annotations=[1]), "list of objects as its 'annotations'"),
        ({"images": [], "categories": []}, "'annotations'"),
        ([], "other JSON"),
    ],
)
def test_damaged_files_are_refused(content, message):
    with pytest.raises(DataError, match=message):
        read(content)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe{}", b"[" * 10**6, b'{"a": ' + b"9" * 5000 + b"}"])
def test_what_is_no_json_is_refused(data):
    with pytest.raises(DataError, match="instances file"):
        list(read_instances(data, CLASSES))


def test_compressed_runs_whose_sum_wraps_around_are_refused():
    with pytest.raises(DataError, match="3 x 4 pixels"):
        read(instances(rle(string_from_counts(np.array(WRAPS)).decode())))


def test_hostile_shapes_cost_little():
    ring = [0, 0, 400, 0, 400, 400, 0, 400]
    bomb = {"category_id": 7, "segmentation": [ring] * 10**4}
    with pytest.raises(DataError, match="at most 256 times"):
        read(instances(bomb, width=400, height=400))
    bomb = [rle([0, 400 * 400], size=(400, 400))] * 10**4
    with pytest.raises(DataError, match="at most 256 times"):
        read(instances(*bomb, width=400, height=400))
    zigzag = [number for i in range(5000) for number in (i % 7, 9000 * (i % 2))]
    with pytest.raises(DataError, match="cross at most"):
        read(instances(polygon(*zigzag), width=8, height=9000))


def test_an_image_of_a_thousand_parts_is_not_hostile():
    labels = np.zeros((60, 80), np.uint8)
    labels[::2, ::2] = 1
    for kind in ("rle", "polygon"):
        content = content_of(labels, kind=kind, parts=True)
        assert len(content["annotations"]) == 30 * 40
        np.testing.assert_array_equal(read(content)[0].labels, labels)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["size", "counts", "id"]), inner),
    max_leaves=8,
)


@given(
    st.sampled_from(["id", "image_id", "category_id", "segmentation", "score", "width", "height", "file_name", "name"]),
    json_values,
)
def test_any_value_in_any_place_is_read_or_refused(key, value):
    content = instances(polygon(0, 0, 4, 0, 4, 3))
    for one in (content["images"][0], content["annotations"][0], content["categories"][0]):
        if key in one or key == "score":
            one[key] = value
    with contextlib.suppress(DataError):
        assert len(read(content)) == 1


@given(st.binary(max_size=30))
def test_any_counts_are_read_or_refused(data):
    with contextlib.suppress(DataError):
        assert read(instances(rle(data.decode("latin-1"))))[0].labels.shape == (3, 4)


def test_a_table_of_one_class():
    one = ClassTable(("dog",))
    assert_same(
        read(content_of(np.eye(3, dtype=np.uint8), one), one)[0], LabelledImage("a.jpg", np.eye(3, dtype=np.uint8))
    )
