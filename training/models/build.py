"""Backbones by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.models.backbone import Backbone
from training.models.mobilenet_v2 import MobileNetV2
from training.models.resnet import ResNet
from training.models.resnet38d import ResNet38d
from training.models.small_resnet import SmallResNet
from training.models.vgg16 import Vgg16
from training.models.weights import load_backbone_weights
from weakseg.errors import ConfigError
from weakseg.recipe import HF_PREFIX, BackboneConfig

BACKBONES: dict[str, type[Backbone]] = {
    "mobilenet_v2": MobileNetV2,
    "resnet50": ResNet,
    "resnet101": ResNet,
    "resnet38d": ResNet38d,
    "vgg16": Vgg16,
    "small_resnet": SmallResNet,
}


def build_backbone(
    config: BackboneConfig, *, pretrained: bool = True, architecture: Mapping[str, Any] | None = None
) -> Backbone:
    """The backbone of a config, with its weights when `pretrained` and the config names some.

    architecture: of an hf: backbone that was stored, so that neither its folder nor the network is asked.
    """
    if not 0 <= config.freeze_stages <= 5:
        raise ConfigError(f"backbone.freeze_stages must be 0 to 5, got {config.freeze_stages}")
    if config.name.startswith(HF_PREFIX):
        from training.models.hf import HfBackbone

        backbone: Backbone = HfBackbone(config, pretrained, architecture)
    else:
        backbone = BACKBONES[config.name](config)
        if pretrained and config.weights is not None:
            load_backbone_weights(backbone, config)
    backbone.freeze_parts()
    return backbone
