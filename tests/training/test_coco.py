"""The squares in COCO's layout are the squares: same tags, same truth, same scores, and the same seal."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from training import evaluate, make_cams, pseudo_label, train_classifier
from training.methods import cam as cam_method
from weakseg.datasets import read
from weakseg.datasets.truth import open_truth, trusted
from weakseg.errors import SealedTruthError
from weakseg.progress import Progress
from weakseg.recipe import DataConfig, Recipe
from weakseg.stages import stage_keys

QUIET = Progress("silent")


@pytest.fixture
def coco(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Every square as a polygon; of tune those of train."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    voc, root = recipe.data, tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    classes = read(voc, "train").classes
    categories = [{"id": 7 * n, "name": name} for n, name in enumerate(classes.names, 1)]
    for split in ("train", "val", "tune"):
        images, annotations = [], []
        with trusted("scorer", __name__):
            truth = open_truth(voc, split, opener="scorer")
        for sample in read(voc, split):
            labels = truth.mask(sample.id)
            number = 1000 - int(sample.id)
            height, width = labels.shape
            images.append({"id": number, "file_name": sample.image.name, "height": height, "width": width})
            (root / ("val" if split == "val" else "train")).mkdir(exist_ok=True)
            shutil.copy(sample.image, root / ("val" if split == "val" else "train"))
            for value in np.unique(labels[labels > 0]).tolist():
                (y, x), (bottom, right) = (edge(np.argwhere(labels == value), axis=0) for edge in (np.min, np.max))
                x, y, right, bottom = (float(n) for n in (x, y, right + 1, bottom + 1))
                ring = [x, y, right, y, right, bottom, x, bottom]
                annotations.append({"image_id": number, "category_id": 7 * value, "segmentation": [ring]})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return replace(recipe, data=DataConfig(root=str(root), format="coco", tune="tune"))


def test_tags_and_scores_are_those_of_voc_layout(
    recipe: Recipe, coco: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val", "tune"):
        one, two = read(recipe.data, split), read(coco.data, split)
        assert [(s.id, s.tags, s.image.name) for s in one] == [(s.id, s.tags, s.image.name) for s in two]
        assert one.classes == two.classes
    monkeypatch.setattr(pseudo_label, "usable_cpus", lambda: 1)
    monkeypatch.setattr(evaluate, "usable_cpus", lambda: 1)
    optim = replace(recipe.train.optim, epochs=1)
    short = replace(recipe, train=replace(recipe.train, optim=optim), train_seg=None)
    for module, stage in ((train_classifier, "train"), (make_cams, "cam"), (pseudo_label, "pseudo_label")):
        module.run(short, tmp_path / "run", stage=stage, progress=QUIET)
    rule = replace(recipe.pseudo_label, threshold=replace(recipe.pseudo_label.threshold, rule="validation_split"))
    scores = []
    for data in (recipe.data, coco.data):
        tuned = replace(short, data=data, pseudo_label=rule)
        threshold = pseudo_label.choose_threshold(tuned, tmp_path / "run", QUIET)
        scores.append(evaluate.score_split(tuned, tmp_path / "run", read(data, "val"), (), threshold, QUIET))
    assert scores[0] == scores[1]
    assert {"cam", "cam_crf", "pseudo_mask"} < scores[0].keys()
    assert scores[0]["cam"]["miou"] > 0 and "2 images" in scores[0]["cam"]["threshold"]["provenance"]


def test_scores_follow_the_annotations(coco: Recipe, tmp_path: Path) -> None:
    path = Path(coco.data.root) / "annotations/instances_val.json"
    content = json.loads(path.read_text())
    before = stage_keys(coco)
    content["annotations"][0]["segmentation"] = [[0, 0, 9, 0, 9, 9, 0, 9]]
    path.write_text(json.dumps(content))
    after = stage_keys(coco)
    assert [name for name in before if before[name] != after[name]] == ["evaluate", "bundle", "report"]


def test_a_method_that_opens_the_annotations_is_stopped(
    coco: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(coco.data.root) / "annotations/instances_train.json"

    def leak(model: object, batch: object, moment: object) -> dict[str, object]:
        json.loads(path.read_text())
        return {}

    monkeypatch.setattr(cam_method, "losses", leak)
    with pytest.raises(SealedTruthError, match="instances_train.json is a true mask, or holds some"):
        train_classifier.run(coco, tmp_path, stage="train", progress=QUIET)
    assert not (tmp_path / "train/classifier.pt").exists()
