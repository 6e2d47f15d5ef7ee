"""Training methods: one file is one method, found by its name.

A method has `build(backbone, n_classes, config) -> nn.Module` whose forward returns at least `logits` and `cam`, and
`losses_of(config)`, a function of (model, batch, moment) to named losses whose sum is minimised. Settings of its own
are the section of TrainConfig that has its name. Where it needs them, it has besides:

- `NETWORK`: the class of what `build` gives, where that is not CamClassifier. Its `options` are the keyword arguments
  that make it again.
- `labels_of(recipe, dataset, folder, progress) -> LabelSource`: label maps that it learns from, as `batch.labels`. It
  makes them out of tags and images, under `folder`, and goes on where it was stopped.
- `start(model, folder)`: puts weights into the model that `labels_of` has made on its way.
- `optim_of(config) -> OptimConfig`: what of the budget is left for it after `labels_of`.
- `cycles(config) -> int`: learning rates start anew that many times; `moment.cycle` counts.
- `memory_settings(config)`: those of its settings, with values, that make a step smaller.
- `TRANSFORMERS_ONLY = True`: its backbone is a ViT or DeiT; `weakseg compare` reads that without importing the file.
- `LEAST_IMAGES`: of a step, in each process; an addition has it too.

An addition has `around(losses, config) -> Losses` in place of build and losses_of: it changes what the losses of
another method see, or adds to them. `seam+hide_and_seek` is SEAM on images with hidden patches; alone, it is an
addition to `cam`. `REFUSES` is what it cannot be added to, {name: why, as the end of "... cannot be added to NAME: "}.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from types import SimpleNamespace
from typing import Any, Protocol, cast

from torch import nn

from training import distributed
from training.loop import Losses
from training.models.backbone import Backbone
from weakseg.errors import ConfigError
from weakseg.recipe import TrainConfig

PLAIN = "cam"  # what an addition that stands alone is added to


class Method(Protocol):
    """What a file of this folder offers."""

    def build(self, backbone: Backbone, n_classes: int, config: TrainConfig) -> nn.Module: ...

    def losses_of(self, config: TrainConfig) -> Losses: ...


def names() -> list[str]:
    return sorted(module.name for module in iter_modules(__path__))


def get(name: str) -> Method:
    """The method of a file in this folder, or one with additions: names joined by "+", in any order.

    Additions that come first see the images first.

    Raises:
        ConfigError: an unknown name, one that comes twice, two methods, or an addition that refuses the method.
    """
    modules = {part: _module(part) for part in name.split("+")}
    additions = {part: module for part, module in modules.items() if hasattr(module, "around")}
    methods = [part for part in modules if part not in additions]
    if len(methods) > 1:
        raise ConfigError(
            f"{' and '.join(methods)} are methods of their own, of which a training has one: choose one, and any "
            f"additions ({', '.join(part for part in names() if hasattr(_module(part), 'around'))})"
        )
    if len(modules) < name.count("+") + 1:
        raise ConfigError(f"expected each name once in train.method, got {name!r}")
    base = methods[0] if methods else PLAIN
    for part, module in additions.items():
        if base in getattr(module, "REFUSES", {}):
            raise ConfigError(f"{part} cannot be added to {base}: {module.REFUSES[base]}")
    return _with(_module(base), list(additions.values()))


def base_of(name: str) -> str:
    """The name without additions."""
    return next((part for part in name.split("+") if not hasattr(_module(part), "around")), PLAIN)


def check_batch(config: TrainConfig, n_images: int) -> None:
    """Raises ConfigError when steps over so many training images have fewer than a part of the method needs."""
    size, processes = config.optim.batch_size, distributed.size()
    for part in config.method.split("+"):
        least = getattr(_module(part), "LEAST_IMAGES", 1)
        if min(size, n_images) // processes >= least:
            continue
        raise ConfigError(
            f"{part}: expected batches of at least {least} images for each of {processes} processes, got "
            + (
                f"{n_images} training images: add some, start fewer processes"
                if n_images < min(size, least * processes)
                else f"train.optim.batch_size {size}: raise it (where memory is short, lower train.optim.crop_px)"
            )
            + f", or train without {part}"
        )


def _module(name: str) -> Any:
    if name not in names():
        raise ConfigError(f"unknown training method {name!r}: expected one of {', '.join(names())}")
    return import_module(f"{__name__}.{name}")


def _with(method: Any, additions: list[Any]) -> Method:
    if not additions:
        return cast(Method, method)

    def losses_of(config: TrainConfig) -> Losses:
        losses = method.losses_of(config)
        for addition in reversed(additions):
            losses = addition.around(losses, config)
        return cast(Losses, losses)

    return cast(Method, SimpleNamespace(**{**vars(method), "losses_of": losses_of}))
