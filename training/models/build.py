"""Backbones by name."""

from __future__ import annotations

from training.models.backbone import Backbone
from training.models.mobilenet_v2 import MobileNetV2
from training.models.resnet import ResNet
from training.models.resnet38d import ResNet38d
from training.models.small_resnet import SmallResNet
from training.models.weights import load_backbone_weights
from weakseg.errors import ConfigError
from weakseg.recipe import BackboneConfig

BACKBONES: dict[str, type[Backbone]] = {
    "mobilenet_v2": MobileNetV2,
    "resnet50": ResNet,
    "resnet101": ResNet,
    "resnet38d": ResNet38d,
    "small_resnet": SmallResNet,
}


def build_backbone(config: BackboneConfig, *, pretrained: bool = True) -> Backbone:
    """The backbone of a config, with its weights when `pretrained` and the config names some."""
    if config.name not in BACKBONES:
        raise ConfigError(f"unknown backbone {config.name!r}: expected one of {', '.join(BACKBONES)}")
    if not 0 <= config.freeze_stages <= 5:
        raise ConfigError(f"backbone.freeze_stages must be 0 to 5, got {config.freeze_stages}")
    backbone = BACKBONES[config.name](config)
    if pretrained and config.weights is not None:
        load_backbone_weights(backbone, config)
    backbone.freeze_parts()
    return backbone
