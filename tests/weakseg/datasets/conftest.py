import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from weakseg.recipe import DataConfig

MakeVoc = Callable[..., DataConfig]

TAGS = {"a": ["cat"], "b": ["cat", "dog"], "c": [], "d": ["dog"]}
SPLITS = {"train": ["a", "b", "c"], "val": ["d"], "tune": ["b"]}


def write_image(path: Path, size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(path)


def write_mask(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)


@pytest.fixture
def make_voc(tmp_path: Path) -> MakeVoc:
    """A VOC-layout set of four images with masks; `tags` says which label sources are written."""

    def make(*sources: str, root: Path = tmp_path / "set") -> DataConfig:
        for sample_id, tags in TAGS.items():
            write_image(root / "JPEGImages" / f"{sample_id}.jpg")
            mask = np.zeros((4, 6), dtype=np.uint8)
            mask[:2, : len(tags)] = 1
            write_mask(root / "SegmentationClass" / f"{sample_id}.png", mask)
        lists = root / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        for split, ids in SPLITS.items():
            (lists / f"{split}.txt").write_text("\n".join(ids) + "\n")
        for source in sources or ("labels.json",):
            {"labels.json": write_labels_json, "xml": write_xml, "imagesets": write_imagesets}[source](root)
        return DataConfig(root=str(root), tune="tune")

    return make


def write_labels_json(root: Path) -> None:
    images = {sample_id: {"labels": tags} for sample_id, tags in TAGS.items()}
    (root / "labels.json").write_text(json.dumps({"classes": ["cat", "dog"], "images": images}))


def write_xml(root: Path) -> None:
    (root / "Annotations").mkdir(exist_ok=True)
    for sample_id, tags in TAGS.items():
        objects = "".join(f"<object><name>{t}</name><part><name>head</name></part></object>" for t in tags)
        (root / "Annotations" / f"{sample_id}.xml").write_text(f"<annotation>{objects}</annotation>")


def write_imagesets(root: Path) -> None:
    main = root / "ImageSets" / "Main"
    main.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):  # the tune list has no files of its own, as is usual
        for name in ("cat", "dog"):
            lines = [f"{i} {' 1' if name in TAGS[i] else '-1'}" for i in SPLITS[split]]
            (main / f"{name}_{split}.txt").write_text("\n".join(lines) + "\n")
