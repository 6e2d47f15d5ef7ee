"""Backbones: shapes, geometry, weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from training.models import CamClassifier, DeepLabV3Plus, build_backbone, build_segmentation, load_model, save_model
from training.models.layers import PhasedConv2d, conv_bn, phases
from weakseg.errors import ConfigError, WeightsError
from weakseg.recipe import BackboneConfig

WEIGHTS = Path("../shared/data/weights/mobilenet_v2_1.0_224_imagenet_dequant.pth")
needs_weights = pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"{WEIGHTS} is not here")


def small(name: str = "mobilenet_v2", **changes: object) -> BackboneConfig:
    return replace(BackboneConfig(name=name, freeze_stages=0), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "n"), [("mobilenet_v2", 2_223_872), ("resnet50", 23_508_032), ("resnet101", 42_500_160)]
)
def test_parameter_count_is_torchvisions(name: str, n: int) -> None:
    # torchvision's totals less the 1000-way head: 3,504,872 - 1,281,000; 25,557,032 - 2,049,000; 44,549,160 - 2,049,000
    assert sum(p.numel() for p in build_backbone(small(name)).parameters()) == n


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet50"])
@pytest.mark.parametrize("stride", [8, 16])
def test_maps_have_the_stated_strides_and_channels(name: str, stride: int) -> None:
    backbone = build_backbone(small(name, output_stride=stride)).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, 96, 64))
    assert [m.shape[1] for m in maps] == list(backbone.channels)
    assert [(96 // m.shape[2], 64 // m.shape[3]) for m in maps] == [(s, s) for s in backbone.strides]


@pytest.mark.parametrize("stride", [2, 4, 8, 16, 32])
def test_phases_shift_by_half_a_stride(stride: int) -> None:
    assert sum(p * 2**k for k, p in enumerate(phases(stride))) == max(0, stride // 2 - 1)


@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("phase", [0, 1])
def test_phase_says_where_a_strided_output_is_centred(kernel: int, phase: int) -> None:
    conv = PhasedConv2d(1, 1, kernel, 2, (kernel - 1) // 2, bias=False, phase=phase)
    x = torch.zeros(1, 1, 16, 16, requires_grad=True)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[..., kernel // 2, kernel // 2] = 1
    out = conv(x)
    assert out.shape[2:] == (8, 8)
    out[0, 0, 3, 4].backward()
    assert x.grad is not None
    assert x.grad[0, 0].nonzero().tolist() == [[6 + phase, 8 + phase]]


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet50"])
@pytest.mark.parametrize("stride", [8, 16])
def test_a_cell_sees_the_pixels_around_its_half_pixel_centre(
    name: str, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receptive field of cell i is symmetric about stride * i + (stride - 1) / 2, half a pixel off at most."""
    # max pooling lets one pixel of nine through, which one is chance; the mean has the same field
    monkeypatch.setattr(torch.nn.functional, "max_pool2d", torch.nn.functional.avg_pool2d)
    backbone = build_backbone(small(name, output_stride=stride)).eval().double()
    for module in backbone.modules():  # every path open and alike, so that the field's extent shows in the gradient
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.constant_(module.weight, 1 / module.weight[0].numel())
        if isinstance(module, torch.nn.ReLU6):
            module.max_val = float("inf")
    size = 1024 if name == "resnet50" or stride == 8 else 768
    x = torch.full((1, 3, size, 16), 200.0, dtype=torch.double, requires_grad=True)
    cell = size // stride // 2
    backbone(x)[3][0, 0, cell, 0].backward()  # stage 4 has the full stride and a smaller field than stage 5
    assert x.grad is not None
    rows = x.grad[0].abs().sum((0, 2)).nonzero().flatten()
    assert int(rows[0]) > 0 and int(rows[-1]) < size - 1, "the field must end inside the image"
    assert abs((int(rows[0]) + int(rows[-1])) / 2 - (stride * cell + (stride - 1) / 2)) <= 0.5


def test_batch_norm_stays_frozen_in_training_mode() -> None:
    model = CamClassifier(build_backbone(small()), 3).train()
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    model(torch.rand(2, 3, 32, 32) * 255).logits.sum().backward()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not any(p.requires_grad for m in norms for p in m.parameters())


def test_frozen_stages_get_no_gradient() -> None:
    backbone = build_backbone(small(freeze_stages=2))
    frozen = {id(p) for stage in backbone.stages()[:2] for p in stage.parameters()}
    assert all(p.requires_grad == (id(p) not in frozen) for p in backbone.parameters() if p.ndim == 4)


def test_logits_are_the_mean_of_the_cam() -> None:
    model = CamClassifier(build_backbone(small()), 4).eval()
    with torch.no_grad():
        out = model(torch.rand(2, 3, 64, 96) * 255)
    torch.testing.assert_close(out.logits, out.cam.mean((2, 3)))


def test_deeplab_logits_are_at_stride_4_with_a_background_channel() -> None:
    model = DeepLabV3Plus(build_backbone(small()), 5, width=16).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 96) * 255).shape == (1, 6, 16, 24)


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", ["deeplab_v2", "deeplab_largefov"])
def test_older_deeplabs_see_as_far_at_any_stride(name: str, output_stride: int) -> None:
    model = build_segmentation(name, build_backbone(small(output_stride=output_stride)), 5, 16).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 96) * 255).shape == (1, 6, 64 // output_stride, 96 // output_stride)
    pixels = {conv.dilation[0] * output_stride for conv in model.modules() if _is_new_dilated(model, conv)}
    assert pixels == ({48, 96, 144, 192} if name == "deeplab_v2" else {96})


def _is_new_dilated(model: nn.Module, conv: nn.Module) -> bool:
    inside = set(model.backbone.modules())  # type: ignore[union-attr, operator]
    return isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv not in inside


@pytest.mark.parametrize("name", ["deeplab_v3plus", "deeplab_v2", "deeplab_largefov"])
def test_every_segmentation_network_is_stored(name: str, tmp_path: Path) -> None:
    model = build_segmentation(name, build_backbone(small()), 2, 8).eval()
    save_model(tmp_path / "m.pt", model, kind="segmentation", classes=("a", "b"), method=f"{name}, weak supervision")
    loaded, _ = load_model(tmp_path / "m.pt", kind="segmentation")
    x = torch.rand(1, 3, 32, 32) * 255
    with torch.no_grad():
        assert torch.equal(model(x), loaded(x))


def test_unknown_segmentation_network() -> None:
    with pytest.raises(ConfigError, match="expected one of deeplab_v3plus, deeplab_v2, deeplab_largefov"):
        build_segmentation("unet", build_backbone(small()), 2, 8)


@needs_weights
def test_imagenet_weights_give_a_finite_normalised_response() -> None:
    backbone = build_backbone(small(weights=str(WEIGHTS), input_scale="inception")).eval()
    with torch.no_grad():
        out = backbone(torch.full((1, 3, 64, 64), 127.5))[-1]
    assert out.isfinite().all()
    assert 0 < out.max() <= 6


@needs_weights
def test_weights_of_another_architecture_list_their_keys() -> None:
    with pytest.raises(WeightsError, match=r"missing: conv1\.weight.*unexpected: body\.0\.0\.weight.*architecture"):
        build_backbone(small("resnet50", weights=str(WEIGHTS)))


def test_misshapen_weights_are_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = {f"features.{k.removeprefix('body.')}": v for k, v in build_backbone(small()).state_dict().items()}
    state["features.0.0.weight"] = torch.zeros(32, 1, 3, 3)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(
        WeightsError, match=r"1 misshapen: body\.0\.0\.weight \(32, 1, 3, 3\) instead of \(32, 3, 3, 3\)"
    ):
        build_backbone(small(weights=str(tmp_path / "w.pth")))


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_damaged_weights_file_says_so(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not weights")
    with pytest.raises(WeightsError, match="cannot read"):
        build_backbone(small(weights=str(tmp_path / name)))


def test_missing_weights_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights file"):
        build_backbone(small(weights=str(tmp_path / "none.pth")))


def test_safetensors_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = build_backbone(small())
    save_file(
        {f"features.{k.removeprefix('body.')}": v for k, v in source.state_dict().items()}, tmp_path / "w.safetensors"
    )
    loaded = build_backbone(small(weights=str(tmp_path / "w.safetensors")))
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), loaded.parameters(), strict=True))


def test_imagenet_download_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from urllib.error import URLError

    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(WeightsError, match=r"put the file under .*checkpoints/ or pass its path"):
        build_backbone(small(weights="imagenet"))


def test_a_stored_model_comes_back_whole(tmp_path: Path) -> None:
    model = DeepLabV3Plus(build_backbone(small()), 2, width=8).eval()
    save_model(tmp_path / "m.pt", model, kind="segmentation", classes=("a", "b"), method="x")
    loaded, classes = load_model(tmp_path / "m.pt", kind="segmentation")
    x = torch.rand(1, 3, 32, 32) * 255
    with torch.no_grad():
        assert torch.equal(model(x), loaded(x))
    assert classes == ("a", "b")
    with pytest.raises(WeightsError, match="expected a model of kind classifier, got segmentation in"):
        load_model(tmp_path / "m.pt", kind="classifier")


def test_unknown_backbone() -> None:
    with pytest.raises(ConfigError, match="expected one of"):
        build_backbone(small("vgg"))


@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize("learns", [False, True], ids=["frozen", "learns in eval mode"])
def test_batch_norm_goes_into_the_convolution_before_it(phase: int, learns: bool) -> None:
    torch.manual_seed(0)
    conv = PhasedConv2d(4, 6, 3, 2, 1, bias=False, phase=phase).double()
    norm = nn.BatchNorm2d(6).double().eval()
    for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert values is not None
        nn.init.uniform_(values, 0.2, 1.5)
    for parameter in norm.parameters():
        parameter.requires_grad_(learns)
    x = torch.randn(2, 4, 9, 12, dtype=torch.double, requires_grad=True)
    wanted = [x, conv.weight, *(norm.parameters() if learns else [])]
    one, two = norm(conv(x)), conv_bn(conv, norm, x)
    torch.testing.assert_close(one, two)
    seen = torch.rand_like(one)
    torch.testing.assert_close(torch.autograd.grad(one, wanted, seen), torch.autograd.grad(two, wanted, seen))


def test_batch_norm_that_learns_its_statistics_is_left_alone() -> None:
    conv, norm = nn.Conv2d(3, 5, 1, bias=False), nn.BatchNorm2d(5).train()
    x = torch.randn(4, 3, 6, 6)
    before = norm.running_mean.clone()
    out = conv_bn(conv, norm, x)
    assert not torch.equal(norm.running_mean, before)
    torch.testing.assert_close(out.mean(dim=(0, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
