"""ReCAM's network: two linear heads over one backbone, whose weights together make the maps."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models.backbone import Backbone


class RecamOutput(NamedTuple):
    """logits (B, C) of the first head; cam (B, C, h, w); first, second (B, C, h, w): each head at every cell.

    All maps are signed and unnormalised, at the backbone's output stride.
    """

    logits: Tensor
    cam: Tensor
    first: Tensor
    second: Tensor


class RecamClassifier(nn.Module):
    """A CAM classifier, and beside its head a second one that is to tell the classes of an image apart.

    forward: images (B, 3, H, W) RGB 0..255, sides multiples of 16 -> RecamOutput.
    maps: what cam is made by. "product": the heads' weights multiplied, sum_k v_ck w_ck X_k. "second": v, the second's.
    Source: Chen et al., "Class Re-Activation Maps for Weakly-Supervised Semantic Segmentation", CVPR 2022;
        zhaozhengChen/ReCAM net/resnet50_cam.py.
    """

    def __init__(
        self,
        backbone: Backbone,
        n_classes: int,
        dropout: float = 0.5,
        maps: Literal["product", "second"] = "product",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.options = {"dropout": dropout, "maps": maps}  # what store.py needs to build it again
        self.maps = maps
        self.dropout = nn.Dropout2d(dropout)
        self.head, self.second = (nn.Conv2d(backbone.channels[-1], n_classes, 1, bias=False) for _ in range(2))
        for head in (self.head, self.second):
            nn.init.xavier_uniform_(head.weight)

    def forward(self, images: Tensor) -> RecamOutput:
        x = self.dropout(self.backbone(images)[-1])
        first, second = self.head(x), self.second(x)
        cam = F.conv2d(x, self.head.weight * self.second.weight) if self.maps == "product" else second
        return RecamOutput(torch.mean(first, dim=(2, 3)), cam, first, second)
