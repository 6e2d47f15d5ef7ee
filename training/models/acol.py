"""ACoL's network: two classifiers over one backbone, of which the second does not see what the first finds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.models.backbone import Backbone
from training.models.layers import wide

PRESENT = 0.5  # a class is in the image from this tag, or without tags this probability, on
EPS = 1e-5


class AcolOutput(NamedTuple):
    """logits (B, C), the mean of both classifiers'; cam (B, C, h, w) >= 0, of both; first, second (B, C, h, w): theirs.

    Maps are unnormalised, at the backbone's output stride, those of one classifier are signed.
    """

    logits: Tensor
    cam: Tensor
    first: Tensor
    second: Tensor


class AcolClassifier(nn.Module):
    """Two classifiers of three convolutions and a mean; features where the first's map is strong are 0 for the second.

    forward: images (B, 3, H, W) RGB 0..255, sides multiples of 16; tags (B, C), whose classes are erased; None = those
        that the first classifier finds.
    width: channels of the classifiers' layers. erase: of a map in [0, 1], from which on a cell counts as found.
    Source: Zhang et al., "Adversarial Complementary Learning for Weakly Supervised Object Localization", CVPR 2018;
        xiaomengyc/ACoL models/vgg/vgg_v1.py.
    """

    def __init__(
        self, backbone: Backbone, n_classes: int, dropout: float = 0.5, width: int = 256, erase: float = 0.6
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.options = {"dropout": dropout, "width": width, "erase": erase}  # what store.py needs to build it again
        self.erase = erase
        self.dropout = nn.Dropout2d(dropout)
        self.first, self.second = (_classifier(backbone.channels[-1], width, n_classes) for _ in range(2))

    def forward(self, images: Tensor, tags: Tensor | None = None) -> AcolOutput:
        x = self.dropout(self.backbone(images)[-1])
        first = wide(self.first(x))
        present = torch.mean(first, dim=(2, 3)).sigmoid() if tags is None else tags
        found = strongest(first.detach(), present) >= self.erase
        second = wide(self.second(x.masked_fill(found, 0)))
        logits = (torch.mean(first, dim=(2, 3)) + torch.mean(second, dim=(2, 3))) / 2
        return AcolOutput(logits, fused(first, second), first, second)


def strongest(maps: Tensor, present: Tensor) -> Tensor:
    """(B, 1, h, w) in [0, 1]: the largest of an image's present maps, each in [0, 1] by its own extremes.

    Of one class it is ACoL's map; the largest is what this becomes with several.

    Args:
        maps: (B, C, h, w). present: (B, C), classes of at least PRESENT count; without any, and of constant maps: 0.
    """
    low, high = maps.amin(dim=(2, 3), keepdim=True), maps.amax(dim=(2, 3), keepdim=True)
    maps01 = (maps - low) / (high - low).clamp(min=EPS)
    return maps01.masked_fill((present < PRESENT)[:, :, None, None], 0).amax(dim=1, keepdim=True)


def fused(first: Tensor, second: Tensor) -> Tensor:
    """m max(A / a, B / b),   A, B = ReLU(maps), a and b their maxima over the cells, m = (a + b) / 2

    Each in units of its own maximum, as in the paper: the first classifier has the easier task and larger maps, beside
    which what the second alone finds would not show. The paper's maps in [0, 1] by minima and maxima would give each
    view of an image the same weight, and lift the background; m leaves a view in which more is seen the larger map.

    Args:
        first, second: (B, C, h, w), signed.
    """
    both = torch.stack([first, second]).relu()
    peaks = both.amax(dim=(3, 4), keepdim=True)
    return (both / (peaks + EPS)).amax(dim=0) * peaks.mean(dim=0)


def _classifier(channels: int, width: int, n_classes: int) -> nn.Sequential:
    """Without a bias at the end: a map of 0 says nothing for the class and nothing against it."""
    layers = nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, n_classes, 1, bias=False),
    )
    for conv in layers[:-1:2]:
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")  # type: ignore[arg-type]
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    nn.init.xavier_uniform_(layers[-1].weight)  # type: ignore[arg-type]
    return layers
