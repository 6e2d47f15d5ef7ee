"""A small residual network that learns from scratch in minutes on a CPU: the demo's and the tests' backbone."""

from __future__ import annotations

from torch import Tensor, nn

from training.models.backbone import Backbone, dilations, stage_strides
from training.models.layers import ConvBn, PhasedConv2d, conv_bn, phases
from weakseg.recipe import BackboneConfig

N_BLOCKS = (1, 1, 2, 2, 1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., CVPR 2016); the first carries stride and dilation."""

    def __init__(self, inputs: int, outputs: int, stride: int, dilation: int, phase: int) -> None:
        super().__init__()
        self.conv1 = PhasedConv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False, phase=phase)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            shortcut = PhasedConv2d(inputs, outputs, 1, stride, 0, bias=False, phase=phase)
            self.downsample = ConvBn(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = conv_bn(self.conv2, self.bn2, self.relu(conv_bn(self.conv1, self.bn1, x)))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class SmallResNet(Backbone):
    """Five stages with 16, 32, 64, 128 and 256 channels, 2 million parameters."""

    channels = (16, 32, 64, 128, 256)

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config)
        phase = [*phases(config.output_stride), 0, 0, 0]
        strides, dilation = stage_strides(config.output_stride), dilations(config.output_stride)
        stem = PhasedConv2d(3, 16, 3, 2, 1, bias=False, phase=phase[0])
        self.stage1 = ConvBn(stem, nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        inputs = 16
        for i in range(1, 5):
            width = self.channels[i]
            blocks = [
                BasicBlock(
                    inputs if block == 0 else width,
                    width,
                    strides[i] if block == 0 else 1,
                    dilation[i],
                    phase[i] if block == 0 and strides[i] == 2 else 0,
                )
                for block in range(N_BLOCKS[i])
            ]
            setattr(self, f"stage{i + 1}", nn.Sequential(*blocks))
            inputs = width

    def stages(self) -> list[nn.Module]:
        return [self.stage1, self.stage2, self.stage3, self.stage4, self.stage5]
