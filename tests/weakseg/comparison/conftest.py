"""Recipes and run folders of comparisons, without a training."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from pprint import pformat
from typing import Any

import numpy as np
import pytest

from tests.training.conftest import write_squares
from weakseg.cam_file import CamFile
from weakseg.datasets import read
from weakseg.files import write_json_atomic
from weakseg.recipe import BackboneConfig, CamConfig, DataConfig, EvaluateConfig, OptimConfig, Recipe, TrainConfig
from weakseg.records import to_json
from weakseg.scoring import SWEEP_THRESHOLDS

# `weakseg run` as far as a comparison sees it. KEYS: {folder's name: its stage keys}.
DONE = """
import json, os, sys
folder, last = sys.argv[6], sys.argv[8]
keys = json.loads(os.environ["KEYS"])[os.path.basename(folder)]
for stage in ["train"] if last == "train" else ["cam", "pseudo_label", "evaluate"]:
    os.makedirs(f"{folder}/{stage}", exist_ok=True)
    json.dump({"key": keys[stage], "cpu_seconds": 7.5, "n_images": 8}, open(f"{folder}/{stage}/done.json", "w"))
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A Python script that runs in place of `python`; the arguments follow it."""
    path = tmp_path / "child.py"
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -S {path} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(wrapper))
    return path


@pytest.fixture
def squares(tmp_path: Path) -> Recipe:
    """The plain recipe over coloured squares: seconds."""
    write_squares(tmp_path / "squares")
    optim = OptimConfig(epochs=2, batch_size=4, crop_px=64, long_side_px=(64, 80), workers=0)
    return Recipe(
        name="squares",
        data=DataConfig(root=str(tmp_path / "squares"), tags="imagesets", tune="tune"),
        backbone=BackboneConfig(name="small_resnet", freeze_stages=0, freeze_bn=False),
        train=TrainConfig(optim=optim),
        cam=CamConfig(scales=(1.0,), flip=False),
        evaluate=EvaluateConfig(splits=("val",)),
    )


@pytest.fixture
def recipe_file(squares: Recipe, tmp_path: Path) -> Path:
    return write_recipe(squares, tmp_path / "plain.py")


def write_recipe(recipe: Recipe, path: Path) -> Path:
    path.write_text(f"from weakseg.recipe import *\nRECIPE = {pformat(recipe)}\n")
    return path


def write_scores(folder: Path, split: str, **miou: float) -> None:
    """What the stage evaluate leaves, with two rows of classes; of calibration nothing, as before it was counted."""
    for what, value in miou.items():
        record: dict[str, Any] = {"what": what, "split": split, "miou": value, "boundary_f": 0.5}
        record |= {"fp": {"background": 0.1, "cat": 0.3, "dog": None}, "fn": {"background": 0.2, "cat": 0.1}}
        curve = {"t": [float(t) for t in SWEEP_THRESHOLDS], "miou": [value] * len(SWEEP_THRESHOLDS)}
        record |= {"threshold": {"t": 0.3}, "curve": curve if what == "cam" else None}
        write_json_atomic(folder / "evaluate" / f"{what}-{split}.json", record)


def write_costs(folder: Path, cpu_seconds: float | None, peak_mib: float) -> None:
    write_json_atomic(folder / "train/cost.json", {"cpu_seconds": cpu_seconds, "peak_mib": peak_mib})


def write_maps(folder: Path, recipe: Recipe) -> None:
    """A run that has come to its pseudo-masks, with maps of noise on the split val."""
    rng = np.random.default_rng(0)
    write_json_atomic(folder / "config.json", to_json(replace(recipe, train_seg=None)))
    write_json_atomic(folder / "pseudo_label/threshold.json", {"t": 0.4, "rule": "fixed", "provenance": "recipe"})
    write_json_atomic(folder / "pseudo_label/done.json", {"key": "k"})
    for sample in read(recipe.data, "val"):
        maps = rng.random((len(sample.tags), 12, 16)).astype(np.float16)
        scores = rng.random(3).astype(np.float32)
        CamFile(np.array(sample.tags, np.int32), maps, 48, 64, scores).save(folder / f"cam/val/{sample.id}.npz")
