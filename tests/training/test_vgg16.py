"""VGG16-LargeFOV: size, names, geometry, weights of others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training import cams
from training.models import CamClassifier, build_backbone
from training.models.vgg16 import Vgg16, vgg16_state
from weakseg.errors import ConfigError, WeightsError
from weakseg.recipe import BackboneConfig

CONFIG = BackboneConfig(name="vgg16", output_stride=8, freeze_stages=0)
# torchvision's vgg16: channels of the convolutions of `features`, M a pool; two layers for a convolution and its ReLU
FEATURES = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")

# stage and number of caffe's conv<stage>_<number>, index in `features`
CAFFE = [
    *[(1, 1, 0), (1, 2, 2), (2, 1, 5), (2, 2, 7), (3, 1, 10), (3, 2, 12), (3, 3, 14)],
    *[(4, 1, 17), (4, 2, 19), (4, 3, 21), (5, 1, 24), (5, 2, 26), (5, 3, 28)],
]


def expected_shapes(prefix: str = "body") -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    at, inputs = 0, 3
    for row in FEATURES:
        if isinstance(row, int):
            shapes |= {f"{prefix}.{at}.weight": (row, inputs, 3, 3), f"{prefix}.{at}.bias": (row,)}
            inputs = row
        at += 1 if row == "M" else 2
    return shapes


def test_names_and_shapes() -> None:
    fully_connected = {
        "fc6.weight": (1024, 512, 3, 3),
        "fc6.bias": (1024,),
        "fc7.weight": (1024, 1024, 1, 1),
        "fc7.bias": (1024,),
    }
    with torch.device("meta"):
        backbone = build_backbone(CONFIG)
    assert {k: tuple(v.shape) for k, v in backbone.state_dict().items()} == expected_shapes() | fully_connected


def test_parameter_count() -> None:
    # torchvision's features, 14,714,688; fc6 and fc7 of 1024 channels, 4,719,616 + 1,049,600: caffe's "vgg16_20M"
    with torch.device("meta"):
        model = CamClassifier(build_backbone(CONFIG), 20)
    assert sum(p.numel() for p in model.backbone.parameters()) == 20_483_904
    assert sum(p.numel() for p in model.parameters()) == 20_483_904 + 20 * 1024


def test_five_maps_of_the_stated_strides_and_channels() -> None:
    backbone = build_backbone(CONFIG).eval()
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, 48, 32) * 255)
    assert tuple(m.shape[1] for m in maps) == backbone.channels == (64, 128, 256, 512, 1024)
    assert [(48 // m.shape[2], 32 // m.shape[3]) for m in maps] == [(s, s) for s in backbone.strides]
    assert backbone.strides == (2, 4, 8, 8, 8)
    assert all(torch.isfinite(m).all() and m.min() >= 0 and m.max() > 0 for m in maps)


def test_a_stride_of_16_is_refused() -> None:
    with pytest.raises(ConfigError, match="vgg16 has an output stride of 8, not 16: set --backbone.output_stride 8"):
        build_backbone(replace(CONFIG, output_stride=16))


def test_dilations() -> None:
    def dilations(backbone: Vgg16) -> list[int]:
        return [m.dilation[0] for m in backbone.modules() if isinstance(m, torch.nn.Conv2d)]

    with torch.device("meta"):
        assert dilations(Vgg16(CONFIG)) == [1] * 10 + [2] * 3 + [1, 1]
        assert dilations(Vgg16(CONFIG, fc6_dilation=12)) == [1] * 10 + [2] * 3 + [12, 1]


@pytest.mark.parametrize(("freeze", "n_frozen"), [(0, 0), (2, 4), (5, 15)])
def test_psas_frozen_layers_are_two_stages(freeze: int, n_frozen: int) -> None:
    with torch.device("meta"):
        backbone = build_backbone(replace(CONFIG, freeze_stages=freeze))
    frozen = [name for name, p in backbone.named_parameters() if not p.requires_grad and name.endswith("weight")]
    assert len(frozen) == n_frozen
    assert freeze != 2 or frozen == [f"body.{i}.weight" for i in (0, 2, 5, 7)]


def test_a_cell_sees_the_pixels_around_its_half_pixel_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    def mean(x: Tensor, kernel: int, stride: int, padding: int = 0, *_: object, **__: object) -> Tensor:
        return F.avg_pool2d(x, kernel, stride, padding)

    monkeypatch.setattr(torch.nn.functional, "max_pool2d", mean)  # the largest of nine is chance, the field is the same
    backbone = build_backbone(CONFIG).eval().double()
    for module in backbone.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    x = torch.full((1, 3, 320, 16), 200.0, dtype=torch.double, requires_grad=True)
    backbone(x)[-1][0, 0, 20, 0].backward()
    assert x.grad is not None
    rows = x.grad[0].abs().sum((0, 2)).nonzero().flatten()
    assert int(rows[0]) > 0 and int(rows[-1]) < 319, "the field must end inside the image"
    assert abs((int(rows[0]) + int(rows[-1])) / 2 - (8 * 20 + 3.5)) <= 0.5


def test_torchvisions_file_becomes_ours_with_a_large_field_of_view() -> None:
    columns, thousands = torch.arange(25088.0), torch.arange(4096.0)
    state = {key: torch.zeros(shape) for key, shape in expected_shapes("features").items()}
    state |= {
        "classifier.0.weight": columns.expand(4096, -1),
        "classifier.0.bias": thousands,
        "classifier.3.weight": thousands[:, None] + thousands / 8192,
        "classifier.3.bias": thousands,
        "classifier.6.weight": torch.zeros(1000, 4096),
        "classifier.6.bias": torch.zeros(1000),
    }
    ours = vgg16_state(state)
    with torch.device("meta"):
        own = build_backbone(CONFIG).state_dict()
    assert {k.replace("features", "body"): v.shape for k, v in ours.items()} == {k: v.shape for k, v in own.items()}
    assert torch.equal(ours["fc6.weight"][7, 2], 2 * 49 + torch.tensor([[0.0, 3, 6], [21, 24, 27], [42, 45, 48]]))
    assert torch.equal(ours["fc6.bias"], thousands[::4])
    assert float(ours["fc7.weight"][3, 5]) == 12 + 20 / 8192


def test_caffes_names_and_its_order_of_colours(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [(f"conv{s}_{k}", i) for s, k, i in CAFFE]
    source = build_backbone(CONFIG).state_dict()
    state = {f"{name}.{kind}": source[f"body.{i}.{kind}"] for name, i in layers for kind in ("weight", "bias")}
    state |= {key: value for key, value in source.items() if key.startswith("fc")}
    state |= {"fc8.weight": torch.zeros(20, 1024, 1, 1)}
    torch.save(state, tmp_path / "vgg16_20M.pth")
    backbone = build_backbone(replace(CONFIG, weights=str(tmp_path / "vgg16_20M.pth"), input_scale="caffe")).eval()
    loaded = backbone.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in source.items() if key != "body.0.weight")
    images = torch.rand(1, 3, 16, 16) * 255
    bgr = images.flip(1) - torch.tensor([104.008, 116.669, 122.675])[:, None, None]
    expected = F.conv2d(bgr, state["conv1_1.weight"], state["conv1_1.bias"], padding=1)
    with torch.no_grad():
        torch.testing.assert_close(backbone.body[0](backbone.normalise(images)), expected, rtol=1e-4, atol=1e-3)
    assert backbone.mean_colour == (123, 117, 104)


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "resnet.pth")
    with pytest.raises(WeightsError, match=r"30 missing: body\.0\.weight.*1 unexpected: conv1\.weight"):
        build_backbone(replace(CONFIG, weights=str(tmp_path / "resnet.pth")))


def test_maps_at_the_literatures_layers() -> None:
    """conv5_3 behind its ReLU, where VGG16 has been looked at since Grad-CAM; and what comes before the head."""
    torch.manual_seed(0)
    model = CamClassifier(build_backbone(CONFIG), 3).eval()
    images = torch.rand(1, 3, 48, 32) * 255
    for name in ("grad_cam", "grad_cam_pp", "layer_cam"):
        _, maps = cams.get(name).maps(model, images, layer="backbone.body.29")
        assert maps.shape == (1, 3, 6, 4) and torch.isfinite(maps).all() and maps.max() > 0
