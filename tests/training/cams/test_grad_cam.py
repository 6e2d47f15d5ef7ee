"""Grad-CAM: closed forms, other layers, classifiers that CAM cannot explain, bad layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.training.cams.networks import Linear, Pooled, classifier_for, flattened, photographs
from tests.training.methods.parts import model_of
from training import cams, methods
from training.graphs import ClassifierGraph
from training.models import CamClassifier, build_backbone
from weakseg.errors import ConfigError
from weakseg.recipe import BackboneConfig

grad_cam, cam = cams.get("grad_cam"), cams.get("cam")
IMAGE = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [0.0, 1.0]]]])  # (1, 2, 2, 2)


@pytest.mark.parametrize("name", ["small_resnet", "mobilenet_v2"])
def test_at_the_last_layer_of_a_pooled_network_it_is_cam_by_the_number_of_cells(name: str) -> None:
    torch.manual_seed(0)
    model = CamClassifier(build_backbone(BackboneConfig(name=name)), 5).eval()
    images = photographs()
    with torch.no_grad():
        (logits, maps), (expected_logits, expected) = grad_cam.maps(model, images), cam.maps(model, images)
    cells = expected.shape[2] * expected.shape[3]
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(maps, expected / cells, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 2.0)])
def test_views_of_all_sizes_weigh_as_they_do_for_cam(scales: tuple[float, ...]) -> None:
    """Summed as they are, a view of twice the side would count a quarter."""
    model = classifier_for("cam", 3).eval()
    images = torch.randint(0, 256, (1, 64, 96, 3), dtype=torch.uint8)
    with torch.inference_mode():
        ours, plain = (ClassifierGraph(model, method, scales, flip=True).eval()(images) for method in (grad_cam, cam))
    torch.testing.assert_close(ours["cam"], plain["cam"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["scores"], plain["scores"])


def test_a_flattened_classifier_by_hand() -> None:
    """A = W x; S_c = sum_kij f_ckij A_kij, so that a_ck = mean_ij f_ckij and the map is ReLU(sum_k a_ck A_k)."""
    fully_connected = [[1.0, 0.0, 0.0, 3.0, -2.0, -2.0, 0.0, 0.0], [0.0, -4.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]]
    model = Linear([[1.0, 0.0], [1.0, -1.0]], flattened(fully_connected))
    logits, maps = grad_cam.maps(model, IMAGE, layer="layer")
    # A_1 = (1 2; 3 4), A_2 = (1 1; 3 3); a_1 = (1, -1), a_2 = (-1, 1)
    assert torch.equal(maps, torch.tensor([[[[0.0, 1.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]]))
    torch.testing.assert_close(logits - model.head[1].bias, torch.tensor([[9.0, 0.0]]))


def test_an_inner_layer_by_hand() -> None:
    """Behind the layer come a ReLU and pooling: a cell that the ReLU closes has no gradient."""
    model = Linear([[1.0, -2.0], [-1.0, 2.0]], nn.Sequential(nn.ReLU(inplace=True), Pooled([[2.0, 1.0]])))
    _, maps = grad_cam.maps(model, IMAGE, layer="layer")
    # A_1 = (1 0; 3 2), A_2 = -A_1; gradients 2/4 where A_1 > 0, 1/4 where A_2 > 0: means 3/8 and 0
    torch.testing.assert_close(maps, torch.tensor([[[[3.0, 0.0], [9.0, 6.0]]]]) / 8)


@pytest.mark.parametrize(
    ("backbone", "stride", "layer", "size"),
    [
        ("small_resnet", 16, "backbone.stage3", (6, 8)),
        ("mobilenet_v2", 16, "backbone.body.6", (6, 8)),
        ("resnet50", 16, "backbone.layer2", (6, 8)),
        ("resnet38d", 8, "backbone.b5_2", (6, 8)),
    ],
)
def test_inner_layers_by_name(backbone: str, stride: int, layer: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    config = BackboneConfig(name=backbone, output_stride=stride, freeze_stages=1)
    model = CamClassifier(build_backbone(config), 2).eval()
    _, maps = grad_cam.maps(model, photographs(1), layer=layer)
    assert maps.shape == (1, 2, *size) and torch.isfinite(maps).all() and maps.max() > 0
    assert not torch.equal(maps[:, 0], maps[:, 1])


def test_gradients_of_a_layer_are_autograds_own() -> None:
    """Against a graph of the whole network, without hooks."""
    model = classifier_for("cam", 3).eval()
    x = model.backbone.normalise(photographs())
    for stage in model.backbone.stages()[:4]:
        x = stage(x)
    inner = x.detach().requires_grad_()
    logits = model.head(model.backbone.stage5(inner)).mean(dim=(2, 3))
    expected = []
    for c in range(3):
        (gradient,) = torch.autograd.grad(logits[:, c].sum(), inner, retain_graph=True)
        expected.append(torch.einsum("bk,bkij->bij", gradient.mean(dim=(2, 3)), inner).relu())
    _, maps = grad_cam.maps(model, photographs(), layer="backbone.stage4")
    torch.testing.assert_close(maps, torch.stack(expected, dim=1).detach())


def test_a_network_in_training_is_looked_at_as_in_evaluation() -> None:
    model = classifier_for("cam", 3)
    for a, b in zip(
        grad_cam.maps(model.train(), photographs()), grad_cam.maps(model.eval(), photographs()), strict=True
    ):
        assert torch.equal(a, b)


def test_what_comes_before_the_layer_leaves_no_graph() -> None:
    model = classifier_for("cam", 2).eval()
    kept: list[Tensor] = []
    handles = [
        getattr(model.backbone, stage).register_forward_hook(lambda _m, _i, out: kept.append(out))
        for stage in ("stage2", "stage5")
    ]
    grad_cam.maps(model, photographs(), layer="backbone.stage3")
    for handle in handles:
        handle.remove()
    assert [x.requires_grad for x in kept] == [False, True]


class Gained(nn.Module):
    """Behind the layer, the images themselves come in again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain = nn.Conv2d(3, 3, 1), nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (self.layer(images) + self.gain * images).mean(dim=(2, 3))


def test_images_of_inference_mode_may_be_needed_behind_the_layer() -> None:
    model = Gained()
    with torch.inference_mode():
        logits, maps = grad_cam.maps(model, photographs() * 1, layer="layer")
    assert logits.shape == (2, 3) and maps.max() > 0


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.aside = nn.Conv2d(3, 3, 1), nn.Linear(3, 2), nn.Conv2d(3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        self.aside(images)
        return self.linear(self.conv(self.conv(images)).mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("conv", "layer 'conv' runs 2 times in a forward pass, expected once"),
        ("linear", r"layer 'linear' gives \(2, 2\), expected maps \(B, K, h, w\)"),
        ("aside", "no score depends on what layer 'aside' gives"),
        ("convv", "the classifier has no layer 'convv': set cam.layer to one, such as conv"),
        (None, "the classifier has no layer 'dropout': set cam.layer to one, such as conv, aside"),
    ],
)
def test_layers_that_cannot_be_explained(layer: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grad_cam.maps(Twice(), photographs(), layer=layer)


@pytest.mark.parametrize("method", methods.names())
def test_classifiers_of_all_methods(method: str) -> None:
    """The head's layer is found, or the message says what to do."""
    model, images = model_of(method).eval(), photographs(1, 64, 64)
    layer = None
    if method == "class_tokens":
        with pytest.raises(ConfigError, match="no score depends on what layer 'dropout' gives: name one on the way"):
            grad_cam.maps(model, images)
        return
    if method == "erasing":
        with pytest.raises(ConfigError, match="choose cam method cam, .* or set cam.layer to members.0.dropout, for"):
            grad_cam.maps(model, images)
        layer = "members.0.dropout"
    logits, maps = cams.get("grad_cam", layer).maps(model, images)
    assert logits.shape == (1, 3) and maps.shape[:2] == (1, 3) and maps.max() > 0


def test_a_layer_that_the_network_goes_past() -> None:
    """The weights of frozen batch norm are folded into the convolution before it, whose module is not called."""
    model = classifier_for("cam", 2).eval()
    with pytest.raises(ConfigError, match="layer 'backbone.stage1.0' runs 0 times"):
        grad_cam.maps(model, photographs(), layer="backbone.stage1.0")


def test_methods_without_layers_refuse_one() -> None:
    with pytest.raises(ConfigError, match="cam method cam takes no layer, got cam.layer 'x': leave it out"):
        cams.get("cam", "x")
    bound = cams.get("grad_cam", "backbone.stage3")
    assert bound.EXPORTABLE is False
    assert bound.maps(classifier_for("cam", 2).eval(), photographs(1))[1].shape == (1, 2, 6, 8)
