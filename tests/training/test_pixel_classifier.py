"""Scores of every cell, and what they say of the image."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from training.methods import sec
from training.models import build_backbone, load_model, save_model
from training.models.pixel_classifier import PixelClassifier
from weakseg.recipe import BackboneConfig


def network(n_classes: int = 3, **options: object) -> PixelClassifier:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name="small_resnet", freeze_stages=0))
    return PixelClassifier(backbone, n_classes, **options).eval()  # type: ignore[arg-type]


def of_bias(model: PixelClassifier, *bias: float) -> PixelClassifier:
    """Every cell has these scores."""
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor(bias))
    return model


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_scores_are_of_all_classes_and_maps_their_probabilities(pooling: str) -> None:
    images = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8)
    with torch.no_grad():
        out = network(pooling=pooling)(images)
    assert out.scores.shape == (2, 4, 3, 4) and out.logits.shape == (2, 3)
    torch.testing.assert_close(out.cam, out.scores.softmax(dim=1)[:, 1:])


def test_an_image_has_a_class_as_surely_as_its_surest_cell() -> None:
    images = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8)
    with torch.no_grad():
        out = network()(images)
    torch.testing.assert_close(out.logits.sigmoid(), out.cam.amax(dim=(2, 3)))


def test_logits_of_scores_that_are_the_same_everywhere() -> None:
    images = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        largest, mean = (of_bias(network(pooling=p), 0, 0, 0, 0)(images) for p in ("max", "mean"))
        uneven = of_bias(network(pooling="mean"), 5, 1, 2, -3)(images)
        sure = of_bias(network(), 100, -100, 0, -100)(images)
    torch.testing.assert_close(largest.logits, torch.full((1, 3), -math.log(3)))  # 1/4 against 3/4
    assert mean.logits.tolist() == [[0, 0, 0]]
    assert uneven.logits.tolist() == [[1, 2, -3]]
    assert torch.isfinite(sure.logits).all()


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_options_make_it_again(pooling: str, tmp_path: Path) -> None:
    model = network(2, dropout=0.25, pooling=pooling)
    save_model(tmp_path / "m.pt", model, kind="classifier", classes=("a", "b"), method="sec")
    again, _ = load_model(tmp_path / "m.pt", kind="classifier")
    assert isinstance(again, sec.NETWORK) and again.options == {"dropout": 0.25, "pooling": pooling}


def test_it_starts_without_a_preference() -> None:
    assert (network().head.bias == 0).all()
