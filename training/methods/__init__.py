"""Training methods: one file is one method, found by its name.

A method has `build(backbone, n_classes, config) -> nn.Module` whose forward returns at least `logits` and `cam`, and
`losses_of(config)`, a function of (model, batch, moment) to named losses whose sum is minimised. Settings of its own
are the section of TrainConfig that has its name. It may have `memory_settings(config)`: those of them, with values,
that make a step smaller.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Protocol, cast

from torch import nn

from training.loop import Losses
from training.models.backbone import Backbone
from weakseg.errors import ConfigError
from weakseg.recipe import TrainConfig


class Method(Protocol):
    """What a file of this folder offers."""

    def build(self, backbone: Backbone, n_classes: int, config: TrainConfig) -> nn.Module: ...

    def losses_of(self, config: TrainConfig) -> Losses: ...


def names() -> list[str]:
    return sorted(module.name for module in iter_modules(__path__))


def get(name: str) -> Method:
    """The method of a file in this folder."""
    if name not in names():
        raise ConfigError(f"unknown training method {name!r}: expected one of {', '.join(names())}")
    return cast(Method, import_module(f"{__name__}.{name}"))
