"""A further round on masks that the first round's network made."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from training import evaluate, make_cams, pseudo_label, train_classifier, train_segmentation
from training.self_training import FOLDER, sure_labels
from weakseg.classes import IGNORE
from weakseg.datasets import read
from weakseg.errors import ConfigError
from weakseg.masks.png import labels_from_png, provenance_of
from weakseg.progress import Progress
from weakseg.recipe import CrfConfig, Recipe
from weakseg.run_folder import mask_path, prediction_path, read_json
from weakseg.stages import stage_keys

QUIET = Progress("silent")


def test_only_the_images_own_classes_compete_and_what_is_unsure_is_ignored() -> None:
    logits = np.full((4, 2, 3), -4, dtype=np.float32)
    logits[2] = 9  # a class that the image does not have
    logits[0, :, 0], logits[1, :, 2] = 4, 4  # background on the left, the tagged class on the right
    labels = sure_labels(logits, np.array([0]), 8, 12, sure=0.9)
    assert set(np.unique(labels)) == {0, 1, IGNORE}
    assert (labels[:, 0] == 0).all() and (labels[:, -1] == 1).all() and (labels[:, 5] == IGNORE).all()
    assert set(np.unique(sure_labels(logits, np.array([0]), 8, 12, sure=0.0))) == {0, 1}
    assert (sure_labels(logits, np.array([], dtype=int), 8, 12, sure=0.9) == 0).all()


def test_the_second_round_learns_from_the_first_and_goes_on_where_it_stopped(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = replace(recipe.evaluate, seg_crf=CrfConfig(iterations=2))
    recipe = replace(recipe, train_seg=replace(recipe.train_seg, rounds=2, sure=0.3), evaluate=evaluated)
    for module, stage in ((train_classifier, "train"), (make_cams, "cam"), (pseudo_label, "pseudo_label")):
        module.run(recipe, tmp_path, stage=stage, progress=QUIET)
    done = train_segmentation.run(recipe, tmp_path, stage="train_seg", progress=QUIET)
    first, second = tmp_path / "train_seg/round-1", tmp_path / "train_seg"
    before = {path: path.read_bytes() for path in (first / "segmentation.pt", second / "segmentation.pt")}
    assert before[first / "segmentation.pt"] != before[second / "segmentation.pt"]
    samples = list(read(recipe.data, "train"))
    per_round = done["steps"] * recipe.train_seg.optim.batch_size
    assert done["n_images"] == 2 * per_round + len(samples)
    for sample in samples:
        made = mask_path(first, "train", sample.id, FOLDER).read_bytes()
        assert set(np.unique(labels_from_png(made))) <= {0, IGNORE, *(c + 1 for c in sample.tags)}
        assert provenance_of(made)["mask"] == "self_training"

    # Killed in the second round, with one mask not yet written.
    (second / "segmentation.pt").unlink()
    shutil.rmtree(second / "tensorboard")
    (second / "checkpoint.pt").unlink(missing_ok=True)
    lost = mask_path(first, "train", samples[0].id, FOLDER)
    bytes_before = lost.read_bytes()
    lost.unlink()
    train_segmentation.run(recipe, tmp_path, stage="train_seg", progress=QUIET)
    assert lost.read_bytes() == bytes_before
    assert (first / "segmentation.pt").read_bytes() == before[first / "segmentation.pt"]
    assert (second / "segmentation.pt").read_bytes() == before[second / "segmentation.pt"]

    evaluate.run(recipe, tmp_path, stage="evaluate", progress=QUIET)  # with a CRF over the network's scores
    record = read_json(tmp_path / "evaluate/segmentation_crf-val.json")
    assert record["crf"]["iterations"] == 2 and record["tags"] == "none" and record["threshold"] is None
    change = read_json(tmp_path / "evaluate/refiner-seg_crf-val.json")
    assert change["miou"]["after"] == record["miou"]
    sample = next(iter(read(recipe.data, "val")))
    assert provenance_of(prediction_path(tmp_path, "segmentation_crf", "val", sample.id).read_bytes())["crf"]


def test_a_round_that_leaves_no_object_sure_says_so(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image without tags is background for certain, so not everything is IGNORE."""
    recipe = replace(recipe, train_seg=replace(recipe.train_seg, rounds=2, sure=1 - 1e-9))
    for module, stage in ((train_classifier, "train"), (make_cams, "cam"), (pseudo_label, "pseudo_label")):
        module.run(recipe, tmp_path, stage=stage, progress=QUIET)
    capsys.readouterr()
    train_segmentation.run(recipe, tmp_path, stage="train_seg", progress=Progress("lines"))
    assert "no pseudo-mask of train is sure of blue, green, red" in capsys.readouterr().err


def test_keys_follow_what_relabels(recipe: Recipe) -> None:
    assert recipe.train_seg is not None
    views = replace(recipe.evaluate, seg_scales=(0.5,))
    twice = replace(recipe, upper_bound=True, train_seg=replace(recipe.train_seg, rounds=2))
    once = replace(twice, train_seg=recipe.train_seg)

    def changed(one: Recipe, two: Recipe, stage: str) -> bool:
        return stage_keys(one)[stage] != stage_keys(two)[stage]

    assert changed(twice, replace(twice, evaluate=views), "train_seg")
    assert not changed(once, replace(once, evaluate=views), "train_seg")
    assert changed(once, twice, "train_seg")
    assert not changed(once, twice, "train_seg_full")


@pytest.mark.parametrize("wrong", [{"sure": 1.0}, {"sure": -0.1}, {"rounds": 0}])
def test_rounds_that_cannot_be_are_refused_before_the_first(recipe: Recipe, tmp_path: Path, wrong: dict) -> None:
    recipe = replace(recipe, train_seg=replace(recipe.train_seg, **wrong))
    with pytest.raises(ConfigError, match=r"train_seg\.rounds"):
        train_segmentation.run(recipe, tmp_path, stage="train_seg", progress=QUIET)
    assert not any(tmp_path.iterdir())
