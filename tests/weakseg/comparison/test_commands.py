"""`weakseg compare --methods`: real trainings over coloured squares, one of them killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.weakseg.comparison.conftest import write_recipe
from weakseg.cli import main
from weakseg.recipe import BackboneConfig, PseudoLabelConfig, Recipe, SegConfig

LONG_S = 240.0


def compare(root: Path, *arguments: str) -> list[str]:
    return ["compare", "--folder", str(root), "--segmentation", "none", *arguments]


def stamps(run: Path) -> dict[str, int]:
    """When each stage of a run was finished."""
    return {path.parent.name: path.stat().st_mtime_ns for path in run.glob("*/done.json")}


def until(condition: Callable[[], bool], child: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + LONG_S
    while not condition():
        assert child.poll() is None and time.monotonic() < end, "it ended before it could be killed"
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a training outlives its comparison")
def test_two_methods_one_killed_midway(squares: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a worker, which lives on for a while."""
    optim = replace(squares.train.optim, epochs=6, checkpoint_every_s=0.0, workers=1)
    recipe = replace(squares, train=replace(squares.train, optim=optim), pseudo_label=PseudoLabelConfig(crf=None))
    root, file = tmp_path / "comparison", write_recipe(recipe, tmp_path / "plain.py")
    command = [sys.executable, "-m", "weakseg", *compare(root, "--methods", "seam", "--recipe", str(file))]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until((root / "seam-0/train/checkpoint.pt").is_file, child)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert not (root / "seam-0/train/done.json").exists()
    plain = stamps(root / "cam-0")
    assert set(plain) == {"train", "cam", "pseudo_label", "evaluate"}

    assert main(compare(root, "--methods", "seam", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert stamps(root / "cam-0") == plain, "what was done is not done again"
    assert list(found["methods"]) == ["cam", "seam"]
    for name, method in found["methods"].items():
        assert method["errors"] == {}
        for split in ("train", "val"):
            assert {"cam", "fp", "fn", "boundary_f", "ece", "brier"} <= set(method["splits"][split])
        assert method["costs"]["train_peak_mib"]["mean"] > 50
        assert ("train_cpu_seconds" in method["costs"]) == (name == "cam"), "seam's was killed: what it took is unknown"
    assert {path.name for path in root.iterdir()} == {
        ".lock",
        "cam-0",
        "seam-0",
        "comparison.json",
        "table.md",
        "panel.webp",
        "report.html",
    }


def test_two_processes_share_the_work(squares: Recipe, tmp_path: Path) -> None:
    """Each training is made once, by one of them, and the classifier that others look at before they do."""
    recipe = replace(squares, pseudo_label=PseudoLabelConfig(crf=None))
    root, file = tmp_path / "comparison", write_recipe(recipe, tmp_path / "plain.py")
    both = []
    for added in ("acol", "mixup_cam"):
        arguments = compare(root, "--methods", "cam/layer_cam", added, "--recipe", str(file), "--json")
        command = [sys.executable, "-m", "weakseg", *arguments]
        both.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        said = [child.communicate(timeout=LONG_S) for child in both]
    finally:
        for child in both:
            child.kill()
    assert [(child.returncode, err) for child, (_, err) in zip(both, said, strict=True)] == [(0, "")] * 2
    found = json.loads((root / "comparison.json").read_text())
    assert set(found["methods"]) == {"cam", "cam/layer_cam", "acol", "mixup_cam"}
    for name, method in found["methods"].items():
        assert method["errors"] == {} and "cam" in method["splits"]["val"]
        log = (root / f"{name.replace('/', '.')}-0/log.txt").read_text()
        assert log.count("train: started") == (name != "cam/layer_cam")
    assert (root / "cam.layer_cam-0/train/classifier.pt").samefile(root / "cam-0/train/classifier.pt")


def test_a_failure_is_named(squares: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tags and masks are there, weights are not."""
    recipe = replace(squares, backbone=BackboneConfig("resnet50", weights=str(tmp_path / "none.pth")))
    root, file = tmp_path / "comparison", write_recipe(recipe, tmp_path / "plain.py")
    assert main(compare(root, "--recipe", str(file), "--methods", "cam")) == 3
    printed = capsys.readouterr()
    assert f"failed: cam, seed 0: no weights file {tmp_path / 'none.pth'}" in printed.out
    assert "cam, seed 0: train: started" in printed.err
    assert "none.pth" in (root / "cam-0/log.txt").read_text()
    assert "Failed" in (root / "report.html").read_text()


@pytest.mark.slow
def test_the_others_go_on_and_more_are_added_later(
    squares: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SEAM's second view of such crops would be less than two cells. Then other maps of what is there are added."""
    optim = replace(squares.train.optim, epochs=1, crop_px=32, long_side_px=(32, 48))
    network = SegConfig(width=8, optim=optim)
    recipe = replace(squares, train=replace(squares.train, optim=optim), train_seg=network)
    root, file = tmp_path / "comparison", write_recipe(recipe, tmp_path / "plain.py")
    first = compare(root, "--recipe", str(file), "--budget", "16", "--methods", "seam")
    assert main(first) == 3
    assert "failed: seam, seed 0: the second view of SEAM would be 16 px" in capsys.readouterr().out
    assert json.loads((root / "cam-0/config.json").read_text())["train"]["optim"]["epochs"] == 2

    plain = stamps(root / "cam-0")
    added = ["compare", "--folder", str(root), "--methods", "cam/layer_cam", "--segmentation", "some", "--json"]
    assert main(added) == 3, "seam is in the table still"
    found = json.loads(capsys.readouterr().out)
    assert list(found["methods"]) == ["cam", "seam", "cam/layer_cam"] and found["budget"] == 16
    assert stamps(root / "cam-0") == plain
    mapped = root / "cam.layer_cam-0"
    assert (mapped / "train/classifier.pt").samefile(root / "cam-0/train/classifier.pt")
    assert set(found["segmented"]) == {"cam", "cam/layer_cam"}
    assert "segmentation" in found["methods"]["cam"]["splits"]["val"]
    assert (root / "cam-0-segmentation/cam/val/008.npz").samefile(root / "cam-0/cam/val/008.npz")

    assert main([*first, "--train.optim.lr", "0.5"]) == 2
    assert "holds a comparison on other terms" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "sema"], "did you mean 'seam'"),
        (["--methods", "cam", "--recipe", "seam_synthetic"], "expected the recipe of the plain classifier"),
        (["--methods", "cam", "--train_seg", "none", "--segmentation", "some"], "train_seg is none: set --seg"),
        (["--methods=cam", "--train.optim.epoch", "3"], "did you mean --train.optim.epochs"),
    ],
)
def test_bad_arguments_leave_no_folder(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe_file: Path
) -> None:
    recipe = [] if "--recipe" in arguments else ["--recipe", str(recipe_file)]
    assert main(compare(tmp_path / "comparison", *arguments, *recipe)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "comparison").exists()
