"""Grad-CAM++: closed forms, and numbers by hand."""

from __future__ import annotations

import pytest
import torch

from tests.training.cams.networks import Linear, Pooled, classifier_for, flattened, photographs
from training import cams

grad_cam_pp = cams.get("grad_cam_pp")
IMAGE = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [0.0, 1.0]]]])  # (1, 2, 2, 2)


def test_at_the_last_layer_of_a_pooled_network() -> None:
    model = classifier_for("cam", 5).eval()
    with torch.no_grad():
        features = model.backbone(photographs())[-1]
        head = model.head.weight[:, :, 0, 0]
        means = features.mean(dim=(2, 3))
        weight = head.relu() / (2 + head.relu() * means[:, None])  # (B, C, K)
        expected = torch.einsum("bck,bkij->bcij", weight, features)
    torch.testing.assert_close(grad_cam_pp.maps(model, photographs())[1], expected)


def test_a_flattened_classifier_by_hand() -> None:
    """A_1 = (1 2; 3 4) with gradients (1 0; -1 2), A_2 = (1 1; 3 3) with none but -5."""
    model = Linear([[1.0, 0.0], [1.0, -1.0]], flattened([[1.0, 0.0, -1.0, 2.0, -5.0, 0.0, 0.0, 0.0]]))
    _, maps = grad_cam_pp.maps(model, IMAGE, layer="layer")
    # sum A_1 = 10: w_1 = 1 / (2 + 10) + 2 / (2 + 20); w_2 = 0
    torch.testing.assert_close(maps, (1 / 12 + 2 / 22) * torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_small_gradients_count_as_large_ones(scale: float) -> None:
    """Activations scaled up by what the weights behind are scaled down give maps of the same form.

    With an epsilon beside G^2 the smaller ones would not.
    """
    base = Linear([[1.0, 0.5], [0.5, 1.0]], Pooled([[1.0, 3.0]]))
    scaled = Linear([[scale, 0.5 * scale], [0.5 * scale, scale]], Pooled([[1 / scale, 3 / scale]]))
    (_, expected), (_, maps) = (grad_cam_pp.maps(model, IMAGE, layer="layer") for model in (base, scaled))
    torch.testing.assert_close(maps, expected)


@pytest.mark.parametrize("head", [0.8, 0.9])
def test_activations_that_add_up_to_less_than_nothing(head: float) -> None:
    """2 + G sum A is 0, or below it: the weight must stay that of a positive gradient."""
    model = Linear([[-1.0, 0.0], [1.0, 0.0]], Pooled([[head, 0.0], [0.1, 10.0]]))
    _, maps = grad_cam_pp.maps(model, IMAGE, layer="layer")
    # sum A = -10 and 10; G of the second class = 0.1 / 4 and 10 / 4
    weight = 4 * 2.5 / (2 + 2.5 * 10) - 4 * 0.025 / 2
    torch.testing.assert_close(maps[0], torch.stack([torch.zeros(2, 2), weight * IMAGE[0, 0]]))
