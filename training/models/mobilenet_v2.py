"""MobileNetV2 1.0 (Sandler et al., CVPR 2018) with torchvision's state-dict names, dilated to stride 8 or 16."""

from __future__ import annotations

from torch import Tensor, nn

from training.models.backbone import Backbone, dilations, stage_strides
from training.models.layers import ConvBn, PhasedConv2d, conv_bn, phases
from weakseg.recipe import BackboneConfig

# expansion, channels, blocks, the stage (0..4) the row belongs to
ROWS = ((1, 16, 1, 0), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 3), (6, 96, 3, 3), (6, 160, 3, 4), (6, 320, 1, 4))
STAGE_ENDS = (2, 4, 7, 14, 19)  # indices into `features`


def conv_bn_relu6(
    inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1, phase: int = 0
) -> ConvBn:
    conv = PhasedConv2d(
        inputs, outputs, kernel, stride, (kernel - 1) // 2 * dilation, dilation, groups, bias=False, phase=phase
    )
    return ConvBn(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1; the input is added when shapes agree."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, dilation: int, phase: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [conv_bn_relu6(inputs, hidden, 1)] if expansion != 1 else []
        depthwise = conv_bn_relu6(hidden, hidden, 3, stride, dilation, groups=hidden, phase=phase)
        project = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.conv = nn.Sequential(*expand, depthwise, project, nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        *hidden, project, norm = self.conv
        out = x
        for layer in hidden:
            out = layer(out)
        out = conv_bn(project, norm, out)  # type: ignore[arg-type]
        return x + out if self.residual else out


class MobileNetV2(Backbone):
    """Stages end with 16, 24, 32, 96 and 1280 channels. `RENAME` maps torchvision's names."""

    channels = (16, 24, 32, 96, 1280)

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config)
        strides, dilation = stage_strides(config.output_stride), dilations(config.output_stride)
        phase = iter(phases(config.output_stride))
        layers: list[nn.Module] = [conv_bn_relu6(3, 32, 3, strides[0], phase=next(phase))]
        inputs, done = 32, {0}
        for expansion, outputs, blocks, stage in ROWS:
            for _ in range(blocks):
                first = stage not in done  # the block that opens a stage carries its stride
                stride = strides[stage] if first else 1
                # that block still sees features of the previous stage's spacing, so it keeps the previous dilation
                spread = dilation[stage - 1] if first and stride == 1 else dilation[stage]
                layers.append(
                    InvertedResidual(inputs, outputs, expansion, stride, spread, next(phase) if stride == 2 else 0)
                )
                inputs = outputs
                done.add(stage)
        layers.append(conv_bn_relu6(inputs, 1280, 1))
        self.body = nn.Sequential(*layers)
        self._cuts = list(zip((0, *STAGE_ENDS[:-1]), STAGE_ENDS, strict=True))

    def stages(self) -> list[nn.Module]:
        return [self.body[a:b] for a, b in self._cuts]
