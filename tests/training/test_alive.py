"""A network that has died is named, where its loss is finite and says nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from training import train_classifier
from training.models import CamClassifier, build_backbone
from training.train_classifier import check_alive
from weakseg.errors import TrainingError
from weakseg.progress import Progress
from weakseg.recipe import BackboneConfig, DataConfig, OptimConfig, Recipe, TrainConfig

OPTIM = OptimConfig(epochs=1, batch_size=4, crop_px=32, long_side_px=(32, 48), workers=0, lr=0.02)


def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (48, 40, 3), dtype=np.uint8) for _ in range(2)]


def classifier() -> CamClassifier:
    torch.manual_seed(0)
    return CamClassifier(build_backbone(BackboneConfig(name="small_resnet", freeze_stages=0)), 3, dropout=0.0).eval()


def kill(model: torch.nn.Module) -> None:
    """As steps that are too large do: what comes before the last ReLU is below 0 everywhere."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.bias, -1e3)


@pytest.mark.parametrize("alive", [True, False])
def test_features_that_are_the_same_all_over_are_dead(alive: bool) -> None:
    model = classifier()
    if alive:
        check_alive(model, images(), OPTIM)
        check_alive(model, [np.full((32, 32, 3), 9, np.uint8), *images()], OPTIM)  # one grey image says nothing
        return
    kill(model)
    with pytest.raises(
        TrainingError, match=r"has died.* Lower train.optim.lr \(it is 0.02\) or train.optim.new_lr_sca"
    ):
        check_alive(model, images(), OPTIM)


def test_the_training_ends_at_the_epoch_in_which_it_died(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = train_classifier.fit

    def fit_a_dead_one(model, *args, **options):  # type: ignore[no-untyped-def]
        kill(model)
        return fit(model, *args, **options)

    recipe = Recipe(
        name="squares",
        data=DataConfig(root=str(squares), tags="imagesets"),
        backbone=BackboneConfig(name="small_resnet", freeze_stages=0),
        train=TrainConfig(optim=replace(OPTIM, epochs=3, lr=1e-9)),
    )
    monkeypatch.setattr(train_classifier, "fit", fit_a_dead_one)
    with pytest.raises(TrainingError, match="died"):
        train_classifier.run(recipe, tmp_path, stage="train", progress=Progress("silent"))
    assert not (tmp_path / "train" / "classifier.pt").exists()
