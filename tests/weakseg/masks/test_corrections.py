import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from weakseg.classes import IGNORE, ClassTable
from weakseg.datasets import Dataset, Sample, read
from weakseg.errors import ConfigError, DataError, DatasetError, ImageError, SealedTruthError, UnknownClassError
from weakseg.masks import coco as coco_file
from weakseg.masks import cvat, label_studio
from weakseg.masks.corrections import corrections_of, fingerprint, read_corrections
from weakseg.masks.labelled import LabelledImage
from weakseg.masks.png import png_from_labels
from weakseg.recipe import DataConfig

CLASSES = ClassTable(("cat", "dog"))
LABELS = np.array([[0, 1, 1], [2, IGNORE, 0]], dtype=np.uint8)


def write_png(path: Path, labels: np.ndarray = LABELS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_from_labels(labels))


def dataset_of(root: Path, *names: str, tags: tuple[int, ...] = (0, 1), ids: dict[str, str] | None = None) -> Dataset:
    """Images of 3 x 2 pixels, with ids as the readers make them."""
    samples = []
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2)).save(path)
        samples.append(Sample((ids or {}).get(name) or name.rpartition(".")[0], path, tags))
    return Dataset(CLASSES, tuple(samples), "train", root)


def coco(*names: str, **more: Any) -> bytes:
    images = [{"id": n, "file_name": name, "height": 2, "width": 3} for n, name in enumerate(names)]
    annotations = [
        {"id": n, "image_id": n, "category_id": 7, "segmentation": {"size": [2, 3], "counts": [0, 2, 4]}}
        for n in range(len(names))
    ]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "dog"}]} | more
    return json.dumps(content).encode()


def found(path: Path, dataset: Dataset) -> dict[str, str]:
    """{sample id: name}, told by one mask after the other."""
    names = [image.name for image in read_corrections(path, dataset.classes)]
    return dict(zip((one.sample.id for one in corrections_of(path, dataset)), names, strict=True))


# Formats --------------------------------------------------------------------------------------------------------------


def test_a_folder_of_index_pngs(tmp_path: Path) -> None:
    write_png(tmp_path / "b.png")
    write_png(tmp_path / "sub/a.PNG", np.ones((4, 5), np.uint8))
    write_png(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("no mask")
    b, a = read_corrections(tmp_path, CLASSES)
    assert (b.name, a.name) == ("b.png", "sub/a.PNG")
    np.testing.assert_array_equal(b.labels, LABELS)


def from_label_studio(image: LabelledImage) -> bytes:
    """As exported after somebody has accepted the prediction."""
    (task,) = json.loads(
        b"".join(label_studio.tasks_json([image], CLASSES, image_url="/data/local-files/?d={}".format))
    )
    return json.dumps([{"data": task["data"], "annotations": task["predictions"]}]).encode()


@pytest.mark.parametrize(
    "written",
    [
        from_label_studio,
        lambda image: b"".join(cvat.annotations_xml([image], CLASSES)),
        lambda image: b"".join(coco_file.instances_json([image], CLASSES)),
        lambda image: b"\xef\xbb\xbf" + b"".join(coco_file.instances_json([image], CLASSES)),
        lambda image: b"\n " + b"".join(coco_file.instances_json([image], CLASSES)),
    ],
    ids=["label_studio", "cvat", "coco", "coco with a mark", "coco after a blank line"],
)
def test_every_format_is_known_by_its_content(tmp_path: Path, written: Callable[[LabelledImage], bytes]) -> None:
    labels = np.array([[0, 1, 1], [2, 0, 0]], dtype=np.uint8)
    (tmp_path / "masks").write_bytes(written(LabelledImage("sub/a.jpg", labels)))
    (image,) = read_corrections(tmp_path / "masks", CLASSES)
    assert image.name == "sub/a.jpg"
    np.testing.assert_array_equal(image.labels, labels)
    (correction,) = corrections_of(tmp_path / "masks", dataset_of(tmp_path / "set", "sub/a.jpg"))
    assert correction.sample.id == "sub/a"


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", DataError, "got a file that begins with b''"),
        (b"PK\x03\x04", DataError, "expected JSON of Label Studio or COCO, XML of CVAT, or a folder .* got a file"),
        (b"{}", DataError, "masks: expected a COCO instances file"),
        (b"{", DataError, "masks: expected a COCO instances file"),
        (b"[{}]", DataError, "masks: expected a JSON export of Label Studio"),
        (b"<a/>", DataError, "masks: expected a file of CVAT"),
        (coco("a.jpg", categories=[{"id": 7, "name": "dgo"}]), UnknownClassError, "masks: .*unknown class 'dgo'"),
        (None, ConfigError, "expected corrected masks in .*masks, got: No such file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, error, message: str) -> None:
    if content is not None:
        (tmp_path / "masks").write_bytes(content)
    with pytest.raises(error, match=message):
        list(read_corrections(tmp_path / "masks", CLASSES))


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (np.full((2, 3), 3, np.uint8), UnknownClassError, "a.png: expected values 0 to 2 or 255, got 3"),
        (np.zeros((2, 3), np.uint16), DatasetError, "a.png: expected uint8 values for 2 classes, got uint16"),
    ],
)
def test_pngs_that_are_no_label_maps_of_these_classes(tmp_path: Path, labels: np.ndarray, error, message: str) -> None:
    write_png(tmp_path / "a.png", labels)
    with pytest.raises(error, match=message):
        list(read_corrections(tmp_path, CLASSES))


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sample_id"),
    [
        ("photos/cats/1.jpg", "photos/cats/1"),
        ("cats/1.jpg", "photos/cats/1"),
        ("cats/1.png", "photos/cats/1"),
        ("photos/dogs/1", "photos/dogs/1"),
        ("2.jpg", "photos/dogs/2"),
        ("2", "photos/dogs/2"),
        ("elsewhere/2.png", "photos/dogs/2"),
        ("s3://bucket/photos/dogs/1.jpg", "photos/dogs/1"),
        ("https://example.org/x/photos/cats/1.jpg?token=dogs/1.jpg", "photos/cats/1"),
        ("https://example.org/with%20space.jpg", "with space"),
        ("C:\\photos\\cats\\1.jpg", "photos/cats/1"),
        ("/srv/photos/cats/1.jpg", "photos/cats/1"),
        ("../photos/cats/1.jpg", "photos/cats/1"),
        ("v1.2.jpg", "v1.2"),
        ("v1.2", "v1.2"),
    ],
)
def test_a_name_leads_to_the_image_whose_path_ends_like_it(tmp_path: Path, name: str, sample_id: str) -> None:
    images = ("photos/cats/1.jpg", "photos/dogs/1.jpg", "photos/dogs/2.jpg", "with space.jpg", "v1.2.jpg")
    dataset = dataset_of(tmp_path / "set", *images)
    (tmp_path / "masks.json").write_bytes(coco(name))
    assert found(tmp_path / "masks.json", dataset) == {sample_id: name}


def test_an_id_that_is_not_the_path(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path / "set", "x/a.jpg", "x/b.jpg", ids={"x/a.jpg": "first", "x/b.jpg": "second"})
    (tmp_path / "masks.json").write_bytes(coco("second", "a.jpg"))
    assert found(tmp_path / "masks.json", dataset) == {"second": "second", "first": "a.jpg"}


def test_of_two_files_with_one_name_the_suffix_tells(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path / "set", "a.jpg", "a.png", ids={"a.jpg": "x", "a.png": "y"})
    (tmp_path / "masks.json").write_bytes(coco("a.png", "a.jpg"))
    assert found(tmp_path / "masks.json", dataset) == {"y": "a.png", "x": "a.jpg"}


def test_names_of_a_runs_own_masks(tmp_path: Path) -> None:
    """A corrected copy of <run>/pseudo_label/train."""
    dataset = dataset_of(tmp_path / "set", "JPEGImages/a.jpg", "JPEGImages/b.jpg")
    write_png(tmp_path / "train/b.png")
    assert found(tmp_path / "train", dataset) == {"JPEGImages/b": "b.png"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("1.jpg",), "expected a name that leads to one image, got '1.jpg' for .*cats/1.jpg, .*dogs/1.jpg"),
        (("x/1.jpg",), "expected a name that leads to one image, got 'x/1.jpg'"),
        (("2.jpg", "9.jpg"), "such as .*cats/1.jpg, got '9.jpg': 1 of 2 lead to an image"),
        (("7", "2.jpg", "8", "9", "10", "11", "12"), "got '7', '8', '9', '10', '11', …: 1 of 7 lead to an image"),
        (("2.jpg", "dogs/2.png"), "expected every image once, got '2.jpg' and 'dogs/2.png' for .*dogs/2.jpg"),
        ((".",), "0 of 1 lead"),
        ((), "expected corrected masks, got none"),
    ],
)
def test_names_that_do_not_lead_to_one_image(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    dataset = dataset_of(tmp_path / "set", "cats/1.jpg", "dogs/1.jpg", "dogs/2.jpg")
    (tmp_path / "masks.json").write_bytes(coco(*names))
    with pytest.raises(DatasetError, match=f"masks.json: .*{message}"):
        list(corrections_of(tmp_path / "masks.json", dataset))


def test_a_mask_of_another_size(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path / "set", "a.jpg")
    write_png(tmp_path / "masks/a.png", np.zeros((3, 2), np.uint8))
    with pytest.raises(DatasetError, match="the mask of 'a.png' to have the size of .*a.jpg, 3x2, got 2x3"):
        list(corrections_of(tmp_path / "masks", dataset))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying
    Image.new("RGB", (3, 2)).save(tmp_path / "set/a.jpg", exif=exif)
    assert len(list(corrections_of(tmp_path / "masks", dataset))) == 1


def test_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path / "set", "a.jpg")
    write_png(tmp_path / "masks/a.png")
    (tmp_path / "set/a.jpg").write_text("no image")
    with pytest.raises(ImageError, match="a.jpg: expected JPEG"):
        list(corrections_of(tmp_path / "masks", dataset))
    (tmp_path / "set/a.jpg").unlink()
    with pytest.raises(ImageError, match="a.jpg: expected an image file, got: No such file"):
        list(corrections_of(tmp_path / "masks", dataset))


def test_classes_that_the_tags_lack_are_told(tmp_path: Path) -> None:
    write_png(tmp_path / "masks/a.png")
    for tags, beyond in (((0, 1), ()), ((0,), (1,)), ((), (0, 1))):
        (one,) = corrections_of(tmp_path / "masks", dataset_of(tmp_path / "set", "a.jpg", tags=tags))
        assert one.beyond_tags == beyond


def test_sealed_truth_is_no_correction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even by mistake: neither the masks of the training images nor COCO's annotations of them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "set"
    dataset_of(root / "train", "a.jpg")
    (root / "annotations").mkdir()
    (root / "annotations/instances_train.json").write_bytes(coco("a.jpg"))
    write_png(tmp_path / "masks/a.png")
    config = DataConfig(root=str(root), format="coco", masks=str(tmp_path / "masks"))
    dataset = read(config, "train")
    for path in (root / "annotations/instances_train.json", tmp_path / "masks"):
        for look in (lambda path=path: list(corrections_of(path, dataset)), lambda path=path: fingerprint(path)):
            with pytest.raises(SealedTruthError):
                look()


# Fingerprint ----------------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    file, same, folder = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "masks"
    for path in (file, same):
        path.write_bytes(coco("a.jpg"))
    assert fingerprint(file) == fingerprint(same)
    same.write_bytes(coco("b.jpg"))
    assert fingerprint(file) != fingerprint(same)
    write_png(folder / "a.png")
    (folder / "notes.txt").write_text("no mask")
    one = fingerprint(folder)
    (folder / "notes.txt").unlink()
    assert fingerprint(folder) == one
    write_png(folder / "a.png", 1 - LABELS // 255)
    two = fingerprint(folder)
    (folder / "a.png").rename(folder / "b.png")
    assert len({one, two, fingerprint(folder)}) == 3
    with pytest.raises(ConfigError, match="expected corrected masks in .*absent, got: No such file"):
        fingerprint(tmp_path / "absent")
