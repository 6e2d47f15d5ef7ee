"""The CAM classifier: backbone, 1x1 convolution, global average pooling."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.models.backbone import Backbone


class ClassifierOutput(NamedTuple):
    """logits (B, C); cam (B, C, h, w), signed and unnormalised, at the backbone's output stride."""

    logits: Tensor
    cam: Tensor


class CamClassifier(nn.Module):
    """logit_c = mean over pixels of w_c . x: pooling and the 1x1 convolution commute, so the maps come for free.

    forward: images (B, 3, H, W) RGB 0..255, sides multiples of 16 -> ClassifierOutput.
    Source: Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016.
    """

    def __init__(self, backbone: Backbone, n_classes: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.backbone = backbone
        self.options = {"dropout": dropout}  # what store.py needs to build it again
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(backbone.channels[-1], n_classes, 1, bias=False)
        nn.init.xavier_uniform_(self.head.weight)

    def forward(self, images: Tensor) -> ClassifierOutput:
        cam = self.head(self.dropout(self.backbone(images)[-1]))
        return ClassifierOutput(logits=torch.mean(cam, dim=(2, 3)), cam=cam)
