"""The paper's recipes over VOC's layout and lists: what they plan and share; two steps of training fit together."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from training import make_cams, pseudo_label, train_affinity, train_classifier, train_segmentation, walk
from training.models import load_model
from weakseg.datasets import read
from weakseg.progress import Progress
from weakseg.recipe import Recipe
from weakseg.recipe_loading import load_recipe
from weakseg.run_folder import mask_path
from weakseg.stages import plan, stage_keys

WSSS_MINI = Path("../shared/data/wsss-mini")
LAYERS = ("seam_voc12", "affinity_voc12", "deeplab_voc12", "seam_voc12_full")  # each builds on the one before


@pytest.fixture
def layers(tmp_path: Path) -> dict[str, Recipe]:
    """The recipes over two photographs with XML, one of them in train and train_aug."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for sample_id, tag in (("a", "cat"), ("b", "dog")):
        Image.new("RGB", (4, 4)).save(tmp_path / f"JPEGImages/{sample_id}.jpg")
        xml = f"<annotation><object><name>{tag}</name></object></annotation>"
        (tmp_path / f"Annotations/{sample_id}.xml").write_text(xml)
    for split, sample_id in (("train_aug", "a"), ("train", "a"), ("val", "b")):
        (tmp_path / f"ImageSets/Segmentation/{split}.txt").write_text(f"{sample_id}\n")
    recipes = {name: load_recipe(name) for name in LAYERS}
    return {name: replace(one, data=replace(one.data, root=str(tmp_path))) for name, one in recipes.items()}


def test_the_layers_plan_what_they_say(layers: dict[str, Recipe]) -> None:
    to_masks = ["train", "cam", "pseudo_label", "affinity", "random_walk"]
    end = ["evaluate", "bundle", "report"]
    assert plan(layers["affinity_voc12"]) == [*to_masks, *end]
    for name in ("deeplab_voc12", "seam_voc12_full"):
        recipe = layers[name]
        assert plan(recipe) == [*to_masks, "train_seg", *end]
        assert recipe.train_seg is not None and recipe.train_seg.network == "deeplab_largefov"
        assert recipe.evaluate.seg_flip and len(recipe.evaluate.seg_scales) == 6
        assert recipe.evaluate.seg_crf is not None and recipe.evaluate.splits == ("train", "val")


def test_the_layers_share_their_stages_in_one_folder(layers: dict[str, Recipe]) -> None:
    keys = [stage_keys(layers[name]) for name in LAYERS]
    shared = [[stage for stage in before if before[stage] == after.get(stage)] for before, after in pairwise(keys)]
    assert shared == [
        ["train", "cam"],
        ["train", "cam", "pseudo_label", "affinity", "random_walk"],
        ["train", "cam", "pseudo_label", "affinity", "random_walk", "train_seg", "evaluate"],
    ]


@pytest.mark.slow
@pytest.mark.skipif(not WSSS_MINI.is_dir(), reason="needs ../shared/data/wsss-mini")
def test_two_steps_of_every_training_on_vocs_lists(tmp_path: Path) -> None:
    root = tmp_path / "VOC2012"
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "JPEGImages").symlink_to((WSSS_MINI / "JPEGImages").resolve())
    (root / "labels.json").symlink_to((WSSS_MINI / "labels.json").resolve())  # there are no XML files here
    here = {path.stem for path in (WSSS_MINI / "JPEGImages").iterdir()}
    for split in ("train_aug", "train", "val"):
        ids = [i for i in (WSSS_MINI / "voc12_lists" / f"{split}.txt").read_text().split() if i in here][:2]
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(ids) + "\n")

    recipe, run, quiet = load_recipe("seam_voc12_full"), tmp_path / "run", Progress("silent")
    assert recipe.affinity is not None and recipe.train_seg is not None
    briefly = {"epochs": 1, "batch_size": 1, "workers": 0}
    recipe = replace(
        recipe,
        data=replace(recipe.data, root=str(root), tags="labels.json", tags_key="voc_box_labels"),
        backbone=replace(recipe.backbone, weights=None),
        train=replace(recipe.train, optim=replace(recipe.train.optim, **briefly)),
        cam=replace(recipe.cam, scales=(0.5,), flip=False),
        affinity=replace(recipe.affinity, optim=replace(recipe.affinity.optim, **briefly)),
        train_seg=replace(recipe.train_seg, optim=replace(recipe.train_seg.optim, **briefly)),
        evaluate=replace(recipe.evaluate, splits=("train",)),  # the network's six views of a photograph take too long
    )
    summary = train_classifier.run(recipe, run, stage="train", progress=quiet)
    assert summary["steps"] == 2
    model, _ = load_model(run / "train" / "classifier.pt", kind="classifier")
    assert sum(p.numel() for p in model.parameters()) >= 105_271_000  # 105,358,208 with VOC's 20 classes
    assert json.loads(json.dumps(summary))

    for module, stage in ((make_cams, "cam"), (pseudo_label, "pseudo_label")):
        module.run(recipe, run, stage=stage, progress=quiet)
    assert train_affinity.run(recipe, run, stage="affinity", progress=quiet)["steps"] == 2
    walk.run(recipe, run, stage="random_walk", progress=quiet)
    for sample in read(recipe.data, "train"):
        assert mask_path(run, "train", sample.id, "random_walk").is_file()
    assert train_segmentation.run(recipe, run, stage="train_seg", progress=quiet)["steps"] == 2
    network, classes = load_model(run / "train_seg" / "segmentation.pt", kind="segmentation")
    assert type(network).__name__ == "DeepLabLargeFov" and len(classes) >= 6
