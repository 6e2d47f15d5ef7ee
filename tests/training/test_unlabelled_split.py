"""VOC's test split: images with neither tags nor masks go through the stages, to the archive that its server takes."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import evaluate, make_cams, pseudo_label, train_affinity, train_classifier, train_segmentation, walk
from weakseg import report
from weakseg.cam_file import read_cam
from weakseg.cli import main
from weakseg.datasets import read
from weakseg.files import write_bytes_atomic, write_json_atomic
from weakseg.masks.png import labels_from_png, png_from_labels
from weakseg.progress import Progress
from weakseg.recipe import AffinityConfig, Recipe, WalkConfig
from weakseg.run_folder import mask_path, prediction_path
from weakseg.submission import VOC_CLASSES

QUIET = Progress("silent")
SIZES = {"t0": (40, 56), "t1": (56, 40)}


@pytest.fixture
def voc(recipe: Recipe, tmp_path: Path) -> Recipe:
    """The recipe of a few seconds over VOC's classes and a split `test` of images without labels."""
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(VOC_CLASSES))
    rng = np.random.default_rng(0)
    sizes = {f"{i:03d}": (48, 64) for i in range(6)} | SIZES
    for sample_id, size in sizes.items():
        image = rng.integers(90, 140, (*size, 3)).astype(np.uint8)
        image[8:32, 8:32] = (220, 40, 40)
        Image.fromarray(image).save(root / f"JPEGImages/{sample_id}.jpg")
    for sample_id in sorted(sizes.keys() - SIZES.keys()):
        xml = "<annotation><object><name>cat</name></object></annotation>"
        (root / f"Annotations/{sample_id}.xml").write_text(xml)
        Image.fromarray(np.full((48, 64), 8, np.uint8)).save(root / f"SegmentationClass/{sample_id}.png")
    for split, ids in (("train", ["000", "001", "002", "003"]), ("val", ["004", "005"]), ("test", list(SIZES))):
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(ids))
    optim = replace(recipe.train.optim, epochs=1)
    assert recipe.train_seg is not None
    return replace(
        recipe,
        data=replace(recipe.data, root=str(root), tags="xml", tune=None),
        train=replace(recipe.train, optim=optim),
        affinity=AffinityConfig(walk=WalkConfig(steps=4), optim=replace(optim, crop_px=80, long_side_px=(64, 80))),
        train_seg=replace(recipe.train_seg, optim=optim),
        evaluate=replace(recipe.evaluate, splits=("val", "test")),
    )


def test_images_without_labels_reach_the_server(
    voc: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    write_json_atomic(folder / "config.json", asdict(voc))
    stages: dict[str, Callable[..., dict[str, object]]] = {
        "train": train_classifier.run,
        "cam": make_cams.run,
        "pseudo_label": pseudo_label.run,
        "affinity": train_affinity.run,
        "random_walk": walk.run,
        "train_seg": train_segmentation.run,
        "evaluate": evaluate.run,
        "report": report.run,
    }
    summary = {stage: run(voc, folder, stage=stage, progress=QUIET) for stage, run in stages.items()}
    for sample_id, size in SIZES.items():
        assert read_cam(folder / f"cam/test/{sample_id}.npz").cam01().shape == (0, *size)
        for stage in ("pseudo_label", "random_walk"):
            labels = labels_from_png(mask_path(folder, "test", sample_id, stage).read_bytes())
            assert labels.shape == size and not labels.any()
    scored = summary["evaluate"]["miou"]
    assert isinstance(scored, dict) and "segmentation-val" in scored
    assert not list((folder / "evaluate").glob("*-test.json")), "there is nothing to score"

    archive = tmp_path / "results.tgz"
    assert main(["submission", str(folder), "--out", str(archive)]) == 0
    with tarfile.open(archive) as opened:
        assert [Path(name).stem for name in opened.getnames()] == [sample.id for sample in read(voc.data, "test")]
        for name in opened.getnames():
            path = prediction_path(folder, "segmentation", "test", Path(name).stem)
            content = opened.extractfile(name)
            assert content is not None
            assert np.array_equal(labels_from_png(content.read()), labels_from_png(path.read_bytes()))

    # What evaluate has not predicted is predicted now: the CRF's, and a file that is gone.
    again = prediction_path(folder, "segmentation", "test", "t0")
    before = again.read_bytes()
    again.unlink()
    assert main(["submission", str(folder), "--out", str(archive)]) == 0
    assert again.read_bytes() == before
    assert not prediction_path(folder, "segmentation_crf", "test", "t0").exists()
    assert main(["submission", str(folder), "--what", "segmentation_crf", "--out", str(archive)]) == 0
    assert prediction_path(folder, "segmentation_crf", "test", "t0").is_file()
    # Other settings than those of the run.
    write_bytes_atomic(again, png_from_labels(np.full(SIZES["t0"], 3, np.uint8)))
    assert main(["submission", str(folder), "--out", str(archive)]) == 0
    assert again.read_bytes() == before
    # A network that was trained since: what an earlier one predicted is not handed in.
    write_bytes_atomic(again, png_from_labels(np.full(SIZES["t0"], 3, np.uint8)))
    os.utime(again, (1, 1))
    assert main(["submission", str(folder), "--out", str(archive)]) == 0
    assert again.read_bytes() == before


def test_a_report_of_nothing_but_unlabelled_images(voc: Recipe, tmp_path: Path) -> None:
    only = replace(voc, affinity=None, train_seg=None, evaluate=replace(voc.evaluate, splits=("test",)))
    for module, stage in ((train_classifier, "train"), (make_cams, "cam"), (pseudo_label, "pseudo_label")):
        module.run(only, tmp_path, stage=stage, progress=QUIET)
    assert evaluate.run(only, tmp_path, stage="evaluate", progress=QUIET)["miou"] == {}
    assert report.run(only, tmp_path, stage="report", progress=QUIET)["n_images"] == len(SIZES)
