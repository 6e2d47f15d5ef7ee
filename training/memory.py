"""Will a training step fit into memory? Measured on one and two images before the start, so that the answer comes in a
second and not, as a killed process, in an hour.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.data import TrainingImages, collate
from training.step import Moment, Step
from weakseg.errors import ConfigError
from weakseg.memory import available_bytes
from weakseg.progress import Progress
from weakseg.recipe import OptimConfig

STATES = {"sgd": 1, "adamw": 2}  # tensors that the optimiser keeps of each parameter

# What tensors do not account for: gaps in the heap, scratch space of convolutions. A process grows by 1.0 (MobileNetV2)
# to 1.4 times (ResNet-50) the bytes of its tensors.
OVERHEAD = 1.15


def check_memory(
    step: Step, images: TrainingImages, n: int, moment: Moment, progress: Progress, lower: Mapping[str, object]
) -> None:
    """Say what a step over `n` images takes of what is free.

    lower: settings of the method, with their values, that make a step smaller.
    Raises:
        ConfigError: it is more; says which settings to lower.
    """
    device = next(step.model.parameters()).device
    free = free_bytes(device)
    try:
        need = StepMemory(step, images, moment, n_measured=min(n, 2))
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"not even a batch of one fits into {_gib(free)}: {_lower(step.config, lower)}") from error
    taken = need(n, step.config.accumulate)
    if free is not None and taken > free:
        advice = _advice(need, n, free, step.config, _lower(step.config, lower))
        raise ConfigError(f"a training step needs about {_gib(taken)} and {_gib(free)} are free: {advice}")
    progress.say(f"memory: a step takes about {_gib(taken)} of {_gib(free)} free")


def free_bytes(device: torch.device) -> int | None:
    """What this process may still allocate on a device; its share of the RAM where torchrun has started several."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    available = available_bytes()
    return None if available is None else available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class StepMemory:
    """Bytes that a step over n images allocates at its peak, beside the weights.

    The live bytes after operation t of forward and backward pass are linear in n: a_t + b_t n. Two measurements give
    all a_t and b_t, and the peak is max_t (a_t + b_t n). The peaks alone would not do: with few images the gradients of
    the weights decide, with many the activations.
    """

    def __init__(self, step: Step, images: TrainingImages, moment: Moment, n_measured: int = 2) -> None:
        first = live_bytes(step, images, 1, moment)
        second = live_bytes(step, images, n_measured, moment)
        if len(first) != len(second):  # operations depend on the images: their peaks are all that can be compared
            first, second = first.max(keepdims=True), second.max(keepdims=True)
        self.first, self.slope = first, second - first
        self.weights = sum(p.nbytes for p in step.parameters)
        self.states = STATES[step.config.optimizer] * self.weights

    def __call__(self, n: int, accumulate: int) -> int:
        passes = int(OVERHEAD * np.max(self.first + self.slope * (n - 1)))
        if accumulate > 1:
            passes += self.weights  # the gradients of earlier batches
        update = 2 * self.weights  # gradients and what is computed from them
        return self.states + max(passes, update)


def live_bytes(step: Step, images: TrainingImages, n: int, moment: Moment) -> NDArray[np.int64]:
    """Bytes in tensors that are made by forward and backward pass over n images, after each operation.

    Leaves no trace: gradients are dropped, buffers (statistics of batch norm) put back.
    """
    model = step.model
    device = next(model.parameters()).device
    batch = collate([images[0, i % len(images)] for i in range(n)]).to(device)
    buffers = [buffer.clone() for buffer in model.buffers()]
    known = [*model.parameters(), *model.buffers(), *(t for t in batch if isinstance(t, Tensor))]
    try:
        with LiveBytes(device, known) as live:
            step.differentiate(batch, moment)
    finally:
        step.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    return np.array(live.after, dtype=np.int64)


class LiveBytes(TorchDispatchMode):
    """While entered, counts the bytes of tensors made on a device and not yet freed; `after`: by operation.

    known: tensors that are there already.
    """

    def __init__(self, device: torch.device, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.device, self.now = device, 0
        self.after: list[int] = []
        self.storages: dict[int, object] = {t.untyped_storage()._cdata: None for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device == self.device:
                self._add(tensor.untyped_storage())
        self.after.append(self.now)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages:
            return

        def freed(_: object) -> None:
            del self.storages[key]
            self.now -= size

        self.storages[key] = weakref.ref(storage, freed)
        self.now += size


def _advice(need: StepMemory, n: int, free: int, config: OptimConfig, otherwise: str) -> str:
    """The largest equal parts of the batch that fit, accumulated; else what to lower."""
    for parts in range(2, n + 1):
        batch_size, accumulate = config.batch_size // parts, config.accumulate * parts
        if n % parts == 0 and need(n // parts, accumulate) <= free:
            return (
                f"set optim.batch_size {batch_size} and optim.accumulate {accumulate}, which trains nearly the same "
                f"and takes {_gib(need(n // parts, accumulate))}, or {otherwise}"
            )
    return f"{otherwise} or take a smaller network"


def _lower(config: OptimConfig, others: Mapping[str, object]) -> str:
    named = {"optim.crop_px": config.crop_px, **others}
    return "lower " + " or ".join(f"{name} (now {value})" for name, value in named.items())


def _gib(n_bytes: int | None) -> str:
    if n_bytes is None:
        return "an unknown amount"
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 / 10 else f"{math.ceil(n_bytes / 2**20)} MiB"
