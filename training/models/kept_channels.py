"""Convolutions next to channel dropout that compute only what it keeps: the same result for less work.

Dropout2d zeroes whole channels of an image: of a convolution between two of them at p = 0.5, a quarter of the weights
counts. On a CPU each image therefore convolves its kept channels alone; a GPU is quicker with all of them. Maps of few
cells are a plain matrix product, of which oneDNN's weight gradient takes two to four times as long.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_CELLS = 128  # of a map; up to here copying the kept weights costs more than it saves. SEAM's second view has 64


def channel_noise(x: Tensor, channels: int, p: float) -> Tensor | None:
    """(B, channels, 1, 1) of 0 and 1 / (1 - p): what Dropout2d would multiply with, from the same random stream."""
    return None if p == 0 else F.dropout2d(x.new_ones(x.shape[0], channels, 1, 1), p)


def scale(x: Tensor, noise: Tensor | None) -> Tensor:
    return x if noise is None else x * noise


def conv_of_kept(conv: nn.Conv2d, x: Tensor, noise_in: Tensor | None, noise_out: Tensor | None) -> Tensor:
    """conv(x) in the channels that `noise_out` keeps, anything finite in others; x is 0 where `noise_in` drops.

    conv: stride 1, one group, no bias. Noise None: every channel is kept.
    """
    plain_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
    if plain_cpu and x.shape[2] * x.shape[3] <= FEW_CELLS:
        return _Product.apply(x, conv.weight, conv.kernel_size, conv.dilation, conv.padding)  # type: ignore[no-any-return, no-untyped-call]
    if not plain_cpu or (noise_in is None and noise_out is None):
        # In the layout of x: a 1x1 weight is in both, and torch then answers in channels_last, for which the large 3x3
        # weight behind it would be converted, forwards and backwards.
        return conv(x).contiguous(memory_format=_layout(x))  # type: ignore[no-any-return]
    padding, dilation = list(conv.padding), list(conv.dilation)
    inputs = _kept(noise_in, x.shape[0], conv.in_channels)
    outputs = _kept(noise_out, x.shape[0], conv.out_channels)
    return _ConvOfKept.apply(x, conv.weight, padding, dilation, inputs, outputs)  # type: ignore[no-any-return, no-untyped-call]


def _kept(noise: Tensor | None, batch: int, channels: int) -> list[Tensor]:
    """Indices of the kept channels, per image."""
    return [torch.arange(channels)] * batch if noise is None else [n.flatten().nonzero()[:, 0] for n in noise]


class _Product(torch.autograd.Function):
    """The whole batch's columns at once: weights (O, I k k) times (I k k, B h w)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *shape: tuple[int, int]) -> Tensor:
        columns = F.unfold(x, *shape).transpose(0, 1).flatten(1)
        ctx.save_for_backward(columns, weight)
        ctx.size, ctx.shape = x.shape, shape
        product = (weight.flatten(1) @ columns).unflatten(1, (x.shape[0], *x.shape[2:]))
        return product.transpose(0, 1).clone(memory_format=_layout(x))  # never a view: it may be added to in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        columns, weight = ctx.saved_tensors
        grad = grad.transpose(0, 1).flatten(1)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            parts = (weight.flatten(1).t() @ grad).unflatten(1, (ctx.size[0], -1)).transpose(0, 1)
            grad_x = F.fold(parts, ctx.size[2:], *ctx.shape)
        if ctx.needs_input_grad[1]:
            # Not a view: autograd then adds the other branch's gradient in place.
            grad_weight = torch.empty(weight.shape, dtype=weight.dtype)
            torch.mm(grad, columns.t(), out=grad_weight.flatten(1))
        return grad_x, grad_weight, None, None, None


class _ConvOfKept(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        padding: list[int],
        dilation: list[int],
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> Tensor:
        shape = (x.shape[0], weight.shape[0], *x.shape[2:])
        out = x.new_zeros(shape).contiguous(memory_format=_layout(x))
        kept = [x[n : n + 1, i] for n, i in enumerate(inputs)]
        for n, (i, o) in enumerate(zip(inputs, outputs, strict=True)):
            out[n, o] = F.conv2d(kept[n], weight[o[:, None], i], None, 1, padding, dilation)[0]
        ctx.save_for_backward(weight, *kept)
        ctx.padding, ctx.dilation, ctx.inputs, ctx.outputs = padding, dilation, inputs, outputs
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        shape = (grad.shape[0], weight.shape[1], *grad.shape[2:])
        grad_x = grad.new_zeros(shape).contiguous(memory_format=_layout(grad)) if needs_x else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        for n, (i, o) in enumerate(zip(ctx.inputs, ctx.outputs, strict=True)):
            part, weight_part, _ = torch.ops.aten.convolution_backward(
                grad[n : n + 1, o],
                kept[n],
                weight[o[:, None], i],
                None,
                [1, 1],
                ctx.padding,
                ctx.dilation,
                False,
                [0, 0],
                1,
                [needs_x, needs_weight, False],
            )
            if grad_x is not None:
                grad_x[n, i] = part[0]
            if grad_weight is not None:
                grad_weight.index_put_((o[:, None], i), weight_part, accumulate=True)
        return grad_x, grad_weight, None, None, None, None


def _layout(x: Tensor) -> torch.memory_format:
    dense = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if dense else torch.contiguous_format
