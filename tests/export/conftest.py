"""Networks of a few layers: what goes wrong in an export goes wrong in those."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from export.onnx_from_torch import onnx_from_graphs
from training.cams import cam as cam_method
from training.graphs import ClassifierGraph, SegmentationGraph
from training.models.classifier import ClassifierOutput

SCALES = (0.5, 1.0, 1.5)


@pytest.fixture(scope="session")
def image(colours, png):
    """A file's bytes."""
    return png(colours)


class Stem(nn.Module):
    """Stride 16 by four convolutions; maps at strides 4 and 16."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([123.0, 116.0, 103.0]).view(1, 3, 1, 1), persistent=False)
        self.act = nn.ReLU6(inplace=True)
        self.down = nn.ModuleList([nn.Conv2d(i, 8, 3, 2, 1, bias=False) for i in (3, 8, 8, 8)])
        self.bn = nn.ModuleList([nn.BatchNorm2d(8) for _ in self.down])
        for bn in self.bn:
            bn.running_mean.normal_(std=0.1)
            bn.running_var.uniform_(0.5, 2)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = (images - self.mean) / 58
        maps = []
        for conv, bn in zip(self.down, self.bn, strict=True):
            x = self.act(bn(conv(x)))
            maps.append(x)
        return maps[1], maps[3]


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Stem()
        self.head = nn.Conv2d(8, 3, 1, bias=False)

    def forward(self, images: torch.Tensor) -> ClassifierOutput:
        cam = self.head(self.backbone(images)[1])
        return ClassifierOutput(cam.mean(dim=(2, 3)), cam)


class Segmenter(nn.Module):
    """As DeepLab: image pooling, upsampling to the low-level maps, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Stem()
        self.pooled = nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(24, 4, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        low, high = self.backbone(images)
        pooled = self.pooled(high.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, high.shape[2], high.shape[3])
        high = F.interpolate(torch.cat([high, pooled], 1), size=low.shape[2:], mode="bilinear", align_corners=False)
        return self.head(torch.cat([high, low], dim=1))


def make_graphs(seed: int = 0) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    classifier = Classifier()
    return {
        "classifier": ClassifierGraph(classifier, cam_method).eval(),
        "classifier_multiscale": ClassifierGraph(classifier, cam_method, SCALES, flip=True).eval(),
        "segmentation": SegmentationGraph(Segmenter()).eval(),
    }


@pytest.fixture(scope="session")
def toy_graphs() -> Callable[[int], dict[str, nn.Module]]:
    """{graph name: module} of new networks by seed."""
    return make_graphs


@pytest.fixture(scope="session")
def exported_toys(toy_graphs) -> dict[str, bytes]:
    """The graphs of seed 0 as ONNX; exporting is slow, so it is done once."""
    return onnx_from_graphs(toy_graphs(), {"weakseg.model": "toy/1"})
