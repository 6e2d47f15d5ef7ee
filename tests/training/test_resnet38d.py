"""ResNet38d against its specification, written out once more with torch's functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.models import build_backbone
from training.models.backbone import Backbone
from training.models.kept_channels import channel_noise, conv_of_kept, scale
from training.models.layers import bn_relu
from weakseg.errors import ConfigError
from weakseg.recipe import BackboneConfig

PAPER = BackboneConfig(name="resnet38d", output_stride=8, freeze_stages=1)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    backbone = build_backbone(PAPER)
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            randomise(module)
    return backbone


def randomise(norm: torch.nn.BatchNorm2d) -> None:
    with torch.no_grad():
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2)
        norm.weight.normal_(1, 0.3)
        norm.bias.normal_(0, 0.2)


@contextmanager
def padding(backbone: Backbone, symmetric: bool) -> Iterator[None]:
    phases = {m: m.phase for m in backbone.modules() if hasattr(m, "phase")}
    try:
        if symmetric:
            backbone.symmetric_padding()
        yield
    finally:
        for module, phase in phases.items():
            module.phase = phase


class Specification:
    """The network as its tables say, from a state dict; dropout draws from torch's generator in the layers' order."""

    def __init__(self, state: dict[str, Tensor], dropout: bool) -> None:
        self.state, self.dropout = state, dropout

    def bn_relu(self, x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (self.state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, mean, var, weight, bias))

    def conv(self, x: Tensor, name: str, stride: int = 1, dilation: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, None, stride, weight.shape[2] // 2 * dilation, dilation)

    def block(self, x: Tensor, name: str, stride: int, first: int, dilation: int) -> tuple[Tensor, Tensor]:
        u = self.bn_relu(x, f"{name}.bn_branch2a")
        shortcut = self.conv(u, f"{name}.conv_branch1", stride) if f"{name}.conv_branch1.weight" in self.state else x
        h = self.bn_relu(self.conv(u, f"{name}.conv_branch2a", stride, first), f"{name}.bn_branch2b1")
        return shortcut + self.conv(h, f"{name}.conv_branch2b1", 1, dilation), u

    def bottleneck(self, x: Tensor, name: str, p: float) -> tuple[Tensor, Tensor]:
        u = self.bn_relu(x, f"{name}.bn_branch2a")
        h = self.bn_relu(self.conv(u, f"{name}.conv_branch2a"), f"{name}.bn_branch2b1")
        h = self.conv(F.dropout2d(h, p, self.dropout), f"{name}.conv_branch2b1", 1, 4)
        h = F.dropout2d(self.bn_relu(h, f"{name}.bn_branch2b2"), p, self.dropout)
        return self.conv(u, f"{name}.conv_branch1") + self.conv(h, f"{name}.conv_branch2b2"), u

    def maps(self, x: Tensor) -> Iterator[Tensor]:
        x = self.conv(x, "conv1a")
        for name, n, stride, first, dilation in (
            ("b2", 3, 2, 1, 1),
            ("b3", 3, 2, 1, 1),
            ("b4", 6, 2, 1, 1),
            ("b5", 3, 1, 1, 2),
        ):
            for k in range(n):
                x, u = self.block(
                    x, *((name, stride, first, dilation) if k == 0 else (f"{name}_{k}", 1, dilation, dilation))
                )
                if k == 0 and name != "b2":
                    yield u
        x, u = self.bottleneck(x, "b6", 0.3)
        yield u
        x, _ = self.bottleneck(x, "b7", 0.5)
        yield self.bn_relu(x, "bn7")


def test_counts_of_the_paper(backbone: Backbone) -> None:
    parameters = list(backbone.parameters())
    assert sum(p.numel() for p in parameters) == 105_070_912
    # with SEAM's head (20 classes): 105,358,208, of which 104,489,536 learn
    assert sum(p.numel() for p in parameters if p.requires_grad) == 104_489_536 - 287_296
    assert len([p for p in parameters if p.requires_grad]) == 35
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in backbone.modules()) == 37


def test_freezing_the_first_stage_freezes_what_the_authors_freeze(backbone: Backbone) -> None:
    frozen = {name.split(".")[0] for name, p in backbone.named_parameters() if p.ndim == 4 and not p.requires_grad}
    assert frozen == {"conv1a", "b2", "b2_1", "b2_2"}
    assert not any(m.training for m in backbone.train().modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_another_output_stride_is_refused() -> None:
    with pytest.raises(ConfigError, match="output stride of 8, not 16: set --backbone.output_stride 8"):
        build_backbone(BackboneConfig(name="resnet38d"))


def test_cells_are_centred_by_phases_that_the_authors_do_not_have(backbone: Backbone) -> None:
    strided = ("b2", "b3", "b4")
    layers = [(getattr(backbone, b).conv_branch2a, getattr(backbone, b).conv_branch1) for b in strided]
    assert [[layer.phase for layer in pair] for pair in layers] == [[1, 1], [1, 1], [0, 0]]


def close(got: Tensor | None, want: Tensor | None) -> None:
    assert got is not None and want is not None
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.detach().abs().max()))


def test_maps_are_the_specifications(backbone: Backbone) -> None:
    x = torch.randn(1, 3, 40, 24)
    with padding(backbone.eval(), symmetric=True), torch.no_grad():
        maps = backbone.features(x)
        expected = list(Specification(backbone.state_dict(), dropout=False).maps(x))
    assert tuple(m.shape[1] for m in maps) == backbone.channels == (128, 256, 512, 1024, 4096)
    assert tuple(40 // m.shape[2] for m in maps) == backbone.strides == (2, 4, 8, 8, 8)
    for got, want in zip(maps, expected, strict=True):
        close(got, want)


def test_gradients_are_the_specifications_with_the_same_dropout(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.models.kept_channels.LEAST_CELLS", 1)
    state = {k: v.detach().clone().requires_grad_(v.ndim == 4) for k, v in backbone.state_dict().items()}
    x = torch.randn(2, 3, 40, 24)
    with padding(backbone.train(), symmetric=True):
        torch.manual_seed(1)
        maps = backbone.features(x)[1:]
    torch.manual_seed(1)
    expected = list(Specification(state, dropout=True).maps(x))[1:]
    weights = [torch.rand_like(m) - 0.5 for m in expected]
    torch.autograd.backward(maps, weights)
    torch.autograd.backward(expected, weights)
    close(maps[-1], expected[-1])
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            close(parameter.grad, state[name].grad)
    backbone.zero_grad()


@pytest.mark.parametrize(("symmetric", "centre"), [(False, 8 * 24 + 3), (True, 8 * 24)])
def test_where_a_cell_looks(backbone: Backbone, symmetric: bool, centre: int) -> None:
    """Cell 24 of a stride-8 map covers pixels 192 to 199; the authors' padding centres it on the first of them."""
    x = torch.randn(1, 3, 384, 16, requires_grad=True)
    with padding(backbone.eval(), symmetric):
        backbone.features(x)[2][0, :, 24].sum().backward()
    assert x.grad is not None
    rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows[0]) > 0 and int(rows[-1]) < 383, "the field must end inside the image"
    assert (int(rows[0]) + int(rows[-1])) / 2 == centre
    backbone.zero_grad()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("drops", [(True, False), (False, True), (True, True)])
def test_a_convolution_of_kept_channels_is_the_whole_one_masked(
    drops: tuple[bool, bool], layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(12, 10, 3, padding=2, dilation=2, bias=False).to(memory_format=layout)
    x = torch.randn(3, 12, 16, 20).to(memory_format=layout)
    before, behind = channel_noise(x, 12, 0.5), channel_noise(x, 10, 0.5)
    x = x if not drops[0] else scale(x, before)
    noise = before if drops[0] else None, behind if drops[1] else None

    def gradients(sparse: bool) -> tuple[Tensor, ...]:
        inputs = x.clone().requires_grad_()
        out = conv_of_kept(conv, inputs, *noise) if sparse else conv(inputs)
        out = scale(out, noise[1])
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
        grad_x, grad_weight = torch.autograd.grad(loss, (inputs, conv.weight))
        return out.detach(), scale(grad_x, noise[0]), grad_weight  # what dropout zeroes takes no gradient further

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_channel_noise_is_dropout2d() -> None:
    x = torch.rand(4, 32, 5, 5)
    torch.manual_seed(3)
    want = torch.nn.Dropout2d(0.3)(x)
    torch.manual_seed(3)
    assert torch.equal(scale(x, channel_noise(x, 32, 0.3)), want)
    assert channel_noise(x, 32, 0.0) is None


def test_frozen_bn_relu_keeps_its_result_alone() -> None:
    norm = torch.nn.BatchNorm2d(3).eval()
    randomise(norm)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    want = F.relu(norm(x))
    (expected,) = torch.autograd.grad(want, x, want.detach())
    norm.requires_grad_(False)
    got = bn_relu(norm, x)
    assert torch.equal(got, want)
    assert not any(kept is x for kept in got.grad_fn.saved_tensors)
    got.backward(got.detach())
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("mode", [False, True])
def test_bn_relu_trains_batch_norm_that_is_not_frozen(mode: bool) -> None:
    norm = torch.nn.BatchNorm2d(3).train(mode)
    x = torch.randn(4, 3, 4, 4, requires_grad=True)
    torch.testing.assert_close(bn_relu(norm, x), F.relu(norm(x)))
    bn_relu(norm, x).sum().backward()
    assert norm.weight.grad is not None and x.grad is not None
