"""ResNet38d against its specification, written out once more with torch's functions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.models import build_backbone, resnet38d
from training.models.backbone import Backbone
from training.models.kept_channels import channel_noise, conv_of_kept, scale
from training.models.layers import bn_relu
from weakseg.errors import ConfigError
from weakseg.recipe import BackboneConfig

PAPER = BackboneConfig(name="resnet38d", output_stride=8, freeze_stages=1)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Backbone:
    """The same network with 1/16 of the channels, in double precision, its batch norm not the identity."""
    rows = [(name, n, i // 16, m // 16, o // 16, *rest) for name, n, i, m, o, *rest in resnet38d.ROWS]
    bottlenecks = [(name, i // 16, o // 16, p) for name, i, o, p in resnet38d.BOTTLENECKS]
    monkeypatch.setattr(resnet38d, "ROWS", rows)
    monkeypatch.setattr(resnet38d, "BOTTLENECKS", bottlenecks)
    torch.manual_seed(0)
    backbone = build_backbone(PAPER)
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            randomise(module)
    return backbone.double()


def randomise(norm: torch.nn.BatchNorm2d) -> None:
    with torch.no_grad():
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2)
        norm.weight.normal_(1, 0.3)
        norm.bias.normal_(0, 0.2)


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


def test_counts_of_the_paper() -> None:
    with torch.device("meta"):
        backbone = build_backbone(PAPER)
    parameters = list(backbone.parameters())
    assert sum(p.numel() for p in parameters) == 105_070_912
    # with SEAM's head (20 classes, and background): 105,358,208, of which 104,489,536 learn
    assert sum(p.numel() for p in parameters if p.requires_grad) == 104_489_536 - 287_296
    assert len([p for p in parameters if p.requires_grad]) == 35
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in backbone.modules()) == 37
    assert backbone.channels == (128, 256, 512, 1024, 4096)
    assert backbone.strides == (2, 4, 8, 8, 8)


def test_freezing_the_first_stage_freezes_what_the_authors_freeze(narrow: Backbone) -> None:
    frozen = {name.split(".")[0] for name, p in narrow.named_parameters() if p.ndim == 4 and not p.requires_grad}
    assert frozen == {"conv1a", "b2", "b2_1", "b2_2"}
    assert not any(m.training for m in narrow.train().modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_another_output_stride_is_refused() -> None:
    with pytest.raises(ConfigError, match="output stride of 8, not 16: set --backbone.output_stride 8"):
        build_backbone(BackboneConfig(name="resnet38d"))


@pytest.mark.parametrize("size", [(40, 24), (45, 67)])
def test_maps_are_the_specifications(narrow: Backbone, size: tuple[int, int]) -> None:
    narrow.symmetric_padding()
    x = torch.randn(1, 3, *size, dtype=torch.double)
    with torch.no_grad():
        maps = narrow.eval().features(x)
        expected = list(Specification(narrow.state_dict(), dropout=False).maps(x))
    assert tuple(m.shape[1] for m in maps) == narrow.channels
    assert tuple(-(-size[0] // m.shape[2]) for m in maps) == narrow.strides
    torch.testing.assert_close(maps, expected)


@pytest.mark.parametrize("few_cells", [0, 10**6])
def test_gradients_are_the_specifications_with_the_same_dropout(
    narrow: Backbone, few_cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.models.kept_channels.FEW_CELLS", few_cells)
    narrow.symmetric_padding()
    state = {k: v.detach().clone().requires_grad_(v.ndim == 4) for k, v in narrow.state_dict().items()}
    x = torch.randn(2, 3, 40, 24, dtype=torch.double)
    torch.manual_seed(1)
    maps = narrow.train().features(x)
    torch.manual_seed(1)
    expected = list(Specification(state, dropout=True).maps(x))
    torch.testing.assert_close(maps, expected)
    weights = [torch.rand_like(m) - 0.5 for m in expected[1:]]
    torch.autograd.backward(maps[1:], weights)
    torch.autograd.backward(expected[1:], weights)
    for name, parameter in narrow.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, state[name].grad)


@pytest.mark.parametrize(("symmetric", "centre"), [(False, 8 * 24 + 3), (True, 8 * 24)])
def test_where_a_cell_looks(narrow: Backbone, symmetric: bool, centre: int) -> None:
    """Cell 24 of a stride-8 map covers pixels 192 to 199; the authors' padding centres it on the first of them."""
    if symmetric:
        narrow.symmetric_padding()
    x = torch.randn(1, 3, 384, 16, dtype=torch.double, requires_grad=True)
    narrow.eval().features(x)[2][0, :, 24].sum().backward()
    assert x.grad is not None
    rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows[0]) > 0 and int(rows[-1]) < 383, "the field must end inside the image"
    assert (int(rows[0]) + int(rows[-1])) / 2 == centre


def test_on_a_cpu_the_layout_stays_plain(narrow: Backbone) -> None:
    torch.nn.Sequential(narrow).to(memory_format=torch.channels_last)
    assert all(p.is_contiguous() for p in narrow.parameters())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("drops", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("size", [(16, 20), (8, 6)], ids=["kept", "few cells"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_of_kept_channels_is_the_whole_one_masked(
    drops: tuple[bool, bool], layout: torch.memory_format, size: tuple[int, int], kernel: int
) -> None:
    torch.manual_seed(0)
    padding = kernel // 2 * 2
    conv = torch.nn.Conv2d(12, 10, kernel, padding=padding, dilation=2, bias=False).to(memory_format=layout)
    x = torch.randn(3, 12, *size).to(memory_format=layout)
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
