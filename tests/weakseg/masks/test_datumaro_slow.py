"""Our files as datumaro reads them, on which CVAT's importers and exporters are built, and its own as we do."""

import numpy as np
import pytest
from PIL import Image

from tests.weakseg.masks import peers
from tests.weakseg.masks.label_maps import CLASSES, SEEDS, assert_same, random_map, without_ignore
from weakseg.masks.coco import instances_json, read_instances
from weakseg.masks.cvat import annotations_xml, labelmap_txt, read_xml
from weakseg.masks.labelled import LabelledImage
from weakseg.masks.png import png_from_labels

pytestmark = peers.needs("datumaro")

VALUES = {name: value for value, name in enumerate(CLASSES.names, 1)} | {"background": 0, "void": 255}
IMAGES = [LabelledImage(f"image-{seed}.jpg", random_map(seed, len(CLASSES))) for seed in SEEDS]


@pytest.fixture
def folder(tmp_path):
    """With images, without which datumaro does not take everything."""
    (tmp_path / "images" / "default").mkdir(parents=True)
    for image in IMAGES:
        photo = Image.new("RGB", image.labels.shape[::-1])
        photo.save(tmp_path / "images" / "default" / image.name)
    return tmp_path


def assert_all_same(told, ignore=False):
    assert told["maps"].keys() == {image.name.removesuffix(".jpg") for image in IMAGES}
    for image in IMAGES:
        expected = image.labels if ignore else without_ignore(image.labels)
        np.testing.assert_array_equal(told["maps"][image.name.removesuffix(".jpg")], expected)


def read_back(data, read):
    found = {image.name: image for image in read(data, CLASSES)}
    for image in IMAGES:
        assert_same(found[image.name], image)


@pytest.mark.parametrize("parts", [False, True])
def test_instances_and_what_datumaro_makes_of_them(folder, parts):
    (folder / "annotations").mkdir()
    data = b"".join(instances_json(IMAGES, CLASSES, parts=parts))
    (folder / "annotations" / "instances_default.json").write_bytes(data)
    exports = {
        "coco_instances": [str(folder / "coco"), {"save_media": False, "segmentation_mode": "mask"}],
        "cvat": [str(folder / "cvat"), {"save_media": False}],
    }
    asked = {"folder": str(folder), "format": "coco_instances", "values": VALUES, "exports": exports}
    assert_all_same(peers.ask("datumaro", "datumaro_masks.py", folder, **asked))
    read_back((folder / "coco" / "annotations" / "instances_default.json").read_bytes(), read_instances)
    read_back((folder / "cvat" / "default.xml").read_bytes(), read_xml)


def test_cvat_for_images(folder):
    (folder / "images" / "default").rename(folder / "photos")
    (folder / "images").rmdir()
    (folder / "photos").rename(folder / "images")
    (folder / "annotations.xml").write_bytes(b"".join(annotations_xml(IMAGES, CLASSES)))
    asked = {"folder": str(folder), "format": "cvat", "values": VALUES, "exports": {}}
    assert_all_same(peers.ask("datumaro", "datumaro_masks.py", folder, **asked))


@pytest.mark.parametrize("ignore", [None, "void"])
def test_segmentation_mask(folder, ignore):
    (folder / "images" / "default").rename(folder / "JPEGImages")
    for name in ("SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    for image in IMAGES:
        labels = image.labels if ignore else without_ignore(image.labels)
        path = folder / "SegmentationClass" / image.name.replace(".jpg", ".png")
        path.write_bytes(png_from_labels(labels))
    (folder / "labelmap.txt").write_text(labelmap_txt(CLASSES, ignore=ignore), encoding="utf-8")
    lines = "".join(f"{image.name.removesuffix('.jpg')}\n" for image in IMAGES)
    (folder / "ImageSets" / "Segmentation" / "default.txt").write_text(lines)
    asked = {"folder": str(folder), "format": "voc_segmentation", "values": VALUES, "exports": {}}
    assert_all_same(peers.ask("datumaro", "datumaro_masks.py", folder, **asked), ignore=ignore is not None)
