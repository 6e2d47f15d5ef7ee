"""The paper's recipe on photographs in VOC's layout and lists, for two steps: everything fits together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from training import train_classifier
from training.models import load_model
from weakseg.progress import Progress
from weakseg.recipe_loading import load_recipe

WSSS_MINI = Path("../shared/data/wsss-mini")


@pytest.mark.slow
@pytest.mark.skipif(not WSSS_MINI.is_dir(), reason="needs ../shared/data/wsss-mini")
def test_two_steps_on_vocs_lists(tmp_path: Path) -> None:
    root = tmp_path / "VOC2012"
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "JPEGImages").symlink_to((WSSS_MINI / "JPEGImages").resolve())
    (root / "labels.json").symlink_to((WSSS_MINI / "labels.json").resolve())  # there are no XML files here
    here = {path.stem for path in (WSSS_MINI / "JPEGImages").iterdir()}
    for split in ("train_aug", "train", "val"):
        ids = [i for i in (WSSS_MINI / "voc12_lists" / f"{split}.txt").read_text().split() if i in here][:2]
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(ids) + "\n")

    recipe = load_recipe("seam_voc12")
    recipe = replace(
        recipe,
        data=replace(recipe.data, root=str(root), tags="labels.json", tags_key="voc_box_labels"),
        backbone=replace(recipe.backbone, weights=None),
        train=replace(recipe.train, optim=replace(recipe.train.optim, epochs=1, batch_size=1, workers=0)),
    )
    summary = train_classifier.run(recipe, tmp_path / "run", stage="train", progress=Progress("silent"))

    assert summary["steps"] == 2
    model, _ = load_model(tmp_path / "run" / "train" / "classifier.pt", kind="classifier")
    assert sum(p.numel() for p in model.parameters()) >= 105_271_000  # 105,358,208 with VOC's 20 classes
    assert json.loads(json.dumps(summary))
