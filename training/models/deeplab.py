"""Segmentation networks over any backbone: DeepLabV3+, DeepLab-v2 and DeepLab-LargeFOV."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models.backbone import Backbone
from weakseg.errors import ConfigError


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
    """Depthwise-separable ASPP and a decoder at stride 4. Chen et al., ECCV 2018.

    forward: images (B, 3, H, W) RGB 0..255, sides multiples of 16 -> logits (B, C + 1, H/4, W/4).
    """

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


class DeepLabV2(nn.Module):
    """The sum of four 3x3 convolutions with dilations 6, 12, 18, 24 (at stride 8). Chen et al., TPAMI 2018.

    forward: images (B, 3, H, W) RGB 0..255, sides multiples of 16 -> logits (B, C + 1, h, w) at the output stride.
    """

    def __init__(self, backbone: Backbone, n_classes: int) -> None:
        super().__init__()
        self.backbone, self.options = backbone, {}
        rates = [rate * 8 // backbone.config.output_stride for rate in (6, 12, 18, 24)]
        self.branches = nn.ModuleList(
            nn.Conv2d(backbone.channels[-1], n_classes + 1, 3, padding=rate, dilation=rate) for rate in rates
        )
        for branch in self.branches:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)

    def forward(self, images: Tensor) -> Tensor:
        last = self.backbone(images)[-1]
        return torch.stack([branch(last) for branch in self.branches]).sum(dim=0)


class DeepLabLargeFov(nn.Module):
    """One 3x3 convolution with dilation 12 (at stride 8) and two 1x1. SEAM's final network, over ResNet38d.

    forward: images (B, 3, H, W) RGB 0..255, sides multiples of 16 -> logits (B, C + 1, h, w) at the output stride.
    Source: Chen et al., ICLR 2015; YudeWang/semantic-segmentation-codebase, its `deeplabv1`.
    """

    def __init__(self, backbone: Backbone, n_classes: int, width: int = 512, dropout: float = 0.5) -> None:
        super().__init__()
        self.backbone = backbone
        self.options = {"width": width, "dropout": dropout}
        rate = 12 * 8 // backbone.config.output_stride
        self.field = nn.Sequential(
            nn.Conv2d(backbone.channels[-1], width, 3, padding=rate, dilation=rate, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            *pointwise(width, width),
            nn.Dropout(dropout),
        )
        self.head = nn.Conv2d(width, n_classes + 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.field(self.backbone(images)[-1]))
        return logits


NETWORKS: dict[str, type[nn.Module]] = {
    "deeplab_v3plus": DeepLabV3Plus,
    "deeplab_v2": DeepLabV2,
    "deeplab_largefov": DeepLabLargeFov,
}


def build_segmentation(name: str, backbone: Backbone, n_classes: int, width: int) -> nn.Module:
    """A network with new layers of `width` channels; deeplab_v2 has none."""
    if name not in NETWORKS:
        raise ConfigError(f"unknown segmentation network {name!r}: expected one of {', '.join(NETWORKS)}")
    return DeepLabV2(backbone, n_classes) if name == "deeplab_v2" else NETWORKS[name](backbone, n_classes, width)
