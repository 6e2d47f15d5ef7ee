"""What every backbone offers: normalised input, five stages, frozen parts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from training.models.layers import freeze, keep_bn_in_eval
from weakseg.recipe import BackboneConfig

MEAN_STD = {  # on RGB / 255
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "caffe": ((122.675 / 255, 116.669 / 255, 104.008 / 255), (1 / 255, 1 / 255, 1 / 255)),  # in order of RGB here, too
}


class Backbone(nn.Module):
    """Five stages with strides 2, 4, 8, 16, 32 (the last ones held at `output_stride` by dilation).

    forward: (B, 3, H, W) RGB in 0..255, any dtype, sides multiples of 16 -> five feature maps, one per stage.
    Attributes: channels and strides of the five maps; mean_colour, the uint8 RGB that becomes zero.
    """

    channels: tuple[int, ...]
    architecture: dict[str, Any] | None = None  # of an hf: backbone, what the config's name stands for

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        mean, std = MEAN_STD[config.input_scale]
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)
        self.strides = tuple(min(s, config.output_stride) for s in (2, 4, 8, 16, 32))

    @property
    def mean_colour(self) -> tuple[int, int, int]:
        red, green, blue = (round(float(value)) for value in self.mean.flatten())
        return red, green, blue

    def stages(self) -> list[nn.Module]:
        """The five stages in order; applied one after another."""
        raise NotImplementedError

    def symmetric_padding(self) -> None:
        """Strided layers sample as in PyTorch's own padding; maps then lie up to half a stride towards the top left."""
        for module in self.modules():
            if hasattr(module, "phase"):
                module.phase = 0

    def freeze_parts(self) -> None:
        """Take gradients away from the first stages and from batch norm, as the config says; called once."""
        for stage in self.stages()[: self.config.freeze_stages]:
            freeze(stage)
        if self.config.freeze_bn:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    freeze(module)

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        if self.config.freeze_bn:
            keep_bn_in_eval(self)
        return self

    def normalise(self, images: Tensor) -> Tensor:
        return (images.to(self.mean.dtype) - self.mean) / self.std

    def features(self, x: Tensor) -> list[Tensor]:
        """The five maps from a normalised input."""
        maps = []
        for stage in self.stages():
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.features(self.normalise(images))


def dilations(output_stride: int) -> list[int]:
    """Dilation of each of the five stages at an output stride of 8 or 16: strides lost are paid in dilation."""
    return [max(1, s // output_stride) for s in (2, 4, 8, 16, 32)]


def stage_strides(output_stride: int) -> list[int]:
    """Stride of each of the five stages: 2 until the output stride is reached, then 1."""
    totals = [1] + [min(s, output_stride) for s in (2, 4, 8, 16, 32)]
    return [after // before for before, after in pairwise(totals)]
