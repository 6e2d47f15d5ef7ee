"""VGG16 as DeepLab-LargeFOV and psa have it: stride 8, fc6 and fc7 as convolutions (Chen et al., ICLR 2015)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from training.models.backbone import Backbone
from training.models.layers import phases
from training.models.resnet import MaxPool
from weakseg.errors import ConfigError
from weakseg.recipe import BackboneConfig

ROWS = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))  # convolutions and channels of each stage
WIDTH = 1024  # of fc6 and fc7, of the 4096 that the classifier has


class Vgg16(Backbone):
    """Stages of 64, 128, 256, 512 and, with fc6 and fc7, 1024 channels; 20,483,904 parameters, no batch norm.

    `body` is torchvision's `features`, number for number. Pools are 3x3; the last two keep the size, so that conv5 is
    dilated, and a mean of 3x3 follows (pool5a), as in DeepLab. psa's PyTorch code makes pool5 and pool5a and goes past
    both in its forward pass.

    fc6_dilation: 1 for CAM; DeepLab-LargeFOV's own is 12.
    Source: jiwoon-ahn/psa network/vgg16d.py, and vgg16_20M.prototxt for what follows conv5.
    """

    channels = (64, 128, 256, 512, WIDTH)

    def __init__(self, config: BackboneConfig, fc6_dilation: int = 1) -> None:
        if config.output_stride != 8:
            raise ConfigError(
                f"vgg16 has an output stride of 8, not {config.output_stride}: set --backbone.output_stride 8"
            )
        super().__init__(config)
        phase, layers, inputs, ends = phases(config.output_stride), [], 3, [0]
        for stage, (n, width) in enumerate(ROWS):
            dilation = 2 if stage == 4 else 1
            for _ in range(n):
                layers += [nn.Conv2d(inputs, width, 3, padding=dilation, dilation=dilation), nn.ReLU(inplace=True)]
                inputs = width
            layers.append(MaxPool(phase[stage]) if stage < len(phase) else nn.MaxPool2d(3, 1, 1))
            ends.append(len(layers))
        self.body = nn.Sequential(*layers)
        self.pool5a = nn.AvgPool2d(3, 1, 1)
        self.fc6 = nn.Conv2d(inputs, WIDTH, 3, padding=fc6_dilation, dilation=fc6_dilation)
        self.drop6 = nn.Dropout2d(0.5)
        self.fc7 = nn.Conv2d(WIDTH, WIDTH, 1)
        self._cuts = list(pairwise(ends))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def stages(self) -> list[nn.Module]:
        *stages, last = [self.body[a:b] for a, b in self._cuts]
        fully_connected = (self.fc6, nn.ReLU(inplace=True), self.drop6, self.fc7, nn.ReLU(inplace=True))
        return [*stages, nn.Sequential(last, self.pool5a, *fully_connected)]


def vgg16_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's state from torchvision's or caffe's (conv1_1 … fc7); any other as it is.

    torchvision: every fourth of 4096 channels, and every third row and column of fc6's 7 x 7, the way to a large field
    of view of Chen et al. caffe: networks see BGR; here the first convolution's channels are turned round instead.
    """
    if "classifier.0.weight" in state:
        fc6, fc7 = state["classifier.0.weight"].unflatten(1, (512, 7, 7)), state["classifier.3.weight"]
        return {
            **{key: value for key, value in state.items() if not key.startswith("classifier.")},
            "fc6.weight": fc6[::4, :, ::3, ::3],
            "fc6.bias": state["classifier.0.bias"][::4],
            "fc7.weight": fc7[::4, ::4, None, None],
            "fc7.bias": state["classifier.3.bias"][::4],
        }
    if "conv1_1.weight" not in state:
        return state
    ours, at = {}, 0
    for stage, (n, _) in enumerate(ROWS, 1):
        for k in range(1, n + 1):
            ours[f"conv{stage}_{k}"] = f"body.{at}"
            at += 2
        at += 1
    renamed = {}
    for key, value in state.items():
        layer, _, kind = key.partition(".")
        renamed[f"{ours.get(layer, layer)}.{kind}"] = value.flip(1) if key == "conv1_1.weight" else value
    return {key: value for key, value in renamed.items() if not key.startswith("fc8.")}
