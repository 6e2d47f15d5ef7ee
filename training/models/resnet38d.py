"""Wide ResNet-38 "A1" (Wu, Shen and van den Hengel, 2016) at output stride 8, with SEAM's and psa's state-dict names.

Source of the layer table: YudeWang/SEAM and jiwoon-ahn/psa, `network/resnet38d.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from training.models.backbone import Backbone
from training.models.kept_channels import channel_noise, conv_of_kept, scale
from training.models.layers import PhasedConv2d, bn_relu, phases
from weakseg.errors import ConfigError
from weakseg.recipe import BackboneConfig

# name, blocks, channels of input, middle and output, stride, dilation of the first convolution and of all others
ROWS = (
    ("b2", 3, 64, 128, 128, 2, 1, 1),
    ("b3", 3, 128, 256, 256, 2, 1, 1),
    ("b4", 6, 256, 512, 512, 2, 1, 1),
    ("b5", 3, 512, 512, 1024, 1, 1, 2),
)
BOTTLENECKS = (("b6", 1024, 2048, 0.3), ("b7", 2048, 4096, 0.5))  # name, channels of input and output, dropout


class Block(nn.Module):
    """u = ReLU(BN(x)); conv3x3(ReLU(BN(conv3x3(u)))) + x, or + conv1x1(u) where shapes differ. forward: x -> sum, u."""

    def __init__(
        self, inputs: int, middle: int, outputs: int, stride: int, first_dilation: int, dilation: int, phase: int
    ) -> None:
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = PhasedConv2d(
            inputs, middle, 3, stride, first_dilation, first_dilation, bias=False, phase=phase
        )
        self.bn_branch2b1 = nn.BatchNorm2d(middle)
        self.conv_branch2b1 = nn.Conv2d(middle, outputs, 3, padding=dilation, dilation=dilation, bias=False)
        self.conv_branch1 = None
        if inputs != outputs or stride != 1:
            self.conv_branch1 = PhasedConv2d(inputs, outputs, 1, stride, 0, bias=False, phase=phase)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = bn_relu(self.bn_branch2a, x)
        branch = self.conv_branch2b1(bn_relu(self.bn_branch2b1, self.conv_branch2a(u)))
        return branch.add_(x if self.conv_branch1 is None else self.conv_branch1(u)), u


class Bottleneck(nn.Module):
    """u = ReLU(BN(x)); 1x1, dilated 3x3, 1x1, channel dropout before the last two; + conv1x1(u). forward as Block."""

    def __init__(self, inputs: int, outputs: int, dilation: int, dropout: float) -> None:
        super().__init__()
        narrow, middle = outputs // 4, outputs // 2
        self.dropout = dropout
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = nn.Conv2d(inputs, narrow, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(narrow)
        self.conv_branch2b1 = nn.Conv2d(narrow, middle, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn_branch2b2 = nn.BatchNorm2d(middle)
        self.conv_branch2b2 = nn.Conv2d(middle, outputs, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = bn_relu(self.bn_branch2a, x)
        drop = self.dropout if self.training else 0.0
        noise1 = channel_noise(x, self.conv_branch2a.out_channels, drop)
        noise2 = channel_noise(x, self.conv_branch2b1.out_channels, drop)
        h = scale(bn_relu(self.bn_branch2b1, conv_of_kept(self.conv_branch2a, u, None, noise1)), noise1)
        h = scale(bn_relu(self.bn_branch2b2, conv_of_kept(self.conv_branch2b1, h, noise1, noise2)), noise2)
        return conv_of_kept(self.conv_branch2b2, h, noise2, None).add_(
            conv_of_kept(self.conv_branch1, u, None, None)
        ), u


class ResNet38d(Backbone):
    """105,070,912 parameters. Maps: ReLU(BN(x)) as it enters b3, b4, b5, b6 (the authors' conv2 to conv5), and conv6.

    Stages: conv1a with b2, b3, b4, b5, b6 with b7 and bn7; `freeze_stages=1` freezes what SEAM freezes.
    """

    def __init__(self, config: BackboneConfig) -> None:
        if config.output_stride != 8:
            raise ConfigError(
                f"resnet38d has an output stride of 8, not {config.output_stride}: set --backbone.output_stride 8"
            )
        super().__init__(config)
        phase = iter(phases(config.output_stride))
        self.conv1a = nn.Conv2d(3, ROWS[0][2], 3, padding=1, bias=False)
        self.blocks: list[list[str]] = []  # names, by stage
        for name, n_blocks, inputs, middle, outputs, stride, first_dilation, dilation in ROWS:
            names = [name, *(f"{name}_{k}" for k in range(1, n_blocks))]
            first = Block(inputs, middle, outputs, stride, first_dilation, dilation, next(phase) if stride == 2 else 0)
            others = [Block(outputs, middle, outputs, 1, dilation, dilation, 0) for _ in names[1:]]
            for block_name, block in zip(names, [first, *others], strict=True):
                self.add_module(block_name, block)
            self.blocks.append(names)
        for name, inputs, outputs, dropout in BOTTLENECKS:
            self.add_module(name, Bottleneck(inputs, outputs, 4, dropout))
        self.blocks.append([name for name, *_ in BOTTLENECKS])
        self.channels = (*(row[4] for row in ROWS), BOTTLENECKS[-1][2])
        self.bn7 = nn.BatchNorm2d(self.channels[-1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ResNet38d:
        """On a CPU weights stay in torch's plain layout, `.to(memory_format=torch.channels_last)` or not.

        The weight gradients of wide dilated 3x3 convolutions take 1.5 times as long in channels_last (oneDNN 3.12).
        """
        super()._apply(fn, recurse)
        for parameter in self.parameters():
            if parameter.device.type == "cpu":
                parameter.data = parameter.data.contiguous()
        return self

    def stages(self) -> list[nn.Module]:
        groups = [[getattr(self, name) for name in names] for names in self.blocks]
        groups[0].insert(0, self.conv1a)
        groups[-1].append(self.bn7)
        return [nn.ModuleList(group) for group in groups]

    def features(self, x: Tensor) -> list[Tensor]:
        if x.device.type == "cpu":
            x = x.contiguous()  # as the weights
        x = self.conv1a(x)
        maps = []
        for stage, names in enumerate(self.blocks):
            for k, name in enumerate(names):
                x, u = getattr(self, name)(x)
                if k == 0 and stage > 0:  # what enters a stage is the map of the one before
                    maps.append(u)
        return [*maps, bn_relu(self.bn7, x)]
