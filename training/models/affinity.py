"""AffinityNet: how likely neighbouring cells belong to the same class. Ahn & Kwak, CVPR 2018."""

from __future__ import annotations

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
    height, width = features.shape[2:]
    reach = radius - 1
    inside = F.pad(torch.ones_like(features[:1, :1]), (reach, reach, 0, reach))
    around = F.pad(features, (reach, reach, 0, reach))
    found = []
    for dy, dx in pair_offsets(radius).tolist():
        part = (slice(None), slice(None), slice(dy, dy + height), slice(reach + dx, reach + dx + width))
        found.append(torch.exp(-(features - around[part]).abs().mean(dim=1, keepdim=True)) * inside[part])
    return torch.cat(found, dim=1)
