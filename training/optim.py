"""Optimiser and schedule: four parameter groups, polynomial decay."""

from __future__ import annotations

import torch
from torch import nn

from training.models.backbone import Backbone
from weakseg.errors import ConfigError
from weakseg.recipe import OptimConfig


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, object]]:
    """Backbone weights x1, backbone biases x2 without decay, new weights x s, new biases x 2s without decay.

    s = config.new_lr_scale; a module may have an `lr_scale` of its own. "Biases" are all one-dimensional parameters,
    batch norm's included. Only parameters that take a gradient are listed; empty groups are left out.
    Source: the Caffe DeepLab recipes, as in SEAM's `get_parameter_groups`.
    """
    scale_of = {id(p): config.new_lr_scale for p in model.parameters()}
    for module in model.modules():
        scale = 1.0 if isinstance(module, Backbone) else getattr(module, "lr_scale", None)
        if scale is not None:
            scale_of |= {id(p): scale for p in module.parameters()}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((scale_of[id(parameter)], parameter.ndim <= 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr_scale": scale * (2.0 if bias else 1.0),
            "weight_decay": 0.0 if bias else config.weight_decay,
        }
        for (scale, bias), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    groups = parameter_groups(model, config)
    if not groups:
        raise ConfigError("no parameter takes a gradient: lower backbone.freeze_stages")
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


def poly_factor(step: int, total: int, power: float, warmup: int = 0) -> float:
    """(1 - step/total)^power after a linear warm-up; 1 at step 0 without one, 0 at `total`."""
    factor = (1 - step / total) ** power
    return factor * min(1.0, (step + 1) / (warmup + 1))


def set_learning_rate(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, total: int) -> float:
    """Set every group's rate for this step; returns the base rate."""
    base = config.lr * poly_factor(step, total, config.poly_power, config.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = base * group["lr_scale"]
    return base
