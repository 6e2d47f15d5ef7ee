"""Training methods: one file is one method, found by its name.

A method has `build(backbone, n_classes, dropout) -> nn.Module` whose forward returns a ClassifierOutput, and
`losses(model, batch, moment) -> dict[str, Tensor]`, named losses whose sum is minimised.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Protocol, cast

from torch import Tensor, nn

from training.data import Batch
from training.loop import Moment
from training.models.backbone import Backbone
from weakseg.errors import ConfigError


class Method(Protocol):
    """What a file of this folder offers."""

    def build(self, backbone: Backbone, n_classes: int, dropout: float) -> nn.Module: ...

    def losses(self, model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]: ...


def names() -> list[str]:
    return sorted(module.name for module in iter_modules(__path__))


def get(name: str) -> Method:
    """The method of a file in this folder."""
    if name not in names():
        raise ConfigError(f"unknown training method {name!r}: expected one of {', '.join(names())}")
    return cast(Method, import_module(f"{__name__}.{name}"))
