"""Layers that every backbone shares: strided convolutions with a chosen phase, frozen parts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CANVAS = 16  # the sides of what a network sees are multiples of this, at output stride 8 too


def wide(x: Tensor) -> Tensor:
    """At least float32: what autocast has narrowed is widened, float64 (the judge of exports) stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class PhasedConv2d(nn.Conv2d):
    """A convolution whose strided sampling starts `phase` pixels later (0 or 1).

    With stride 2, output i is centred at input 2i + phase: phase 0 is PyTorch's symmetric padding, phase 1 is
    TensorFlow's "SAME" on even sizes (padding only at the bottom and right). Summed over a network the phases decide by
    how much maps are shifted against the image; see `phases`.
    """

    def __init__(self, *args: int, phase: int = 0, **kwargs: int | bool) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.phase = phase

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.phase == 0:
            return super()._conv_forward(x, weight, bias)
        pad = self.padding[0]
        assert isinstance(pad, int)
        before, after = pad - self.phase, pad + self.phase
        x = F.pad(x, (before, after, before, after))  # `before` is -1 for a 1x1 convolution: the first row goes
        return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)


class ConvBn(nn.Sequential):
    """A convolution without bias, its batch norm, and what follows them."""

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, *others = self
        x = conv_bn(conv, norm, x)  # type: ignore[arg-type]
        for layer in others:
            x = layer(x)
        return x


def conv_bn(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """norm(conv(x)).

    Batch norm that goes by its stored statistics scales and shifts channels, which the convolution can do as well:
    nothing is passed over or kept a second time, forwards or backwards.
    """
    if norm.training or torch.compiler.is_exporting():  # runtimes fold constants by themselves
        return norm(conv(x))  # type: ignore[no-any-return]
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return conv._conv_forward(x, conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale)


def phases(output_stride: int) -> list[int]:
    """Phase of each stride-2 layer, first to last, that puts cell i at pixel s*i + (s - 1)/2, half a pixel off at most.

    Layer k shifts by phase * 2^k pixels. All layers but the last at phase 1 give 2^(n-1) - 1 = s/2 - 1. Any choice of
    phases is the same function of a translated image (borders aside), so trained weights stay right.
    """
    n = output_stride.bit_length() - 1
    return [1] * (n - 1) + [0]


def freeze(module: nn.Module) -> None:
    """No gradient for any parameter of the module."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)


def keep_bn_in_eval(module: nn.Module) -> None:
    """Batch norm of the module uses its stored statistics, also in training mode."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.eval()


def bn_relu(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """ReLU(norm(x)). Behind frozen batch norm the backward pass needs the result alone, so x is not kept for it."""
    frozen = not norm.training and not norm.weight.requires_grad
    if frozen and x.requires_grad and torch.is_grad_enabled():
        return _FrozenBnRelu.apply(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)  # type: ignore[no-any-return, no-untyped-call]
    return F.relu(norm(x), inplace=True)


class _FrozenBnRelu(torch.autograd.Function):
    """y = ReLU(s x + t), s = weight / sqrt(var + eps); dx = s dy where y > 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y = F.batch_norm(x, mean, var, weight, bias, eps=eps).relu_()
        ctx.save_for_backward(y, weight * torch.rsqrt(var + eps))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, s = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
        return grad.mul_(s[:, None, None]), None, None, None, None, None
