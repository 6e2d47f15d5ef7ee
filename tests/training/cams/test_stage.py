"""Maps with gradients through `weakseg run`: all stages, keys, a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.training.cams.networks import classifier_for
from training import cams
from training.graphs import ClassifierGraph
from training.make_cams import image_cam
from weakseg.cam_file import CamFile, read_cam
from weakseg.errors import ConfigError
from weakseg.progress import Progress
from weakseg.recipe import Recipe
from weakseg.recipe_loading import override
from weakseg.run import run
from weakseg.stages import stage_keys

SILENT = Progress("silent")
GRADIENTS = [name for name in cams.names() if not cams.get(name).EXPORTABLE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests here, so that one classifier is trained."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def small(recipe: Recipe) -> Recipe:
    crfless = replace(recipe.pseudo_label, crf=None)
    return replace(recipe, train_seg=None, pseudo_label=crfless, evaluate=replace(recipe.evaluate, splits=("val",)))


def with_method(recipe: Recipe, *arguments: str) -> Recipe:
    return override(recipe, ["--cam.method", *arguments])


def maps_of(folder: Path) -> dict[str, CamFile]:
    return {path.stem: read_cam(path) for path in sorted((folder / "cam").rglob("*.npz"))}


def test_a_run_with_gradients_ends_with_a_report_and_says_why_there_is_no_bundle(small: Recipe, folder: Path) -> None:
    done = run(with_method(small, "grad_cam"), folder, progress=SILENT)
    assert set(done) == {"train", "cam", "pseudo_label", "evaluate", "bundle", "report"}
    assert done["bundle"]["summary"]["bundle"] is None
    assert "cam method grad_cam needs gradients" in done["bundle"]["summary"]["reason"]
    assert (folder / "report").is_dir() and json.loads((folder / "evaluate/cam-val.json").read_text())["miou"] > 0
    ours = maps_of(folder)
    again = run(with_method(small, "cam"), folder, last="cam", progress=SILENT)
    assert again["train"]["key"] == done["train"]["key"] and again["cam"]["key"] != done["cam"]["key"]
    for sample_id, plain in maps_of(folder).items():
        if len(plain.classes):
            np.testing.assert_allclose(ours[sample_id].cam, plain.cam, rtol=5e-3, atol=5e-3 * float(plain.cam.max()))


@pytest.mark.parametrize("method", GRADIENTS)
def test_a_layer_by_name(small: Recipe, folder: Path, method: str) -> None:
    recipe = with_method(small, method, "--cam.layer", "backbone.body.6")
    done = run(recipe, folder, last="pseudo_label", progress=SILENT)
    assert done["cam"]["summary"] == {"n_images": 12, "views": 4}
    for file in maps_of(folder).values():
        assert file.cam.shape == (len(file.classes), 12, 16) and np.isfinite(file.cam).all()
        assert (file.cam.max(axis=(1, 2)) > 1e-2).all(), "in units that float16 holds"


def test_a_killed_stage_goes_on_to_the_same_maps(small: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = with_method(small, "grad_cam", "--cam.layer", "backbone.body.13")
    run(recipe, folder, last="cam", progress=SILENT)
    whole = {path: path.read_bytes() for path in (folder / "cam").rglob("*.npz")}
    save, saved = CamFile.save, []

    def killed(file: CamFile, path: Path) -> None:
        if len(saved) == 5:
            raise KeyboardInterrupt
        saved.append(path)
        save(file, path)

    monkeypatch.setattr(CamFile, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, folder, first="cam", last="cam", progress=SILENT)
    monkeypatch.undo()
    done = run(recipe, folder, last="cam", progress=SILENT)
    assert done["cam"]["n_images"] == 7
    assert {path: path.read_bytes() for path in (folder / "cam").rglob("*.npz")} == whole


def test_maps_beyond_float16_are_scaled_down(folder: Path) -> None:
    """Each as a whole; the others stay as they are."""
    model = classifier_for("cam", 2).eval()
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)

    def file(factor: float) -> CamFile:
        def maps(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
            logits, plain = cams.get("cam").maps(network, images)
            return logits, plain * torch.tensor([factor, 1.0])[:, None, None]

        method = cast(cams.CamMethod, SimpleNamespace(EXPORTABLE=True, maps=maps))
        return image_cam(ClassifierGraph(model, method).eval(), image, (0, 1), torch.device("cpu"))

    plain, loud = file(1.0), file(1e7)
    assert loud.cam[0].max() == np.finfo(np.float16).max
    np.testing.assert_allclose(loud.cam01(), plain.cam01(), atol=2e-3)
    assert np.array_equal(loud.cam[1], plain.cam[1])


def test_keys_know_the_layer_where_there_is_one(small: Recipe) -> None:
    def key(*arguments: str) -> Any:
        return stage_keys(with_method(small, "grad_cam", *arguments))["cam"]

    assert len({key(), key("--cam.layer", "a"), key("--cam.layer", "b")}) == 3
    assert key("--cam.layer", "None") == key()


def test_a_layer_that_is_not_there(small: Recipe, folder: Path) -> None:
    run(small, folder, last="train", progress=SILENT)
    with pytest.raises(
        ConfigError, match=r"no layer 'backbone.body.77': set cam.layer to one, such as backbone.body.7"
    ):
        run(with_method(small, "grad_cam", "--cam.layer", "backbone.body.77"), folder, last="cam", progress=SILENT)
    with pytest.raises(ConfigError, match="cam method cam takes no layer, got cam.layer 'backbone'"):
        run(with_method(small, "cam", "--cam.layer", "backbone"), folder, last="cam", progress=SILENT)


@pytest.mark.parametrize(
    ("method", "layer", "message"),
    [
        ("grad_cam", "backbone.body.77", "no layer 'backbone.body.77'"),
        ("cam", "backbone", "takes no layer"),
        ("pcm", None, "train method seam"),
        ("attention", None, "train method class_tokens"),
    ],
)
def test_maps_that_cannot_be_made_are_named_before_the_training(
    small: Recipe, tmp_path: Path, method: str, layer: str | None, message: str
) -> None:
    recipe = replace(small, cam=replace(small.cam, method=method, layer=layer))
    with pytest.raises(ConfigError, match=message):
        run(recipe, tmp_path, last="train", progress=SILENT)
    assert not (tmp_path / "train" / "checkpoint.pt").exists()
