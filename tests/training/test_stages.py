"""The stages on a tiny dataset: what they write, that they go on where they stopped, that truth stays sealed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from training import evaluate, make_cams, pseudo_label, train_classifier, train_segmentation
from training.methods import cam as cam_method
from training.pseudo_masks import PseudoMasks
from weakseg.cam import labels_from_cam
from weakseg.cam_file import CamFile, read_cam
from weakseg.datasets import read
from weakseg.datasets.truth import open_truth, trusted
from weakseg.errors import ConfigError, DataError, SealedTruthError, WeightsError
from weakseg.image import read_image
from weakseg.masks.png import labels_from_png, provenance_of
from weakseg.progress import Progress
from weakseg.pseudo_mask import refined_labels
from weakseg.recipe import CrfConfig, PseudoLabelConfig, Recipe, SegConfig, ThresholdConfig
from weakseg.scoring import Calibration, Confusion
from weakseg.threshold import fixed

SILENT = Progress("silent")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by name; filled by the first test that needs them (the recipe fixture is per function)."""
    return {"run": tmp_path_factory.mktemp("run")}


def run_until(recipe: Recipe, folder: Path, last: str) -> dict[str, object]:
    stages = {
        "train": train_classifier.run,
        "cam": make_cams.run,
        "pseudo_label": pseudo_label.run,
        "train_seg": train_segmentation.run,
        "evaluate": evaluate.run,
    }
    summary: dict[str, object] = {}
    for stage, run in stages.items():
        summary = run(recipe, folder, stage=stage, progress=SILENT)
        if stage == last:
            break
    return summary


def test_the_chain_from_labels_to_scores(recipe: Recipe, trained: dict[str, Path]) -> None:
    folder = trained["run"]
    summary = run_until(recipe, folder, "evaluate")
    dataset = read(recipe.data, "train")
    for sample in dataset:
        cam = read_cam(folder / f"cam/train/{sample.id}.npz")
        assert tuple(cam.classes) == sample.tags
        assert cam.cam.shape == (len(sample.tags), 12, 16) and cam.cam.dtype == np.float16
        labels = labels_from_png((folder / f"pseudo_label/train/{sample.id}.png").read_bytes())
        assert labels.shape == (48, 64)
        assert set(np.unique(labels)) <= {0, 255, *(c + 1 for c in sample.tags)}
    records = {path.stem: json.loads(path.read_text()) for path in (folder / "evaluate").glob("*.json")}
    refiner = records.pop("refiner-crf-val")
    assert set(records) == {"cam-val", "cam_crf-val", "pseudo_mask-val", "segmentation-val"}
    assert refiner["miou"] == {"before": records["cam-val"]["miou"], "after": records["cam_crf-val"]["miou"]}
    assert refiner["n_images"] == 3, "one of the four has no tags"
    assert summary["warnings"] == [refiner["warning"]] * bool(refiner["warning"])
    assert summary["miou"] == {name: record["miou"] for name, record in records.items()}
    cam_record = records["cam-val"]
    assert cam_record["tags"] == "given" and cam_record["threshold"]["rule"] == "fixed" and cam_record["n_images"] == 4
    assert len(cam_record["curve"]["t"]) == 60
    assert cam_record["oracle"]["miou"] >= cam_record["miou"] - 1e-9
    assert records["segmentation-val"]["tags"] == "none" and records["segmentation-val"]["threshold"] is None
    assert records["cam_crf-val"]["crf"]["iterations"] == 10


def test_scores_are_those_of_the_written_predictions(recipe: Recipe, trained: dict[str, Path]) -> None:
    """The record of the network, counted again from the PNG files by hand."""
    folder = trained["run"]
    with trusted("scorer", __name__):
        truth = open_truth(recipe.data, "val", opener="scorer")
    confusion = Confusion(3)
    for sample_id in truth.ids:
        path = folder / f"evaluate/segmentation/val/{sample_id}.png"
        confusion.add(truth.mask(sample_id), labels_from_png(path.read_bytes()))
    record = json.loads((folder / "evaluate/segmentation-val.json").read_text())
    assert record["miou"] == pytest.approx(confusion.scores().miou)


def test_calibration_is_of_the_scores_and_tags(recipe: Recipe, trained: dict[str, Path]) -> None:
    folder, counted = trained["run"], Calibration()
    for sample in read(recipe.data, "val"):
        counted.add(read_cam(folder / f"cam/val/{sample.id}.npz").scores, sample.tags)
    records = {what: json.loads((folder / f"evaluate/{what}-val.json").read_text()) for what in ("cam", "cam_crf")}
    assert records["cam"]["ece"] == pytest.approx(counted.ece()) and counted.ece() > 0
    assert records["cam"]["brier"] == pytest.approx(counted.brier())
    assert records["cam_crf"]["ece"] is None and records["cam_crf"]["brier"] is None


def test_masks_say_how_they_were_made(recipe: Recipe, trained: dict[str, Path]) -> None:
    folder = trained["run"]
    of_run = {"recipe": "squares", "seed": 0}
    made = provenance_of((folder / "pseudo_label/train/000.png").read_bytes())
    assert made == {"mask": "pseudo_mask", **of_run, "band": 0.3, "crf": asdict(CrfConfig())} | fixed(0.3).to_dict()
    predicted = provenance_of((folder / "evaluate/segmentation/val/008.png").read_bytes())
    assert predicted == {"mask": "segmentation", "stage": "train_seg", **of_run, "scales": [1.0], "flip": True}


def test_finished_images_are_not_made_again(recipe: Recipe, trained: dict[str, Path]) -> None:
    folder = trained["run"]
    (folder / "cam/train/001.npz").unlink()
    (folder / "pseudo_label/val/009.png").unlink()
    assert make_cams.run(recipe, folder, stage="cam", progress=SILENT)["n_images"] == 1
    assert pseudo_label.run(recipe, folder, stage="pseudo_label", progress=SILENT)["n_images"] == 1


@pytest.mark.parametrize("rule", ["otsu", "area", "validation_split"])
def test_threshold_rules_say_where_t_came_from(recipe: Recipe, trained: dict[str, Path], rule: str) -> None:
    config = replace(recipe, pseudo_label=PseudoLabelConfig(threshold=ThresholdConfig(rule=rule)))  # type: ignore[arg-type]
    chosen = pseudo_label.choose_threshold(config, trained["run"], SILENT)
    assert chosen.rule == rule and 0 < chosen.t < 1
    assert ("2 images" in chosen.provenance) == (rule == "validation_split")


def test_validation_split_without_a_tune_list(recipe: Recipe, trained: dict[str, Path]) -> None:
    data = replace(recipe.data, tune=None)
    config = replace(recipe, data=data, pseudo_label=PseudoLabelConfig(threshold=ThresholdConfig("validation_split")))
    with pytest.raises(SealedTruthError, match=r"data\.tune"):
        pseudo_label.choose_threshold(config, trained["run"], SILENT)


def test_a_method_that_opens_truth_is_stopped(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way it tries: through the reader of masks or straight from the file."""
    from PIL import Image

    def by_reader(model: object, batch: object, moment: object) -> dict[str, torch.Tensor]:
        open_truth(recipe.data, "train", opener="full_supervision")
        return {}

    def by_file(model: object, batch: object, moment: object) -> dict[str, torch.Tensor]:
        Image.open(Path(recipe.data.root) / "SegmentationClass/000.png")
        return {}

    for leak in (by_reader, by_file):
        monkeypatch.setattr(cam_method, "losses", leak)
        with pytest.raises(SealedTruthError):
            train_classifier.run(recipe, tmp_path, stage="train", progress=SILENT)
        assert not (tmp_path / "train/classifier.pt").exists()


def test_full_supervision_learns_from_truth_and_only_when_asked(recipe: Recipe, trained: dict[str, Path]) -> None:
    folder = trained["run"]
    weak = train_segmentation.label_source(recipe, folder)
    full = train_segmentation.label_source(replace(recipe, train_seg=SegConfig(supervision="full")), folder)
    sample = read(recipe.data, "train").samples[0]
    assert isinstance(weak, PseudoMasks)
    mask = full(sample)
    assert set(np.unique(mask)) == {0, sample.tags[0] + 1} and (mask > 0).sum() == 24 * 24


def test_stages_out_of_order_say_which_is_missing(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no model at .*classifier.pt: has its training stage finished"):
        make_cams.run(recipe, tmp_path, stage="cam", progress=SILENT)
    with pytest.raises(DataError, match="run the cam stage again"):
        pseudo_label.write_mask(
            read(recipe.data, "train").samples[0],
            recipe=recipe,
            folder=tmp_path,
            split="train",
            n_classes=3,
            chosen=fixed(0.3),
        )


def test_an_image_without_tags_becomes_all_background(recipe: Recipe, trained: dict[str, Path]) -> None:
    labels = labels_from_png((trained["run"] / "pseudo_label/train/003.png").read_bytes())
    assert read(recipe.data, "train").samples[3].tags == () and not labels.any()


def test_unknown_method_names_those_there_are(recipe: Recipe, tmp_path: Path) -> None:
    config = replace(recipe, train=replace(recipe.train, method="seem"))
    with pytest.raises(ConfigError, match="unknown training method 'seem': expected one of .*cam"):
        train_classifier.run(config, tmp_path, stage="train", progress=SILENT)


def test_a_damaged_cam_file_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(DataError, match="run the cam stage again"):
        read_cam(tmp_path / "x.npz")


def test_cam_file_round_trip(tmp_path: Path) -> None:
    maps = np.random.default_rng(0).random((2, 3, 4)).astype(np.float16)
    file = CamFile(np.array([1, 5], np.int32), maps, 10, 14, np.array([0.5, 0.25], np.float32))
    file.save(tmp_path / "a/b.npz")
    back = read_cam(tmp_path / "a/b.npz")
    assert np.array_equal(back.cam, maps) and (back.height, back.width) == (10, 14)
    assert back.cam01().shape == (2, 10, 14) and back.cam01().max() <= 1


def test_crf_can_be_left_out(recipe: Recipe, trained: dict[str, Path], tmp_path: Path) -> None:
    config = replace(recipe, pseudo_label=PseudoLabelConfig(crf=None))
    dataset = read(recipe.data, "val")
    records = evaluate.score_split(config, trained["run"], dataset, (), fixed(0.3), SILENT)
    assert set(records) == {"cam", "pseudo_mask"} and records["pseudo_mask"]["crf"] is None
    blind = replace(config, data=replace(config.data, masks=str(tmp_path / "none")))
    assert evaluate.score_split(blind, trained["run"], dataset, (), fixed(0.3), SILENT) == {}
    assert CrfConfig().iterations == 10


def test_what_a_refiner_changed_is_counted_from_label_maps(recipe: Recipe, trained: dict[str, Path]) -> None:
    """The record, counted again by hand; the same but for mIoU where no image has a mask."""
    folder = trained["run"]
    record = json.loads((folder / "evaluate/refiner-crf-val.json").read_text())
    equal = pixels = area = 0
    for sample in read(recipe.data, "val"):
        if sample.tags:
            cam = read_cam(folder / f"cam/val/{sample.id}.npz")
            cam01, image = cam.cam01(), read_image(sample.image)
            before = labels_from_cam(cam01, cam.classes, 0.3, 3)
            after = refined_labels(image, cam01, cam.classes, 3, [0.3], CrfConfig())[0]
            equal, pixels, area = equal + (before == after).sum(), pixels + after.size, area + (after > 0).sum()
    assert record["agreement"] == pytest.approx(equal / pixels)
    assert record["foreground"]["after"] == pytest.approx(area / pixels)


@pytest.mark.parametrize("masks", ["no folder", "of other images"])
def test_what_a_refiner_changed_is_known_without_truth(
    recipe: Recipe, trained: dict[str, Path], tmp_path: Path, masks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if masks == "of other images":
        (tmp_path / "masks").mkdir()
    blind = replace(recipe, data=replace(recipe.data, masks=str(tmp_path / "masks")))
    dataset = read(blind.data, "val")
    threshold = fixed(0.3)
    records = evaluate.score_split(blind, trained["run"], dataset, (), threshold, SILENT)
    seen = json.loads((trained["run"] / "evaluate/refiner-crf-val.json").read_text())
    same = ("n_images", "agreement", "foreground", "images", "classes")
    assert list(records) == ["refiner-crf"] and records["refiner-crf"]["miou"] is None
    assert [records["refiner-crf"][key] for key in same] == [seen[key] for key in same]
    monkeypatch.setattr("weakseg.threshold.MAX_IMAGES", 2)
    few = evaluate.score_split(blind, trained["run"], dataset, (), threshold, SILENT)
    assert few["refiner-crf"]["n_images"] == 2


def test_a_refiner_that_harms_is_named_once(
    recipe: Recipe, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("weakseg.refinement.MIN_FALL", -2)
    summary = evaluate.run(recipe, trained["run"], stage="evaluate", progress=Progress("lines"))
    (warning,) = summary["warnings"]
    assert json.loads((trained["run"] / "evaluate/refiner-crf-val.json").read_text())["warning"] == warning
    assert capsys.readouterr().err.splitlines().count(f"warning: {warning}") == 1
