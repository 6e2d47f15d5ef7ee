"""LayerCAM: closed forms, and numbers by hand."""

from __future__ import annotations

import torch

from tests.training.cams.networks import Linear, classifier_for, flattened, photographs
from training import cams
from training.graphs import ClassifierGraph

layer_cam = cams.get("layer_cam")
IMAGE = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [0.0, 1.0]]]])  # (1, 2, 2, 2)


def test_at_the_last_layer_it_is_the_cam_of_positive_weights_by_the_number_of_cells() -> None:
    model = classifier_for("cam", 5).eval()
    _, maps = layer_cam.maps(model, photographs())
    with torch.no_grad():
        model.head.weight.clamp_(min=0)
        expected = cams.get("cam").maps(model, photographs())[1]
    torch.testing.assert_close(maps, expected / (expected.shape[2] * expected.shape[3]))


def test_views_of_all_sizes_weigh_as_they_do_for_cam() -> None:
    model = classifier_for("cam", 3).eval()
    with torch.no_grad():
        model.head.weight.clamp_(min=0)
    images = torch.randint(0, 256, (1, 64, 96, 3), dtype=torch.uint8)
    graphs = [ClassifierGraph(model, method, (0.5, 1.0, 2.0), True).eval() for method in (layer_cam, cams.get("cam"))]
    with torch.inference_mode():
        ours, plain = (graph(images)["cam"] for graph in graphs)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_a_flattened_classifier_by_hand() -> None:
    """Every cell by its own gradient, where that is positive; activations that are not are subtracted."""
    weights = [[1.0, 0.0, -1.0, 2.0, -5.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0, 3.0, 0.0, 2.0, 0.0]]
    model = Linear([[1.0, 0.0], [-1.0, 3.0]], flattened(weights))
    _, maps = layer_cam.maps(model, IMAGE, layer="layer")
    # A_1 = (1 2; 3 4), A_2 = (-1 1; -3 -1)
    first = torch.tensor([[1.0, 1.0], [0.0, 8.0 - 1.0]])  # (1, 0 + 1; 0 - 3, 8 - 1), ReLU
    second = torch.tensor([[0.0, 0.0], [0.0, 0.0]])  # (-3, 0; 3 - 6, 0), ReLU
    assert torch.equal(maps, torch.stack([first, second])[None])
