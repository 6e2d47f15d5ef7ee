"""CAM methods: one file is one method, found by its name.

A method has `maps(model, images) -> (logits (B, C), cam (B, C, h, w) >= 0)` at the model's output stride. A method
that is forward-only says `EXPORTABLE = True`: its maps can be computed inside an exported graph.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Protocol, cast

from torch import Tensor, nn

from weakseg.errors import ConfigError


class CamMethod(Protocol):
    """What a file of this folder offers."""

    EXPORTABLE: bool

    def maps(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]: ...


def names() -> list[str]:
    return sorted(module.name for module in iter_modules(__path__))


def get(name: str) -> CamMethod:
    """The method of a file in this folder."""
    if name not in names():
        raise ConfigError(f"unknown CAM method {name!r}: expected one of {', '.join(names())}")
    return cast(CamMethod, import_module(f"{__name__}.{name}"))
