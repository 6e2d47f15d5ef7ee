"""SEAM through the stages, on what people's folders hold: empty tags, classes nobody shows, images of a few pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import make_cams, memory, pseudo_label, train_classifier
from weakseg.cam_file import read_cam
from weakseg.errors import ConfigError, TrainingError
from weakseg.progress import Progress
from weakseg.recipe import Recipe, SeamConfig

QUIET = Progress("silent")
SIZES = ((48, 64), (40, 40), (7, 90), (3, 2), (1, 1))  # height, width; the network's stride is 16


@pytest.fixture
def seam(recipe: Recipe) -> Recipe:
    optim = replace(recipe.train.optim, epochs=1, crop_px=64, long_side_px=(48, 64))
    train = replace(recipe.train, method="seam", seam=SeamConfig(rescale=0.5), optim=optim)
    cam = replace(recipe.cam, method="pcm", normalisation="minmax")
    return replace(recipe, train=train, cam=cam, pseudo_label=replace(recipe.pseudo_label, crf=None))


def write_photographs(root: Path, n_classes: int, tags: Sequence[tuple[int, ...]], split: str = "train") -> None:
    """VOC layout without masks; photograph i has SIZES[i % 5]."""
    rng = np.random.default_rng(0)
    names = [f"class{c}" for c in range(n_classes)]
    for folder in ("JPEGImages", "ImageSets/Segmentation", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(names) + "\n")
    for i in range(len(tags)):
        pixels = rng.integers(0, 256, (*SIZES[i % len(SIZES)], 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"JPEGImages/{i}.jpg")
    (root / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{i}\n" for i in range(len(tags))))
    for c, name in enumerate(names):
        lines = "".join(f"{i} {1 if c in present else -1}\n" for i, present in enumerate(tags))
        (root / f"ImageSets/Main/{name}_{split}.txt").write_text(lines)


def through(recipe: Recipe, root: Path, folder: Path) -> None:
    """Images to pseudo-masks."""
    data = replace(recipe.data, root=str(root), tune=None)
    recipe = replace(recipe, data=data, evaluate=replace(recipe.evaluate, splits=("train",)))
    train_classifier.run(recipe, folder, stage="train", progress=QUIET)
    make_cams.run(recipe, folder, stage="cam", progress=QUIET)
    pseudo_label.run(recipe, folder, stage="pseudo_label", progress=QUIET)


@pytest.mark.parametrize(
    ("n_classes", "tags"),
    [
        (1, [(0,)] * 5),
        (4, [(0, 1, 2, 3), (2,), (3,), (), (1,)]),  # the authors' code is made for 20
        (3, [(0,), (0,), (0, 1), (1,), (0,)]),  # the third class is in no image
        (2, [(), (0, 1), (), (), (0,)]),
    ],
)
def test_any_classes_and_sizes(seam: Recipe, tmp_path: Path, n_classes: int, tags: list[tuple[int, ...]]) -> None:
    write_photographs(tmp_path / "data", n_classes, tags)
    through(seam, tmp_path / "data", tmp_path / "run")
    for i, present in enumerate(tags):
        height, width = SIZES[i]
        mask = np.asarray(Image.open(next((tmp_path / "run/pseudo_label").rglob(f"{i}.png"))))
        assert mask.shape == (height, width)
        assert set(np.unique(mask)) <= {0, 255, *(c + 1 for c in present)}
        if not present:
            assert (mask == 0).all()
        cam = read_cam(next((tmp_path / "run/cam").rglob(f"{i}.npz")))
        assert cam.cam01("minmax").shape == (len(present), height, width)
        assert np.isfinite(cam.cam01("minmax")).all()


def test_a_loss_that_is_not_finite_names_the_images(seam: Recipe, tmp_path: Path) -> None:
    write_photographs(tmp_path / "data", 2, [(0,), (1,), (0, 1), (0,)])
    wild = replace(seam.train.optim, lr=1e30, epochs=4, warmup_steps=0)
    seam = replace(seam, train=replace(seam.train, optim=wild))
    with pytest.raises(TrainingError, match=r"not finite at step \d+ .*images: \d, \d, \d, \d"):
        through(seam, tmp_path / "data", tmp_path / "run")
    assert not (tmp_path / "run/train/classifier.pt").exists()


def test_too_little_memory_names_what_the_module_may_take(
    seam: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 20)
    with pytest.raises(ConfigError, match=r"lower optim.crop_px \(now 64\) or train.seam.pcm_mib \(now 256\)"):
        train_classifier.run(seam, tmp_path, stage="train", progress=QUIET)


def test_a_second_view_of_one_cell_is_refused(seam: Recipe, tmp_path: Path) -> None:
    train = replace(seam.train, optim=replace(seam.train.optim, crop_px=32))
    expected = r"would be 16 px, less than two cells of 16 px: raise train.optim.crop_px \(now 32\) or train.seam"
    with pytest.raises(ConfigError, match=expected):
        train_classifier.run(replace(seam, train=train), tmp_path, stage="train", progress=QUIET)
