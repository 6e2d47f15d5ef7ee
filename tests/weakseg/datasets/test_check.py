import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from weakseg.datasets.check import Finding, check
from weakseg.recipe import DataConfig


def found(config: DataConfig, level: str, **options: int) -> list[str]:
    return [f"{f.where}: {f.message}" for f in check(config, **options) if f.level == level]


def save(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(make_voc) -> Path:
    root = Path(make_voc().root)
    for number, path in enumerate(sorted((root / "JPEGImages").iterdir())):  # four different pictures
        save(path, np.full((4, 6, 3), 50 * number, np.uint8))
    return root


@pytest.fixture
def config(root: Path) -> DataConfig:
    return DataConfig(root=str(root), tune="tune")


def test_a_sound_set_has_only_its_tagless_image_to_tell(config: DataConfig, root: Path) -> None:
    (finding,) = check(config)
    assert finding == Finding(
        "warning", str(root / "JPEGImages" / "c.jpg"), "has no tags: all of it counts as background"
    )


def test_everything_is_found_in_one_pass(config: DataConfig, root: Path) -> None:
    lists, images, masks = root / "ImageSets" / "Segmentation", root / "JPEGImages", root / "SegmentationClass"
    (lists / "train.txt").write_text("a\nb\nc\nmissing\n../up\n")
    (lists / "tune.txt").write_text("")
    (images / "a.jpg").write_bytes((images / "a.jpg").read_bytes()[:200])
    shutil.copy(images / "b.jpg", images / "d.jpg")
    labels = (
        '{"classes": ["cat", "dog", "owl"], "images": {"a": {"labels": ["catt"]}, "b": {"labels": ["dog"]}, "c": {}'
    )
    (root / "labels.json").write_text(labels + ', "d": {"labels": ["dog"]}, "missing": {"labels": []}}}')
    save(masks / "b.png", np.zeros((5, 6), np.uint8))
    save(masks / "c.png", np.full((4, 6), 9, np.uint8))
    (masks / "d.png").unlink()

    expected_errors = [
        ("labels.json: images['a']", "unknown class 'catt': did you mean 'cat'?"),
        ("train.txt:3", "labels.json: images['c']: expected the key 'labels'"),
        ("train.txt:4", "expected the image"),
        ("train.txt:5", "expected tags for image '../up'"),
        ("split tune", "empty split"),
        ("a.jpg", "expected a whole JPEG"),
        ("b.jpg", "b.png: expected the size of its image, 6x4, got 6x5"),
        ("c.jpg", "c.png: expected values 0 to 3 or 255, got 9"),
        ("d.jpg", "expected a mask in"),
    ]
    errors = found(config, "error")
    for where, message in expected_errors:
        assert any(where in line and message in line for line in errors), (where, message, errors)
    warnings = found(config, "warning")
    for part in ("class cat: has no training image", "class owl: has no", "c.jpg: has no tags", "is the same file as"):
        assert any(part in line for line in warnings), (part, warnings)
    assert found(config, "error", workers=2) == errors


def test_nothing_is_changed(config: DataConfig, root: Path) -> None:
    def state() -> dict[str, str]:
        files = [path for path in root.rglob("*") if path.is_file() and path.parent.name != "SegmentationClass"]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = state()
    masks = {path: path.stat().st_mtime_ns for path in (root / "SegmentationClass").iterdir()}
    check(config)
    assert state() == before
    assert {path: path.stat().st_mtime_ns for path in (root / "SegmentationClass").iterdir()} == masks


def test_missing_lists_and_folders(config: DataConfig, root: Path, tmp_path: Path) -> None:
    (root / "ImageSets" / "Segmentation" / "val.txt").unlink()
    (error,) = found(config, "error")
    assert "expected the list of split 'val'" in error
    (error,) = found(DataConfig(root=str(tmp_path / "absent")), "error")
    assert "no such folder" in error


def test_a_training_image_may_lack_its_mask(config: DataConfig, root: Path) -> None:
    (root / "SegmentationClass" / "a.png").unlink()
    assert found(config, "error") == []
    assert any("a.jpg: expected a mask" in line for line in found(config, "warning"))
    (root / "SegmentationClass" / "b.png").unlink()  # in train and in tune
    assert any("b.jpg: expected a mask" in line for line in found(config, "error"))


def test_an_image_that_is_learnt_from_and_scored(config: DataConfig, root: Path) -> None:
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("a\nd\n")
    assert "split train: holds 1 images of val too: its figures would be too good" in found(config, "warning")


def test_no_masks_no_findings_about_them(config: DataConfig, root: Path) -> None:
    shutil.rmtree(root / "SegmentationClass")
    assert found(config, "error") == []


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000)])
def test_tiny_and_long_images_are_fine(config: DataConfig, root: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(root / "JPEGImages" / "a.jpg")
    save(root / "SegmentationClass" / "a.png", np.zeros(size[::-1], np.uint8))
    assert found(config, "error") == []


def test_masks_fit_the_upright_image(config: DataConfig, root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, 4x6 upright
    Image.new("RGB", (6, 4)).save(root / "JPEGImages" / "a.jpg", exif=exif)
    assert any("expected the size of its image, 4x6, got 6x4" in line for line in found(config, "error"))


def test_csv_and_folder(tmp_path: Path) -> None:
    for name in ("cat/a.png", "dog/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save(tmp_path / name, np.full((2, 2, 3), len(name) + ord(name[0]), np.uint8))
    folder = DataConfig(root=str(tmp_path), format="folder")
    assert found(folder, "error") == []
    assert found(folder, "warning") == ["split train: holds 2 images of val too: its figures would be too good"]
    (tmp_path / "set.csv").write_text("image,tags,split\ncat/a.png,cat,train\nno.png,cat,train\ncat/a.png,cat,val,x\n")
    errors = found(replace(folder, root=str(tmp_path / "set.csv"), format="csv"), "error")
    assert [line.split(": ")[0].rsplit("/")[-1] for line in errors] == ["set.csv:4", "set.csv:3", "split val"]
