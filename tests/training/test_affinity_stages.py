"""From pseudo-masks over AffinityNet and random walk to masks, through the stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import weakseg
from export import bundle_from_run
from training import evaluate, make_cams, pseudo_label, train_affinity, train_classifier, train_segmentation, walk
from training.graphs import AffinityGraph
from training.models import AffinityNet, EdgeNet, load_model
from training.pseudo_masks import PseudoMasks, check_labelled
from training.train_affinity import most_frequent
from weakseg import report
from weakseg.cam_file import read_cam
from weakseg.classes import IGNORE, voc_palette
from weakseg.datasets import read
from weakseg.errors import ConfigError, DataError
from weakseg.files import write_bytes_atomic
from weakseg.masks.png import labels_from_png, png_from_labels, provenance_of
from weakseg.progress import Progress
from weakseg.pseudo_mask import Walk, refined_labels
from weakseg.recipe import AffinityConfig, CamConfig, Recipe, WalkConfig
from weakseg.run_folder import cam_path, mask_path, read_json, walked_path
from weakseg.stages import plan, stage_keys

QUIET = Progress("silent")
TO_AFFINITY = (
    (train_classifier, "train"),
    (make_cams, "cam"),
    (pseudo_label, "pseudo_label"),
    (train_affinity, "affinity"),
)


@pytest.fixture
def walking(recipe: Recipe) -> Recipe:
    optim = replace(recipe.train.optim, epochs=2, crop_px=80, long_side_px=(64, 80))
    return replace(
        recipe,
        train=replace(recipe.train, optim=replace(recipe.train.optim, epochs=2)),
        pseudo_label=replace(recipe.pseudo_label, crf=None),
        affinity=AffinityConfig(walk=WalkConfig(steps=8), optim=optim),
    )


def test_the_whole_chain(walking: Recipe, tmp_path: Path) -> None:
    for module, stage in (*TO_AFFINITY, (walk, "random_walk"), (train_segmentation, "train_seg")):
        module.run(walking, tmp_path, stage=stage, progress=QUIET)
    t = read_json(tmp_path / "pseudo_label/threshold.json")["t"]
    for sample in read(walking.data, "train"):
        path = mask_path(tmp_path, "train", sample.id, "random_walk")
        sure = labels_from_png(path.read_bytes())
        labels = labels_from_png(walked_path(tmp_path, "train", sample.id).read_bytes())
        assert labels.shape == (48, 64)
        assert set(np.unique(labels)) <= {0, *(c + 1 for c in sample.tags)}
        assert ((sure == labels) | (sure == IGNORE)).mean() > 0.9  # where both edges agree, so does the middle
        made = provenance_of(path.read_bytes())
        assert made["mask"] == "pseudo_mask"
        assert made["t"] == t
        assert made["random_walk"]["steps"] == 8
    evaluate.run(walking, tmp_path, stage="evaluate", progress=QUIET)
    record = read_json(tmp_path / "evaluate/random_walk-val.json")
    assert record["tags"] == "given"
    assert record["coverage"] == 1
    assert read_json(tmp_path / "evaluate/refiner-random_walk-val.json")["n_images"] > 0
    assert (tmp_path / "evaluate/segmentation-val.json").is_file()
    bundle_from_run.run(walking, tmp_path, stage="bundle", progress=QUIET)
    sample = next(sample for sample in read(walking.data, "val") if sample.tags)
    names = [read(walking.data, "val").classes.names[c] for c in sample.tags]
    with weakseg.load(tmp_path / "bundle", threads=1) as model:
        served = model.segment(sample.image, outputs=["pseudo_mask"], tags=names)
    offline = labels_from_png(mask_path(tmp_path, "val", sample.id, "random_walk").read_bytes())
    assert (served.mask == offline).mean() > 0.99  # maps travel as float16 in a run
    assert served.refinement["random_walk"]["steps"] == 8
    report.run(walking, tmp_path, stage="report", progress=QUIET)
    assert "random_walk" in (tmp_path / "report.html").read_text()


def test_the_whole_chain_of_irn(walking: Recipe, tmp_path: Path) -> None:
    assert walking.affinity is not None
    after = WalkConfig(radius=3, beta=4.0, steps=8, background=0.25, band=0.2)
    affinity = replace(walking.affinity, network="irn", start="classifier", train_radius=4, walk=after)
    backbone, cam = replace(walking.backbone, name="small_resnet"), CamConfig(scales=(1.0,), flip=False)
    recipe = replace(walking, affinity=affinity, backbone=backbone, cam=cam)
    for module, stage in (*TO_AFFINITY, (walk, "random_walk")):
        module.run(recipe, tmp_path, stage=stage, progress=QUIET)
    model, _ = load_model(tmp_path / "affinity/affinity.pt", kind="affinity")
    assert isinstance(model, EdgeNet) and model.radius == 3
    classifier, _ = load_model(tmp_path / "train/classifier.pt", kind="classifier")
    for name, value in classifier.backbone.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(model.backbone.state_dict()[name], value), name
    evaluate.run(recipe, tmp_path, stage="evaluate", progress=QUIET)
    assert read_json(tmp_path / "evaluate/random_walk-val.json")["threshold"]["t"] == 0.25
    assert read_json(tmp_path / "evaluate/cam-val.json")["threshold"]["t"] != 0.25
    bundle_from_run.run(recipe, tmp_path, stage="bundle", progress=QUIET)
    sample = next(sample for sample in read(recipe.data, "val") if sample.tags)
    names = [read(recipe.data, "val").classes.names[c] for c in sample.tags]
    with weakseg.load(tmp_path / "bundle", threads=1) as served:
        assert served.manifest.graphs["affinity"].stride == 4
        given = served.segment(sample.image, outputs=["pseudo_mask"], tags=names)
        with_crf = served.segment(sample.image, outputs=["pseudo_mask"], tags=names, refine="random_walk_crf")
    data = mask_path(tmp_path, "val", sample.id, "random_walk").read_bytes()
    assert (given.mask == labels_from_png(data)).mean() > 0.99  # maps travel as float16 in a run
    assert given.threshold is not None and given.threshold.t == provenance_of(data)["t"] == 0.25
    assert provenance_of(data)["random_walk"]["background"] == 0.25
    assert with_crf.mask.shape == (48, 64)


def test_irn_asks_for_a_trained_backbone(walking: Recipe, tmp_path: Path) -> None:
    irn = replace(walking, affinity=AffinityConfig(network="irn"))
    with pytest.raises(ConfigError, match=r"expected backbone.weights, got none: set it, or --affinity.start class"):
        train_affinity.run(irn, tmp_path, stage="affinity", progress=QUIET)


def test_what_is_there_is_not_made_again(walking: Recipe, tmp_path: Path) -> None:
    for module, stage in TO_AFFINITY:
        module.run(walking, tmp_path, stage=stage, progress=QUIET)
    assert walk.run(walking, tmp_path, stage="random_walk", progress=QUIET)["n_images"] == 12
    sample = read(walking.data, "val").samples[0]
    mask_path(tmp_path, "val", sample.id, "random_walk").unlink()
    assert walk.run(walking, tmp_path, stage="random_walk", progress=QUIET)["n_images"] == 1


def test_a_recipe_without_it_has_neither_stage(recipe: Recipe, walking: Recipe) -> None:
    assert "affinity" not in plan(recipe)
    assert [name for name in plan(walking) if name not in plan(recipe)] == ["affinity", "random_walk"]


def test_the_walk_does_not_train_the_network_again(walking: Recipe) -> None:
    assert walking.affinity is not None
    other = replace(walking, affinity=replace(walking.affinity, walk=WalkConfig(beta=4, steps=9)))
    one, two = stage_keys(walking), stage_keys(other)
    assert one["affinity"] == two["affinity"]
    assert one["random_walk"] != two["random_walk"]
    assert one["train_seg"] != two["train_seg"]


def test_a_crop_without_pairs_is_refused(walking: Recipe, tmp_path: Path) -> None:
    assert walking.affinity is not None
    small = replace(walking.affinity, optim=replace(walking.affinity.optim, crop_px=64))
    with pytest.raises(ConfigError, match="64 px is 8 cells of 8 px wide, pairs of radius 5 need 9: raise .* to 72"):
        train_affinity.run(replace(walking, affinity=small), tmp_path, stage="affinity", progress=QUIET)
    wide = replace(small, train_radius=6)
    with pytest.raises(ConfigError, match=r"radius 6 need 11: .* to 88 or lower affinity\.train_radius"):
        train_affinity.run(replace(walking, affinity=wide), tmp_path, stage="affinity", progress=QUIET)


@pytest.mark.parametrize(("module", "stage"), [(train_affinity, "affinity"), (train_segmentation, "train_seg")])
def test_masks_that_nothing_can_be_learnt_from(
    recipe: Recipe, walking: Recipe, tmp_path: Path, module: ModuleType, stage: str
) -> None:
    chosen = walking if stage == "affinity" else recipe
    chosen = replace(chosen, train_seg=replace(recipe.train_seg, start="weights"))
    labels = np.full((48, 64), IGNORE, np.uint8)
    for sample in read(chosen.data, "train"):
        write_bytes_atomic(mask_path(tmp_path, "train", sample.id), png_from_labels(labels, voc_palette()))
    with pytest.raises(DataError, match=r"IGNORE everywhere: lower pseudo_label\.band"):
        module.run(chosen, tmp_path, stage=stage, progress=QUIET)
    assert not (tmp_path / stage).exists()


def test_a_class_that_no_mask_is_sure_of_is_named(
    walking: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = read(walking.data, "train")
    for sample in dataset:
        labels = np.full((48, 64), IGNORE, np.uint8)
        labels[:, 32:] = IGNORE if 2 in sample.tags or not sample.tags else sample.tags[0] + 1
        write_bytes_atomic(mask_path(tmp_path, "train", sample.id), png_from_labels(labels, voc_palette()))
    check_labelled(PseudoMasks(tmp_path, "train"), dataset, Progress("lines"), advice="")
    assert (
        "no pseudo-mask of train is sure of background, red: the network learns nothing of them"
        in capsys.readouterr().err
    )


def test_maps_of_another_models_classes_are_refused(walking: Recipe, tmp_path: Path) -> None:
    for module, stage in TO_AFFINITY:
        module.run(walking, tmp_path, stage=stage, progress=QUIET)
    sample = next(sample for sample in read(walking.data, "val") if sample.tags)
    path = cam_path(tmp_path, "val", sample.id)
    cam = read_cam(path)
    replace(cam, classes=cam.classes + 3).save(path)
    with pytest.raises(DataError, match=r"class indices must lie in 0\.\.2"):
        walk.run(walking, tmp_path, stage="random_walk", progress=QUIET)
    assert not walked_path(tmp_path, "val", sample.id).exists()


@pytest.mark.parametrize("size", [(9, 64), (8, 8), (1, 5), (3, 200)])
def test_images_smaller_than_the_reach_of_a_walk(walking: Recipe, size: tuple[int, int]) -> None:
    """9 cells are what a radius of 5 spans; there are only 2 rows of them, or one cell."""
    from training.models import build_backbone

    graph = AffinityGraph(AffinityNet(build_backbone(replace(walking.backbone, output_stride=8)))).eval()
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    with torch.no_grad():
        found = graph(torch.from_numpy(image[None]))["affinities"][0].numpy()
    cam01 = np.linspace(0, 1, size[0] * size[1], dtype=np.float32).reshape(1, *size)
    (labels,) = refined_labels(image, cam01, np.array([1]), 3, [0.5], None, Walk(found, 8, WalkConfig()))
    assert labels.shape == size and set(np.unique(labels)) <= {0, 2}


def test_a_cell_takes_its_most_frequent_label() -> None:
    labels = torch.tensor([[[0, 3, 3, IGNORE], [3, 0, IGNORE, IGNORE]]])
    assert most_frequent(labels, 1, 2).tolist() == [[[0, IGNORE]]]
    assert most_frequent(labels, 2, 4).equal(labels)


@pytest.mark.parametrize("size", [(48, 64), (17, 5), (1, 1)])
@pytest.mark.parametrize(("network", "rows", "stride"), [(AffinityNet, 34, 8), (EdgeNet, 35, 4)])
def test_the_graph_covers_the_image(
    walking: Recipe, size: tuple[int, int], network: type[AffinityNet | EdgeNet], rows: int, stride: int
) -> None:
    from training.models import build_backbone

    backbone = build_backbone(replace(walking.backbone, output_stride=8))
    graph = AffinityGraph(network(backbone)).eval()
    with torch.no_grad():
        found = graph(torch.zeros(2, *size, 3, dtype=torch.uint8))["affinities"]
    assert found.shape == (2, rows, -(-size[0] // stride), -(-size[1] // stride))
    assert graph.stride == stride


@pytest.mark.parametrize("method", ["affinitynet", "irn"])
def test_a_network_is_stored_and_read_again(walking: Recipe, tmp_path: Path, method: str) -> None:
    from training.models import AFFINITY_NETWORKS, build_backbone, save_model

    model = AFFINITY_NETWORKS[method](build_backbone(walking.backbone), radius=3).eval()
    save_model(tmp_path / "a.pt", model, kind="affinity", classes=("a",), method=method)
    again, _ = load_model(tmp_path / "a.pt", kind="affinity")
    assert type(again) is type(model)
    x = torch.rand(1, 3, 32, 32) * 255
    with torch.no_grad():
        assert torch.equal(model(x), again(x))
    assert again.radius == 3
