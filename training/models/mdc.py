"""MDC's network: classifiers of several dilations over one backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.models.backbone import Backbone


class MdcOutput(NamedTuple):
    """logits (B, C), the mean of all classifiers'; cam (B, C, h, w) >= 0; maps (B, N C, h, w), those of each, signed.

    All maps are unnormalised, at the backbone's output stride.
    """

    logits: Tensor
    cam: Tensor
    maps: Tensor


class MdcClassifier(nn.Module):
    """Classifiers side by side, each a 3x3 convolution of a dilation of its own, ReLU, a 1x1 convolution and a mean.

    cam = ReLU(H_1) + mean_i>1 ReLU(H_i): a dilated convolution carries what tells a class to cells `dilation` away,
    right ones and wrong ones. The wrong ones differ from dilation to dilation, and the mean makes little of them.

    Logits are the mean of all: each is taught to tell the classes, and what is asked by gradients (grad_cam) sees all.

    forward: images (B, 3, H, W) RGB 0..255, sides multiples of 16 -> MdcOutput.
    width: channels of each classifier. dilations: in cells, the first is that of H_1.
    Source: Wei et al., "Revisiting Dilated Convolution: A Simple Approach for Weakly- and Semi-Supervised Semantic
        Segmentation", CVPR 2018.
    """

    def __init__(
        self,
        backbone: Backbone,
        n_classes: int,
        dropout: float = 0.5,
        width: int = 256,
        dilations: tuple[int, ...] = (1, 3, 6, 9),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.options = {
            "dropout": dropout,
            "width": width,
            "dilations": dilations,
        }  # what store.py builds it again with
        self.dilations = dilations
        self.dropout = nn.Dropout2d(dropout)
        channels = backbone.channels[-1]
        self.branches = nn.ModuleList(_classifier(channels, width, n_classes, dilation) for dilation in dilations)

    def forward(self, images: Tensor) -> MdcOutput:
        x = self.dropout(self.backbone(images)[-1])
        maps = [branch(x) for branch in self.branches]
        logits = torch.stack([torch.mean(one, dim=(2, 3)) for one in maps]).mean(dim=0)
        return MdcOutput(logits, merged(maps), torch.cat(maps, dim=1))


def merged(maps: Sequence[Tensor]) -> Tensor:
    """ReLU(H_1) + mean_i>1 ReLU(H_i), of any shape; of one map ReLU(H_1)."""
    first, *others = (one.relu() for one in maps)
    return first + torch.stack(others).mean(dim=0) if others else first


def _classifier(channels: int, width: int, n_classes: int, dilation: int) -> nn.Sequential:
    """Without a bias at the end: a map of 0 says nothing for the class and nothing against it."""
    conv = nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation)
    head = nn.Conv2d(width, n_classes, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    nn.init.xavier_uniform_(head.weight)
    return nn.Sequential(conv, nn.ReLU(inplace=True), head)
