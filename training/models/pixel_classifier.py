"""A network that scores every cell, background included, for methods that learn from labelled cells."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models.backbone import Backbone
from training.models.layers import wide


class PixelOutput(NamedTuple):
    """logits (B, C); cam (B, C, h, w) in [0, 1], probabilities of the classes; scores (B, C + 1, h, w)."""

    logits: Tensor
    cam: Tensor
    scores: Tensor


class PixelClassifier(nn.Module):
    """Scores of C + 1 classes at every cell by a 1x1 convolution; channel 0 is background.

    forward: images (B, 3, H, W) RGB 0..255, sides multiples of 16 -> PixelOutput.
    pooling: what an image's logit is. "mean": the mean of the class's scores. "max": that of its largest probability,
        log p - log (1 - p): a class is there where some cell is sure of it.
    """

    def __init__(
        self, backbone: Backbone, n_classes: int, dropout: float = 0.5, pooling: Literal["mean", "max"] = "max"
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.options = {"dropout": dropout, "pooling": pooling}  # what store.py needs to build it again
        self.pooling = pooling
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(backbone.channels[-1], n_classes + 1, 1)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> PixelOutput:
        scores = wide(self.head(self.dropout(self.backbone(images)[-1])))
        cam = scores.softmax(dim=1)[:, 1:]
        if self.pooling == "mean":
            return PixelOutput(torch.mean(scores[:, 1:], dim=(2, 3)), cam, scores)
        largest = cam.amax(dim=(2, 3)).clamp(1e-6, 1 - 1e-6)
        return PixelOutput(largest.log() - (1 - largest).log(), cam, scores)


def at_cells(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """The label at each cell's centre: (B, H, W) int64, size (h, w) -> (B, h, w) int64."""
    return F.interpolate(labels[:, None].float(), size=size, mode="nearest-exact")[:, 0].long()
