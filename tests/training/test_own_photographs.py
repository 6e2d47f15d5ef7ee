"""A user's own files: a CSV, one class, no masks, every odd kind of image; and clear words on what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import evaluate, make_cams, pseudo_label, train_classifier, train_segmentation
from weakseg.datasets import read
from weakseg.errors import DatasetError, ImageError
from weakseg.masks.png import labels_from_png
from weakseg.progress import Progress
from weakseg.recipe import DataConfig, Recipe

SILENT = Progress("silent")


def write_odd_images(folder: Path) -> dict[str, tuple[int, int]]:
    """{file: upright (height, width)}."""
    rng = np.random.default_rng(0)

    def pixels(height: int, width: int) -> np.ndarray:
        return rng.integers(0, 256, (height, width, 3)).astype(np.uint8)

    rgb = Image.fromarray(pixels(40, 56))
    rgb.save(folder / "rgb.jpg")
    rgb.convert("L").save(folder / "grey.jpg")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.convert("P").save(folder / "palette.png")
    rgb.convert("RGBA").save(folder / "alpha.webp", lossless=True)
    Image.fromarray(rng.integers(0, 65536, (40, 56)).astype(np.uint16)).save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    rgb.save(folder / "rotated.jpg", exif=exif)
    Image.fromarray(pixels(1, 1)).save(folder / "dot.png")
    Image.fromarray(pixels(1, 5000)).save(folder / "line.png")
    upright = (40, 56)
    usual = dict.fromkeys(["rgb.jpg", "grey.jpg", "cmyk.jpg", "palette.png", "alpha.webp", "sixteen.png"], upright)
    return usual | {"rotated.jpg": (56, 40), "dot.png": (1, 1), "line.png": (1, 5000)}


@pytest.fixture
def own(recipe: Recipe, tmp_path: Path) -> Recipe:
    write_odd_images(tmp_path)
    tagged = "".join(f"{name},thing\n" for name in sorted(p.name for p in tmp_path.iterdir()) if name != "grey.jpg")
    (tmp_path / "labels.csv").write_text(f"image,tags\n{tagged}grey.jpg,\n")
    data = DataConfig(root=str(tmp_path / "labels.csv"), format="csv")
    optim = replace(recipe.train.optim, epochs=1, workers=1)
    seg = replace(recipe.train_seg, optim=replace(optim, crop_px=32))
    return replace(recipe, data=data, train=replace(recipe.train, optim=optim), train_seg=seg)


def test_one_class_no_masks_odd_images_end_to_end(own: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for stage, run in (
        ("train", train_classifier.run),
        ("cam", make_cams.run),
        ("pseudo_label", pseudo_label.run),
        ("train_seg", train_segmentation.run),
    ):
        run(own, folder, stage=stage, progress=SILENT)
    summary = evaluate.run(own, folder, stage="evaluate", progress=SILENT)
    assert summary["miou"] == {}, "nothing to score without masks"
    (refiner,) = (json.loads(path.read_text()) for path in (folder / "evaluate").glob("*.json"))
    assert (refiner["what"], refiner["n_images"], refiner["miou"]) == ("refiner", 8, None), "one has no tags"
    sizes = {Path(name).stem: size for name, size in write_odd_images(tmp_path).items()}
    for sample in read(own.data, "val"):
        for path in (f"pseudo_label/val/{sample.id}.png", f"evaluate/segmentation/val/{sample.id}.png"):
            labels = labels_from_png((folder / path).read_bytes())
            assert labels.shape == sizes[Path(sample.image).stem]
            assert set(np.unique(labels)) <= {0, 1, 255}
        if not sample.tags:
            assert not labels_from_png((folder / f"pseudo_label/val/{sample.id}.png").read_bytes()).any()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_is_named_without_a_traceback(own: Recipe, tmp_path: Path, workers: int) -> None:
    data = (tmp_path / "rgb.jpg").read_bytes()
    (tmp_path / "rgb.jpg").write_bytes(data[: len(data) // 2])
    recipe = replace(own, train=replace(own.train, optim=replace(own.train.optim, workers=workers, batch_size=9)))
    with pytest.raises(ImageError, match=r"rgb\.jpg") as caught:
        train_classifier.run(recipe, tmp_path / "run", stage="train", progress=SILENT)
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run/train/classifier.pt").exists()


def test_an_empty_dataset(own: Recipe, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("image,tags\n")
    with pytest.raises(DatasetError, match=r"labels\.csv"):
        train_classifier.run(own, tmp_path / "run", stage="train", progress=SILENT)
