"""DeepLabV3+ (Chen et al., ECCV 2018) with depthwise-separable convolutions, over any backbone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models.backbone import Backbone


def separable(inputs: int, outputs: int, dilation: int = 1) -> nn.Sequential:
    """3x3 depthwise, 1x1 pointwise, each with batch norm and ReLU (the paper's §3.2)."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, padding=dilation, dilation=dilation, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(inplace=True),
        *pointwise(inputs, outputs),
    )


def pointwise(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Aspp(nn.Module):
    """1x1, three dilated 3x3 and image pooling side by side, joined by a 1x1."""

    def __init__(self, inputs: int, width: int, rates: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        self.branches = nn.ModuleList([pointwise(inputs, width), *(separable(inputs, width, r) for r in rates)])
        # No batch norm behind the pooled branch: it would see a single value per image and channel.
        self.pooled = nn.Sequential(nn.Conv2d(inputs, width, 1), nn.ReLU(inplace=True))
        self.join = nn.Sequential(*pointwise(width * (len(rates) + 2), width), nn.Dropout2d(dropout))

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooled(torch.mean(x, dim=(2, 3), keepdim=True)).expand(-1, -1, x.shape[2], x.shape[3])
        return self.join(torch.cat([*(branch(x) for branch in self.branches), pooled], dim=1))


class DeepLabV3Plus(nn.Module):
    """forward: images (B, 3, H, W) RGB 0..255, sides multiples of 16 -> logits (B, C + 1, H/4, W/4)."""

    def __init__(self, backbone: Backbone, n_classes: int, width: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.backbone = backbone
        self.options = {"width": width, "dropout": dropout}  # what store.py needs to build it again
        rates = tuple(rate * 16 // backbone.config.output_stride for rate in (6, 12, 18))
        self.aspp = Aspp(backbone.channels[-1], width, rates, dropout)
        self.low_level = pointwise(backbone.channels[1], 48)
        self.decoder = nn.Sequential(separable(width + 48, width), separable(width, width))
        self.head = nn.Conv2d(width, n_classes + 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.backbone(images)
        low = self.low_level(maps[1])
        high = F.interpolate(self.aspp(maps[-1]), size=low.shape[2:], mode="bilinear", align_corners=False)
        logits: Tensor = self.head(self.decoder(torch.cat([high, low], dim=1)))
        return logits
