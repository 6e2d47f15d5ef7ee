"""A tiny real dataset on disk: coloured squares on grey, three classes told by colour."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from weakseg.recipe import (
    BackboneConfig,
    CamConfig,
    DataConfig,
    EvaluateConfig,
    OptimConfig,
    Recipe,
    SegConfig,
    TrainConfig,
)

COLOURS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 40, 40)}


def write_squares(root: Path, n: int = 12, size: tuple[int, int] = (48, 64)) -> None:
    """VOC layout with masks; image i shows class i % 3, every fourth image nothing."""
    rng = np.random.default_rng(0)
    names = sorted(COLOURS)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(names) + "\n")
    ids = [f"{i:03d}" for i in range(n)]
    shown = {}
    for i, sample_id in enumerate(ids):
        image = rng.integers(90, 140, (*size, 3)).astype(np.uint8)
        mask = np.zeros(size, np.uint8)
        shown[sample_id] = None if i % 4 == 3 else names[i % 3]
        if shown[sample_id]:
            y, x = int(rng.integers(0, size[0] - 24)), int(rng.integers(0, size[1] - 24))
            image[y : y + 24, x : x + 24] = COLOURS[str(shown[sample_id])]
            mask[y : y + 24, x : x + 24] = i % 3 + 1
        Image.fromarray(image).save(root / f"JPEGImages/{sample_id}.jpg", quality=95)
        Image.fromarray(mask).save(root / f"SegmentationClass/{sample_id}.png")
    for split, part in {"train": ids[: n - 4], "val": ids[n - 4 :], "tune": ids[:2]}.items():
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(part) + "\n")
        for name in names:
            lines = (f"{i} {1 if shown[i] == name else -1}\n" for i in part)
            (root / f"ImageSets/Main/{name}_{split}.txt").write_text("".join(lines))


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("squares")
    write_squares(root)
    return root


@pytest.fixture
def recipe(squares: Path) -> Recipe:
    """A recipe of a few seconds over the squares."""
    optim = OptimConfig(epochs=12, batch_size=4, crop_px=32, long_side_px=(32, 48), workers=0, lr=0.02)
    return Recipe(
        name="squares",
        data=DataConfig(root=str(squares), tags="imagesets", tune="tune"),
        backbone=BackboneConfig(freeze_stages=0, freeze_bn=False),
        train=TrainConfig(optim=optim),
        cam=CamConfig(scales=(0.5, 1.0)),
        train_seg=SegConfig(width=16, optim=replace(optim, epochs=1)),
        evaluate=EvaluateConfig(splits=("val",), seg_scales=(1.0,)),
    )
