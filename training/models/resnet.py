"""ResNet-50 and -101 (He et al., CVPR 2016) with torchvision's state-dict names, dilated to stride 8 or 16."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from training.models.backbone import Backbone, dilations, stage_strides
from training.models.layers import ConvBn, PhasedConv2d, conv_bn, phases
from weakseg.recipe import BackboneConfig

BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


class Bottleneck(nn.Module):
    """1x1 reduce, 3x3 (carries stride and dilation), 1x1 expand to 4x the width."""

    def __init__(self, inputs: int, width: int, stride: int, dilation: int, phase: int, project: bool) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = PhasedConv2d(width, width, 3, stride, dilation, dilation, bias=False, phase=phase)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if project:
            shortcut = PhasedConv2d(inputs, outputs, 1, stride, 0, bias=False, phase=phase)
            self.downsample = ConvBn(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(conv_bn(self.conv1, self.bn1, x))
        out = self.relu(conv_bn(self.conv2, self.bn2, out))
        out = conv_bn(self.conv3, self.bn3, out)
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class MaxPool(nn.Module):
    """3x3 stride-2 max pooling with a phase; zero padding is neutral because its input is ReLU'd."""

    def __init__(self, phase: int) -> None:
        super().__init__()
        self.phase = phase

    def forward(self, x: Tensor) -> Tensor:
        before, after = 1 - self.phase, 1 + self.phase
        return F.max_pool2d(F.pad(x, (before, after, before, after)), 3, 2)


class ResNet(Backbone):
    """Stages: stem (64 channels), layer1..layer4 (256, 512, 1024, 2048)."""

    channels = (64, 256, 512, 1024, 2048)

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config)
        phase = [*phases(config.output_stride), 0, 0, 0]
        strides, dilation = stage_strides(config.output_stride), dilations(config.output_stride)
        self.conv1 = PhasedConv2d(3, 64, 7, 2, 3, bias=False, phase=phase[0])
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = MaxPool(phase[1])
        inputs = 64
        for i, (width, n_blocks) in enumerate(zip((64, 128, 256, 512), BLOCKS[config.name], strict=True)):
            stride = 1 if i == 0 else strides[i + 1]  # layer1 follows the max pool, which has the stride
            blocks = []
            for block in range(n_blocks):
                first = block == 0
                # the first block of a dilated stage still sees the previous stage's spacing (torchvision does the same)
                spread = dilation[i] if first and stride == 1 else dilation[i + 1]
                shift = phase[i + 1] if first and stride == 2 else 0
                blocks.append(Bottleneck(inputs, width, stride if first else 1, spread, shift, project=first))
                inputs = 4 * width
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))

    def stages(self) -> list[nn.Module]:
        stem = ConvBn(self.conv1, self.bn1, self.relu)
        return [stem, nn.Sequential(self.maxpool, self.layer1), self.layer2, self.layer3, self.layer4]
