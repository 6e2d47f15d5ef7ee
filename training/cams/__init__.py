"""CAM methods: one file is one method, found by its name.

A method has `maps(model, images) -> (logits (B, C), cam (B, C, h, w) >= 0)` at the model's output stride. A method
that is forward-only says `EXPORTABLE = True`: its maps can be computed inside an exported graph. Another says
`EXPORTABLE = False`, and in `WHY_NOT` the reason, which ends a sentence that begins with its name.

One that looks inside the classifier takes the name of a layer besides, `maps(model, images, layer=None)`; maps then
have that layer's stride. One whose maps shrink as their cells become more, as the gradient of a mean does, says
`PER_CELL = True`: views of different sizes are added up after a multiplication by their numbers of cells.
One for the classifiers of a single training method names it, `CLASSIFIER = "seam"`; of any other,
`weakseg compare --methods all` has the maps of the plain classifier.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from inspect import signature
from pkgutil import iter_modules
from types import SimpleNamespace
from typing import Protocol, cast

from torch import Tensor, nn

from weakseg.errors import ConfigError


class CamMethod(Protocol):
    """What a file of this folder offers."""

    EXPORTABLE: bool

    def maps(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]: ...


def names() -> list[str]:
    return sorted(module.name for module in iter_modules(__path__))


def get(name: str, layer: str | None = None) -> CamMethod:
    """The method of a file in this folder, at a layer where one is named.

    Raises:
        ConfigError: no such method, or a layer for one that takes none.
    """
    if name not in names():
        raise ConfigError(f"unknown CAM method {name!r}: expected one of {', '.join(names())}")
    method = import_module(f"{__name__}.{name}")
    if layer is None:
        return cast(CamMethod, method)
    if "layer" not in signature(method.maps).parameters:
        raise ConfigError(f"cam method {name} takes no layer, got cam.layer {layer!r}: leave it out, or take grad_cam")
    return cast(CamMethod, SimpleNamespace(**{**vars(method), "maps": partial(method.maps, layer=layer)}))
