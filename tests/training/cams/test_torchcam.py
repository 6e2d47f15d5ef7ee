"""Beside torchcam 0.5, which needs a pass of its own for every class."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.training.cams.networks import classifier_for, photographs
from training import cams

torchcam = pytest.importorskip("torchcam.methods", reason="torchcam is not installed: make oracle")


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images).logits
        return logits


class Flattened(nn.Module):
    """For images of 24 x 24. No ReLU works in place: it would write into the activations that torchcam has stored."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3, padding=1)
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(6 * 144, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images / 255))
        return logits


def convolutional() -> nn.Module:
    return Logits(classifier_for("cam", 4)).eval()


def fully_connected() -> nn.Module:
    torch.manual_seed(0)
    return Flattened().eval()


# Not Grad-CAM++: torchcam 0.5 divides a copy of its alpha, whose place its numerator then takes.
@pytest.mark.parametrize(("name", "theirs"), [("grad_cam", "GradCAM"), ("layer_cam", "LayerCAM")])
@pytest.mark.parametrize(
    ("build", "layer"),
    [
        (convolutional, "model.backbone.stage5"),
        (convolutional, "model.backbone.stage3"),
        (fully_connected, "features.0"),
        (fully_connected, "features.3"),
    ],
)
def test_the_same_maps(name: str, theirs: str, build: type, layer: str) -> None:
    model, images = build(), photographs(2, 24, 24)
    _, ours = cams.get(name).maps(model, images, layer=layer)
    with getattr(torchcam, theirs)(model, layer) as extractor:
        expected = [extractor(c, model(images), normalized=False)[0] for c in range(4)]
    torch.testing.assert_close(ours, torch.stack(expected, dim=1).detach(), rtol=1e-4, atol=1e-7)
