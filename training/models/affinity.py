"""AffinityNet: how likely neighbouring cells belong to the same class. Ahn & Kwak, CVPR 2018."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models.backbone import Backbone
from weakseg.random_walk import pair_offsets

CHANNELS = (64, 128, 256)  # of the projections of the last three maps


class AffinityNet(nn.Module):
    """The last three maps of a backbone, projected and joined: what cells are compared by.

    forward: images (B, 3, H, W) RGB 0..255, sides multiples of 16 -> features (B, 448, h, w) at the output stride.
    Source: jiwoon-ahn/psa network/resnet38_aff.py; over other backbones its taps are the last three stages.
    """

    def __init__(self, backbone: Backbone, radius: int = 5) -> None:
        super().__init__()
        self.backbone, self.radius, self.stride = backbone, radius, backbone.strides[-1]
        self.options = {"radius": radius}  # what store.py builds it from
        taps = backbone.channels[-len(CHANNELS) :]
        self.projections = nn.ModuleList(
            nn.Conv2d(tap, n, 1, bias=False) for tap, n in zip(taps, CHANNELS, strict=True)
        )
        self.joined = nn.Conv2d(sum(CHANNELS), sum(CHANNELS), 1, bias=False)
        for projection in self.projections:
            nn.init.kaiming_normal_(projection.weight)
        nn.init.xavier_uniform_(self.joined.weight, gain=4)

    def forward(self, images: Tensor) -> Tensor:
        taps = self.backbone(images)[-len(CHANNELS) :]
        size = taps[-1].shape[2:]
        parts = [F.elu(projection(tap)) for projection, tap in zip(self.projections, taps, strict=True)]
        parts = [
            part if part.shape[2:] == size else F.interpolate(part, size, mode="bilinear", align_corners=False)
            for part in parts
        ]
        return F.elu(self.joined(torch.cat(parts, dim=1)))

    def affinities(self, features: Tensor, radius: int) -> Tensor:
        """(B, S, h, w) of the function `affinities`."""
        return affinities(features, radius)


def affinities(features: Tensor, radius: int) -> Tensor:
    """W_ij = exp(-mean_d |f_i - f_j|) of every cell with the S neighbours of `pair_offsets(radius)`.

    Args:
        features: (B, D, h, w).
    Returns:
        (B, S, h, w) in (0, 1]; 0 where the neighbour lies outside the map.
    Source: Ahn & Kwak 2018, equation 1.
    """
    offsets = [(int(dy), int(dx)) for dy, dx in pair_offsets(radius)]
    if features.requires_grad and not torch.compiler.is_compiling():
        distances: Tensor = _PairDistances.apply(features, offsets)  # type: ignore[no-untyped-call]
    else:
        around = _padded(features, radius - 1)
        parts = (around[_moved(features.shape, offset, radius - 1)] for offset in offsets)
        distances = torch.cat([(features - part).abs().mean(dim=1, keepdim=True) for part in parts], dim=1)
    inside = _padded(torch.ones_like(features[:1, :1]), radius - 1)
    there = [inside[_moved(features.shape, offset, radius - 1)] for offset in offsets]
    return torch.exp(-distances) * torch.cat(there, dim=1)


class _PairDistances(torch.autograd.Function):
    """mean_d |f_i - f_j| of every cell with its S neighbours (zero outside the map).

    Nothing of size (S, D, h, w) is kept or made: differences are made again on the way back, in one buffer. On a CPU an
    image at a time, whose features fit into the cache.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, offsets: list[tuple[int, int]]) -> Tensor:
        ctx.save_for_backward(features)
        ctx.offsets = offsets
        reach = max(dx for _, dx in offsets)
        distances = features.new_empty(features.shape[0], len(offsets), *features.shape[2:])
        for some, out in zip(_at_once(features), _at_once(distances), strict=True):
            around, buffer = _padded(some, reach), torch.empty_like(some)
            for s, offset in enumerate(offsets):
                torch.sub(some, around[_moved(some.shape, offset, reach)], out=buffer)
                torch.mean(buffer.abs_(), dim=1, out=out[:, s])
        return distances

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (features,) = ctx.saved_tensors
        reach = max(dx for _, dx in ctx.offsets)
        grad_features = torch.empty_like(features)
        grad = grad / features.shape[1]
        for some, part, out in zip(_at_once(features), _at_once(grad), _at_once(grad_features), strict=True):
            around, buffer = _padded(some, reach), torch.empty_like(some)
            grad_around = torch.zeros_like(around)
            grad_here = grad_around[_moved(some.shape, (0, 0), reach)]
            for s, offset in enumerate(ctx.offsets):
                where = _moved(some.shape, offset, reach)
                torch.sub(some, around[where], out=buffer)
                buffer.sign_().mul_(part[:, s : s + 1])
                grad_here += buffer
                grad_around[where] -= buffer
            out.copy_(grad_here)
        return grad_features, None


def _at_once(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(1) if x.device.type == "cpu" else (x,)


def _padded(x: Tensor, reach: int) -> Tensor:
    return F.pad(x, (reach, reach, 0, reach))


def _moved(shape: torch.Size, offset: tuple[int, int], reach: int) -> tuple[slice, ...]:
    """Where in a padded map the neighbours of all cells lie."""
    (height, width), (dy, dx) = shape[2:], offset
    return slice(None), slice(None), slice(dy, dy + height), slice(reach + dx, reach + dx + width)
