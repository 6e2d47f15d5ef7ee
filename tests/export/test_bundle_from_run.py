"""A run folder with toy networks becomes a bundle, or nothing."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import weakseg
from export import bundle_from_run, commands
from export.statistics import presence_threshold
from training import cams
from training.models import CamClassifier, build_backbone, save_model
from weakseg import bundle_commands
from weakseg.bundle import open_bundle
from weakseg.cam_file import CamFile
from weakseg.cli import main
from weakseg.errors import BundleError, ConfigError, ParityError, UsageError, WeightsError
from weakseg.files import write_json_atomic
from weakseg.progress import Progress
from weakseg.recipe import BackboneConfig, CamConfig, DataConfig, EvaluateConfig, ExportConfig, Recipe
from weakseg.run_folder import cam_path
from weakseg.segmentation import labels_from_logits
from weakseg.threshold import Threshold

NAMES = ("blue", "green", "red")
SILENT = Progress("silent")


def write_data(root: Path) -> None:
    """One folder per class; image i is all of class i % 3, of brightness 50 i."""
    for i, size in enumerate([(48, 64), (64, 48), (40, 40)]):
        path = root / NAMES[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full((*size, 3), 50 * i, np.uint8)).save(path)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    root = tmp_path_factory.mktemp("data")
    write_data(root)
    return Recipe(
        name="toy",
        data=DataConfig(root=str(root), format="folder"),
        cam=CamConfig(scales=(1.0,), flip=False),
        evaluate=EvaluateConfig(splits=("val",)),
        export=ExportConfig(name="shapes", version="2", max_side=128, data_licence="CC0"),
        seed=5,
    )


@pytest.fixture(scope="module")
def run_folder(recipe, tmp_path_factory) -> Path:
    """What the stages before leave, as far as the export reads it; the networks come from `load_model`, see below."""
    folder = tmp_path_factory.mktemp("run")
    write_json_atomic(folder / "config.json", asdict(recipe))
    write_json_atomic(folder / "pseudo_label" / "threshold.json", Threshold(0.35, "otsu", "no mask seen").to_dict())
    record = {"what": "segmentation", "split": "val", "tags": "none", "miou": 0.5, "curve": {"t": [0.1], "miou": [0.2]}}
    write_json_atomic(folder / "evaluate" / "segmentation-val.json", record)
    for i, sample in enumerate(bundle_from_run.read(recipe.data, "train")):
        scores = np.full(3, 0.1, np.float32)
        scores[i] = 0.9
        cam = np.zeros((1, 2, 2), np.float16)
        CamFile(np.array(sample.tags, np.int32), cam, 8, 8, scores).save(cam_path(folder, "train", sample.id))
    for path in (folder / "train" / "classifier.pt", folder / "train_seg" / "segmentation.pt"):
        path.parent.mkdir()
        path.touch()
    return folder


@pytest.fixture
def networks(monkeypatch, toy_graphs):
    graphs = toy_graphs()
    models = {"classifier": graphs["classifier"].model, "segmentation": graphs["segmentation"].model}
    monkeypatch.setattr(bundle_from_run, "load_model", lambda path, kind: (models[kind], NAMES))
    return models


@pytest.fixture
def exported(monkeypatch, exported_toys):
    monkeypatch.setattr(bundle_from_run, "onnx_from_graphs", lambda graphs, _: {n: exported_toys[n] for n in graphs})


def test_a_run_becomes_a_bundle(recipe, run_folder, networks, tmp_path, exported):
    summary = bundle_from_run.export_run(recipe, run_folder, tmp_path, SILENT)
    opened = open_bundle(tmp_path)
    manifest = opened.manifest
    assert summary["sha256"] == opened.sha256
    assert summary["n_images"] == 3
    assert set(summary["parity"]) == {"classifier.onnx", "segmentation.onnx"}
    assert json.loads(json.dumps(summary)) == summary
    assert manifest.id == "shapes/2"
    assert manifest.classes == NAMES
    assert manifest.outputs == ("cam", "pseudo_mask", "segmentation")
    assert manifest.background == Threshold(0.35, "otsu", "no mask seen")
    assert manifest.input.max_side == 128
    assert manifest.pseudo_label == recipe.pseudo_label
    assert manifest.presence == pytest.approx(0.5, abs=0.02)
    assert manifest.metrics == ({"what": "segmentation", "split": "val", "tags": "none", "miou": 0.5},)
    assert manifest.licences.data == "CC0"
    assert (manifest.provenance.recipe, manifest.provenance.seed) == ("toy", 5)
    assert manifest.training.class_frequency == pytest.approx(dict.fromkeys(NAMES, 1 / 3), abs=1e-3)
    assert manifest.training.score_mean == pytest.approx(dict.fromkeys(NAMES, 0.9))
    assert manifest.training.brightness_mean == pytest.approx(50 / 255, abs=1e-3)
    assert manifest.training.presence_frequency == pytest.approx(dict.fromkeys(NAMES, 1 / 3), abs=1e-3)
    assert manifest.training.confidence == pytest.approx((*[0] * 8, 0, 1), abs=1e-3)


def test_other_precisions_are_proven_and_load(recipe, run_folder, networks, tmp_path, exported):
    both = replace(recipe, export=replace(recipe.export, precisions=("fp16", "bf16", "int8")))
    summary = bundle_from_run.export_run(both, run_folder, tmp_path, SILENT)
    opened = open_bundle(tmp_path)
    graphs = opened.manifest.graphs
    assert graphs["segmentation"].variants["fp16"] == "segmentation.fp16.onnx"
    assert {(r["graph"], r["precision"]) for r in opened.manifest.parity} == {
        (name, precision) for name, graph in graphs.items() for precision in graph.files()
    }
    assert set(summary["parity"]) == {file for graph in graphs.values() for file in graph.files().values()}
    image = np.full((40, 44, 3), 90, np.uint8)
    with weakseg.load(tmp_path) as fp32, weakseg.load(tmp_path, precision="fp16") as fp16:
        assert (fp32.segment(image).segmentation == fp16.segment(image).segmentation).mean() >= 0.995
    assert graphs["segmentation"].variants["bf16"] == "segmentation.bf16.onnx"
    with pytest.raises(ConfigError, match="bf16 runs in TensorRT alone, got the runtime onnxruntime"):
        weakseg.load(tmp_path, precision="bf16")
    first = open_bundle(tmp_path).sha256
    bundle_from_run.export_run(both, run_folder, tmp_path, SILENT)
    assert open_bundle(tmp_path).sha256 == first  # calibration is a function of the training images


def test_the_bundle_computes_what_torch_computes(recipe, run_folder, networks, tmp_path, exported):
    bundle_from_run.run(recipe, run_folder, stage=str(tmp_path / "bundle"), progress=SILENT)
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    graph = bundle_from_run.trained_graphs(recipe, run_folder, bundle_from_run.ClassTable(NAMES))["segmentation"]
    with torch.inference_mode():
        logits = graph(torch.from_numpy(image[None]))["logits"][0].numpy()
    with weakseg.load(tmp_path / "bundle", threads=1) as model:
        result = model.segment(image, outputs=["segmentation", "cam", "pseudo_mask"], tags=["red"], refine=False)
    assert (result.segmentation == labels_from_logits(logits, 50, 70)).mean() >= 0.999
    assert list(result.heatmaps) == ["red"]


def test_same_run_same_bytes(recipe, run_folder, networks, tmp_path, exported):
    made = [bundle_from_run.export_run(recipe, run_folder, tmp_path / name, SILENT)["sha256"] for name in "ab"]
    assert made[0] == made[1]


def test_a_wrong_export_leaves_nothing(recipe, run_folder, networks, tmp_path, exported):
    with torch.no_grad():
        networks["segmentation"].head.weight.mul_(1.01)
    with pytest.raises(ParityError, match="graph segmentation, output logits"):
        bundle_from_run.export_run(recipe, run_folder, tmp_path / "models", SILENT)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_target(recipe, run_folder, networks, tmp_path, exported):
    (tmp_path / "models").write_text("a file")
    with pytest.raises(BundleError, match="cannot write the bundle"):
        bundle_from_run.export_run(recipe, run_folder, tmp_path / "models", SILENT)


def test_a_method_that_needs_gradients(recipe, run_folder, tmp_path, capsys):
    """The verb says why and fails; a run goes on to its report."""
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    gradients = replace(recipe, cam=replace(recipe.cam, method="grad_cam"))
    write_json_atomic(copy / "config.json", asdict(gradients))
    assert main(["export", str(copy), "--output", str(tmp_path / "models")]) == 2
    reason = "cam method grad_cam needs gradients, which an exported graph does not have: set --cam.method to"
    assert reason in capsys.readouterr().err
    summary = bundle_from_run.run(gradients, copy, stage="bundle", progress=Progress("lines"))
    assert summary["bundle"] is None and reason in summary["reason"]
    assert f"bundle: none: {reason}" in capsys.readouterr().err
    assert not (copy / "bundle").exists() and not (tmp_path / "models").exists()


def test_a_method_that_gives_no_reason(recipe, run_folder, monkeypatch):
    monkeypatch.setattr(cams.get("cam"), "EXPORTABLE", False)
    with pytest.raises(ConfigError, match="cam method cam cannot be exported"):
        bundle_from_run.trained_graphs(recipe, run_folder, bundle_from_run.ClassTable(NAMES))


def test_checkpoints_that_are_no_classifier_of_ours(recipe, run_folder, tmp_path, capsys):
    """Of another architecture, of another tool, of another kind: said so, and no folder of models is made."""
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    file = copy / "train" / "classifier.pt"
    classifier = CamClassifier(build_backbone(BackboneConfig(name="small_resnet", weights=None)), len(NAMES))
    save_model(file, classifier, kind="classifier", classes=NAMES, method="cam")
    right = torch.load(file, weights_only=True)
    mobile = CamClassifier(build_backbone(BackboneConfig(weights=None)), len(NAMES)).state_dict()
    for wrong, message in [
        (right | {"state_dict": mobile}, "classifier.pt: .*Is it a file of this architecture?"),
        (mobile, "is not a weakseg model: expected format weakseg-model-1"),
        (right | {"kind": "affinity"}, "expected a model of kind classifier, got affinity in"),
    ]:
        torch.save(wrong, file)
        assert main(["export", str(copy), "--output", str(tmp_path / "models")]) == 1
        assert re.search(message, capsys.readouterr().err)
        assert not (tmp_path / "models").exists()


def test_other_classes(recipe, run_folder, networks):
    with pytest.raises(WeightsError, match="trained on the classes blue, green, red, the recipe's data has cat"):
        bundle_from_run.trained_graphs(recipe, run_folder, bundle_from_run.ClassTable(("cat",)))


def test_graphs_that_a_run_has(recipe, run_folder, networks):
    table = bundle_from_run.ClassTable(NAMES)
    assert set(bundle_from_run.trained_graphs(recipe, run_folder, table)) == {"classifier", "segmentation"}
    many = replace(recipe, cam=CamConfig(scales=(0.5, 1.0)))
    assert set(bundle_from_run.trained_graphs(many, run_folder, table)) == {
        "classifier",
        "classifier_multiscale",
        "segmentation",
    }


def test_export_command(recipe, run_folder, networks, tmp_path, exported, capsys):
    assert commands.main([str(run_folder), "--output", str(tmp_path), "--version", "3", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["bundle"] == str(tmp_path / "shapes" / "3")
    assert commands.main([str(run_folder), "--output", str(tmp_path), "--max-side", "96"]) == 0
    assert "differences from torch in onnxruntime" in capsys.readouterr().out
    assert open_bundle(tmp_path / "shapes" / "2").manifest.input.max_side == 96


def test_export_of_no_run(tmp_path):
    with pytest.raises(UsageError, match="expected a run folder with config.json"):
        commands.main([str(tmp_path)])
    write_json_atomic(tmp_path / "config.json", {"name": "x", "colour": 1})
    with pytest.raises(UsageError, match="recipe: unknown key 'colour'"):
        commands.main([str(tmp_path)])


def test_bundle_commands(recipe, run_folder, networks, tmp_path, exported, capsys):
    bundle_from_run.export_run(recipe, run_folder, tmp_path, SILENT)
    assert bundle_commands.main(["show", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "shapes/2" in out and "50.0" in out and "rule otsu" in out
    assert bundle_commands.main(["verify", str(tmp_path)]) == 0
    assert "is whole" in capsys.readouterr().out
    assert bundle_commands.main(["show", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["classes"] == list(NAMES)
    (tmp_path / "shapes" / "2" / "classifier.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match="damaged"):
        bundle_commands.main(["verify", str(tmp_path)])


def test_presence_threshold():
    scores = np.array([[0.9, 0.2], [0.3, 0.8], [0.1, 0.05]], np.float32)
    tags = np.array([[True, False], [False, True], [False, False]])
    assert 0.3 < presence_threshold(scores, tags) <= 0.8
    assert presence_threshold(scores, np.zeros_like(tags)) == 0.5
    assert presence_threshold(scores, scores >= 0.2) <= 0.2


def test_parity_images_differ_in_size(recipe):
    images = bundle_from_run.parity_images(bundle_from_run.read(recipe.data, "train"))
    assert sorted(image.shape for image in images) == [(40, 40, 3), (48, 64, 3), (64, 48, 3)]
