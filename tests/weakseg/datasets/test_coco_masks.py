import json
import os
import pickle
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as coco

from weakseg.classes import IGNORE, IGNORE_U16
from weakseg.datasets import read
from weakseg.datasets.coco_masks import labels_from_annotations, mask_from_segmentation
from weakseg.datasets.truth import Truth, has_truth, masks_fingerprint, open_truth, trusted
from weakseg.errors import DataError, DatasetError, SealedTruthError
from weakseg.recipe import DataConfig

# pycocotools 2.0.11 predates NumPy 2's `copy` keyword and is warned about it.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

masks = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 1))


def box(x: int, y: int, width: int, height: int) -> list[list[int]]:
    """Outline of a rectangle of pixels."""
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def annotation(category: int, segmentation: Any, **more: Any) -> dict[str, Any]:
    return {"category_id": category, "segmentation": segmentation} | more


def drawn(*annotations: dict[str, Any], height: int = 3, width: int = 6) -> list[str]:
    """Rows of the label map of categories 10 and 20, of mask values 1 and 2."""
    labels = labels_from_annotations(annotations, {10: 1, 20: 2}, height, width, np.uint8)
    return ["".join("#" if value == IGNORE else str(value) for value in row) for row in labels]


# Drawing --------------------------------------------------------------------------------------------------------------


def test_a_category_has_the_value_of_its_class() -> None:
    assert drawn(annotation(20, box(1, 0, 2, 2))) == ["022000", "022000", "000000"]
    assert drawn() == ["000000"] * 3
    assert drawn(annotation(30, box(0, 0, 1, 1))) == ["#00000", "000000", "000000"], "no class: unknown what it is"


@pytest.mark.parametrize("order", [1, -1])
def test_the_smaller_lies_over_the_larger(order: int) -> None:
    large, small = annotation(10, box(0, 0, 5, 2)), annotation(20, box(1, 1, 2, 2))
    assert drawn(*[large, small][::order]) == ["111110", "122110", "022000"]


def test_of_equal_ones_the_later_lies_over_the_earlier() -> None:
    one, two = annotation(10, box(0, 0, 2, 1)), annotation(20, box(1, 0, 2, 1))
    assert drawn(one, two, height=1) == ["122000"] and drawn(two, one, height=1) == ["112000"]


def test_crowds_are_ignored_also_over_what_is_larger_but_not_over_what_is_smaller() -> None:
    crowd = annotation(10, box(1, 0, 3, 2), iscrowd=1)
    assert drawn(annotation(20, box(0, 0, 6, 2)), crowd, annotation(10, box(2, 0, 1, 1))) == [
        "2#1#22",
        "2###22",
        "000000",
    ]


def test_polygons_of_an_annotation_unite() -> None:
    assert drawn(annotation(10, [*box(0, 0, 3, 1), *box(2, 0, 2, 1)]), height=1) == ["111100"]


def test_sixteen_bits_have_another_ignore() -> None:
    labels = labels_from_annotations([annotation(7, box(0, 0, 1, 1), iscrowd=1)], {7: 300}, 1, 2, np.uint16)
    assert labels.dtype == np.uint16 and labels.tolist() == [[IGNORE_U16, 0]]


@given(masks)
def test_run_lengths_of_both_kinds_are_pycocotools(mask: np.ndarray) -> None:
    packed = coco.encode(np.asfortranarray(mask))
    packed["counts"] = packed["counts"].decode()
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=0, append=2))
    listed = {"size": list(mask.shape), "counts": np.diff(edges, prepend=0).tolist()}
    assert (coco.decode(coco.frPyObjects(listed, *mask.shape)) == mask).all()
    for segmentation in (packed, listed):
        np.testing.assert_array_equal(mask_from_segmentation(segmentation, *mask.shape), mask)


@given(st.lists(st.tuples(*[st.integers(0, 8)] * 2, *[st.integers(1, 9)] * 2), min_size=1, max_size=4))
def test_boxes_are_pycocotools(boxes: list[tuple[int, int, int, int]]) -> None:
    """Other polygons differ along their edges: a pixel is inside here where its centre is."""
    rings = [ring for x, y, width, height in boxes for ring in box(x, y, min(width, 9 - x), min(height, 10 - y))]
    expected = coco.decode(coco.merge(coco.frPyObjects(rings, 10, 9)))
    np.testing.assert_array_equal(mask_from_segmentation(rings, 10, 9), expected)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ("x", "expected polygons, or run lengths of a size"),
        ([[1, 2, 3, 4]], "expected a polygon as numbers"),
        ([[0, 0, 1, 0, 1, float("nan")]], "expected polygons in pixels"),
        ({"size": [2, 3], "counts": [6]}, r"of a size \[3, 2\], got"),
        ({"size": [3, 2], "counts": [5]}, "expected run lengths of 3 x 2 pixels, got a sum of 5"),
        ({"size": [3, 2], "counts": [7, -1]}, "expected run lengths as a text or a list of counts"),
        ({"size": [3, 2], "counts": [6.0]}, "expected run lengths as a text or a list of counts"),
        ({"size": [3, 2], "counts": "€"}, "expected run lengths as a text or a list of counts"),
        ({"size": [3, 2], "counts": "~"}, "got damaged ones"),
        ({"size": [3, 2]}, "expected run lengths as a text or a list of counts"),
    ],
)
def test_segmentations_that_are_none(segmentation: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        mask_from_segmentation(segmentation, 3, 2)


# Behind the seal ------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "set"
    names = ["a.jpg", "b.jpg", "c.jpg"]
    for name in names:
        (root / "train").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 3)).save(root / "train" / name)
    one = annotation(20, box(1, 0, 2, 2), image_id=2, id=1)
    two = annotation(10, {"size": [3, 6], "counts": [0, 3, 15]}, image_id=2, id=2)
    boxed = annotation(10, [], image_id=3, id=3)
    images = [{"id": n, "file_name": name, "height": 3, "width": 6} for n, name in enumerate(names, 1)]
    categories = [{"id": 10, "name": "cat"}, {"id": 20, "name": "dog"}]
    write(root, "train", {"images": images, "annotations": [one, boxed, two], "categories": categories})
    write(root, "tune", {"images": images[1:2], "annotations": [], "categories": categories})
    return DataConfig(root=str(root), format="coco", tune="tune")


def write(root: Path, split: str, content: dict[str, Any]) -> None:
    path = root / f"annotations/instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def truth(config: DataConfig, opener: str = "scorer") -> Truth:
    with trusted(opener, __name__):
        return open_truth(config, "train", opener=opener)


B = [[1, 2, 2, 0, 0, 0]] * 2 + [[1, 0, 0, 0, 0, 0]]


def test_a_named_opener_gets_masks(config: DataConfig) -> None:
    opened = truth(config)
    assert has_truth(config) and opened.ids == ("a", "b", "c")
    assert opened.mask("b", size=(3, 6)).tolist() == B
    assert not opened.mask("a").any(), "without annotations all is background"
    assert [opened.has(i) for i in "abcd"] == [True, True, False, False]
    with pytest.raises(DatasetError, match="train.json: c: expected a mask for each annotation"):
        opened.mask("c")
    with pytest.raises(DatasetError, match="train.json: b: expected the size of its image, 7x3, got 6x3"):
        opened.mask("b", size=(3, 7))
    with pytest.raises(SealedTruthError, match="expected an id of the opened split"):
        opened.mask("d")


def test_others_do_not(config: DataConfig) -> None:
    with pytest.raises(SealedTruthError, match="got module"):
        open_truth(config, "train", opener="scorer")
    truth(config).mask("b")
    with pytest.raises(SealedTruthError):
        Path(config.root, "annotations/instances_train.json").read_text()


def test_the_order_of_classes_txt(config: DataConfig) -> None:
    Path(config.root, "classes.txt").write_text("owl\ndog\ncat\n")
    expected = np.array([0, 3, 2])[np.array(B)]
    np.testing.assert_array_equal(truth(config).mask("b"), expected)


def test_validation_split_sees_the_tune_list_only(config: DataConfig) -> None:
    opened = truth(config, "validation_split")
    assert opened.ids == ("b",) and opened.mask("b").tolist() == B
    with pytest.raises(SealedTruthError):
        opened.mask("a")


def test_it_pickles_small_and_works_in_another_process(config: DataConfig) -> None:
    opened = truth(config)
    opened.mask("b")
    data = pickle.dumps(opened)
    assert len(data) < 2000
    assert pickle.loads(data).mask("b").tolist() == B


def test_a_file_that_changed_since_it_was_opened(config: DataConfig) -> None:
    opened = truth(config)
    path = Path(config.root, "annotations/instances_train.json")
    content = json.loads(subprocess.run(["cat", path], capture_output=True, check=True).stdout)
    content["annotations"].pop()
    write(Path(config.root), "train", content)
    with pytest.raises(DatasetError, match="has changed since it was opened"):
        opened.mask("b")


@pytest.mark.parametrize("height", [0, None, 10**9])
def test_an_image_without_a_size_has_tags_and_no_mask(config: DataConfig, height: int | None) -> None:
    images = [{"id": 1, "file_name": "a.jpg", "height": height, "width": 6}]
    one = annotation(10, box(0, 0, 1, 1), image_id=1)
    write(Path(config.root), "train", {"images": images, "annotations": [one], "categories": [{"id": 10, "name": "x"}]})
    config = replace(config, tune=None)
    assert read(config, "train").samples[0].tags == (0,)
    with pytest.raises(DatasetError, match="train.json: a: expected the height and width of its image"):
        truth(config).mask("a")


def test_masks_of_a_folder_instead(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.full((3, 6), 2, np.uint8)).save(tmp_path / "masks/a.png")
    elsewhere = replace(config, masks=str(tmp_path / "masks"))
    assert (truth(elsewhere).mask("a") == 2).all() and not truth(elsewhere).has("b")
    with pytest.raises(SealedTruthError):
        Path(config.root, "annotations/instances_train.json").read_text()
    with pytest.raises(SealedTruthError):
        (tmp_path / "masks/a.png").read_bytes()


def test_the_fingerprint_follows_the_masks_alone(config: DataConfig) -> None:
    before = masks_fingerprint(config, ["train"])
    path = Path(config.root, "annotations/instances_train.json")
    os.utime(path, (1, 1))
    assert masks_fingerprint(config, ["train"]) == before
    content = json.loads(subprocess.run(["cat", path], capture_output=True, check=True).stdout)
    tags = [sample.tags for sample in read(config, "train")]
    content["annotations"][0]["segmentation"] = box(0, 0, 2, 2)
    write(Path(config.root), "train", content)
    assert masks_fingerprint(config, ["train"]) != before
    assert [sample.tags for sample in read(config, "train")] == tags


def test_the_fingerprint_covers_other_splits_that_are_scored(config: DataConfig) -> None:
    before = [masks_fingerprint(config, [split]) for split in ("train", "more")]
    write(Path(config.root), "more", {"images": [], "annotations": [], "categories": []})
    after = [masks_fingerprint(config, [split]) for split in ("train", "more")]
    assert before[0] == before[1] == after[0] != after[1]
