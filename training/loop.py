"""The one training loop. A method brings a model and a function from batch to named losses; the loop does the rest.

Exact resume: data order and augmentation are functions of (seed, epoch, sample), torch's generator of (seed, step), so
a run killed at any moment continues from its last checkpoint to the same weights as an undisturbed one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training import distributed
from training.checkpoint import Checkpoint
from training.data import Batches, TrainingImages, batches_of, loader
from training.memory import check_memory
from training.metrics_log import MetricsLog
from training.optim import build_optimizer, set_learning_rate
from training.precision import Precision
from training.randomness import seed_torch
from training.step import Losses, Moment, Step, compiled
from weakseg.errors import ConfigError
from weakseg.progress import Progress
from weakseg.stages import effective

Pictures = Callable[[nn.Module], dict[str, Tensor]]  # name -> (3, H, W) in [0, 1], shown in TensorBoard every epoch


def fit(
    model: nn.Module,
    losses: Losses,
    images: TrainingImages,
    folder: Path,
    *,
    progress: Progress,
    pictures: Pictures | None = None,
    lower: Mapping[str, object] | None = None,
    cycles: int = 1,
) -> dict[str, Any]:
    """Train `model` in place; the sum of the named losses is minimised.

    Writes checkpoint.pt, metrics.jsonl and tensorboard/ under `folder`; continues from the checkpoint if there is one.
    Of several processes (training/distributed.py) the first alone writes. `lower`: settings of the method, with their
    values, that make a step smaller; named where memory is short. cycles: equal parts of the training, in each of which
    learning rates run from the first to the last.

    Returns: summary with n_images (seen in all), steps, final losses.
    Raises:
        TrainingError: a loss or the gradient is not finite; names the batch. The last good checkpoint stays.
        ConfigError: settings that cannot be trained with here.
    """
    config, seed, rank = images.config, images.seed, distributed.rank()
    device = next(model.parameters()).device
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    distributed.prepare(model, progress)
    step = Step(model, losses, build_optimizer(model, config), Precision(config.precision, device), config)
    batches = Batches(len(images), config, seed, process=rank, n_processes=distributed.size())
    total = len(batches)
    state = Checkpoint(
        folder,
        {"model": model, "optimizer": step.optimizer, "scaler": step.precision.scaler},
        fingerprint={"optim": effective(config), "seed": seed, "n": len(images)}
        | ({"cycles": cycles} if cycles > 1 else {}),
    )
    start = batches.start = state.load()
    model.train()
    if start == 0 < total:
        last = Moment(total - 1, config.epochs - 1, 1 - 1 / total, cycles - 1)
        check_memory(step, images, batches.share, last, progress, lower or {})
    if config.compile:
        step.model = compiled(model)
    log = MetricsLog(folder, start) if rank == 0 else None
    saved_at = time.monotonic()
    with progress.task(
        "train", total=total * config.batch_size, unit="images", initial=start * config.batch_size
    ) as bar:
        for n, batch in enumerate(batches_of(loader(images, batches)), start):
            seed_torch(seed, n, rank)
            cycle, first, end = part_of(n, total, cycles)
            lr = set_learning_rate(step.optimizer, config, n - first, end - first)
            moment = Moment(n, n // batches.per_epoch, n / total, cycle)
            values = step(batch.to(device), moment)
            if log is None:
                continue
            n_images = len(batch.ids) * distributed.size()
            bar.update(n_images, loss=values["loss"])
            log.add(n, moment.epoch, values, lr, n_images)
            epoch_ends = (n + 1) % batches.per_epoch == 0
            if epoch_ends and pictures is not None:
                log.pictures(pictures(model), n)
            if time.monotonic() - saved_at >= config.checkpoint_every_s and (n + 1) % config.accumulate == 0:
                state.save(n + 1)
                saved_at = time.monotonic()
    model.eval()
    if log is None:
        return {}
    log.close()
    state.save(total)
    return {"n_images": (total - start) * config.batch_size, "steps": total, **log.last}


def part_of(n: int, total: int, parts: int) -> tuple[int, int, int]:
    """Which of `parts` parts of `total` steps, all but equal, has step n, and that part's first step and its end.

    Raises:
        ConfigError: fewer steps than parts.
    """
    if total < parts:
        raise ConfigError(f"expected at least {parts} steps for as many cycles, got {total}: raise optim.epochs")
    part = ((n + 1) * parts - 1) // total
    return part, part * total // parts, (part + 1) * total // parts
