"""One step of the loop: losses, backward pass and, at every `accumulate`-th batch, the optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training import distributed
from training.data import Batch
from training.precision import Precision
from weakseg.errors import ConfigError, TrainingError
from weakseg.recipe import OptimConfig


@dataclass(frozen=True)
class Moment:
    """Where the training stands; losses may depend on it (ramps). done is in [0, 1), cycle the method's (cycles)."""

    step: int
    epoch: int
    done: float
    cycle: int = 0


Losses = Callable[[nn.Module, Batch, Moment], dict[str, Tensor]]


@dataclass
class Step:
    """Called with a batch and a moment; returns the losses as floats, means over all processes.

    Raises:
        TrainingError: a loss or the gradient is not finite; names the batch of the process that saw it.
    """

    model: nn.Module
    losses: Losses
    optimizer: torch.optim.Optimizer
    precision: Precision
    config: OptimConfig

    def __post_init__(self) -> None:
        self.parameters: list[nn.Parameter] = [p for group in self.optimizer.param_groups for p in group["params"]]

    def __call__(self, batch: Batch, moment: Moment) -> dict[str, float]:
        values = self.backward(batch, moment)
        if (moment.step + 1) % self.config.accumulate == 0:
            self.update()
        return distributed.mean(values)

    def backward(self, batch: Batch, moment: Moment) -> dict[str, float]:
        """Add this batch's share to the gradients; returns the losses as floats, of this process alone."""
        parts = self.differentiate(batch, moment)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        *figures, gradient = torch.stack([*parts.values(), norm]).tolist()  # the one wait for the device
        values = dict(zip(parts, figures, strict=True))
        if not math.isfinite(values["loss"]):
            raise _not_finite("loss", values, batch, moment)
        if not math.isfinite(gradient) and not self.precision.forgives_overflow():
            raise _not_finite("gradient", values, batch, moment)
        return values

    def differentiate(self, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """Forward and backward pass; returns the sum of the losses and each of them by name."""
        with self.precision.autocast():
            parts = self.losses(self.model, batch, moment)
            loss = torch.stack(list(parts.values())).sum()
        self.precision.scaler.scale(loss / self.config.accumulate).backward()
        return {"loss": loss.detach()} | {f"loss/{name}": part.detach() for name, part in parts.items()}

    def update(self) -> None:
        distributed.average_gradients(self.parameters)
        scaler = self.precision.scaler
        if self.config.clip_norm is not None:
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


def compiled(model: nn.Module) -> nn.Module:
    """The model with a compiled forward pass, for inputs of one size; `model` itself, weights and keys, stays as it is.

    Raises:
        ConfigError: nothing can be compiled here.
    """
    device = next(model.parameters()).device
    try:
        torch.compile(torch.sin, dynamic=False)(torch.ones(2, device=device))
    except Exception as error:  # a compiler that is missing or broken shows in many unrelated types
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"optim.compile needs a compiler that works for {device.type} ({reason}): install a C++ compiler (for CUDA "
            "also Triton), or leave optim.compile off"
        ) from error
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]


def _not_finite(what: str, values: dict[str, float], batch: Batch, moment: Moment) -> TrainingError:
    named = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    return TrainingError(
        f"{what} is not finite at step {moment.step} ({named}); images: {', '.join(batch.ids)}. "
        "The last checkpoint is kept: lower the learning rate or look at these images"
    )
