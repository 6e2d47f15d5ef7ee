"""The one training loop. A method brings a model and a function from batch to named losses; the loop does the rest.

Exact resume: data order and augmentation are functions of (seed, epoch, sample), torch's generator of (seed, step), so
a run killed at any moment continues from its last checkpoint to the same weights as an undisturbed one.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from training.data import Batch, Batches, TrainingImages, batches_of, loader
from training.optim import build_optimizer, set_learning_rate
from training.randomness import seed_torch
from weakseg.errors import TrainingError
from weakseg.files import write_bytes_atomic
from weakseg.progress import Progress
from weakseg.stages import WITHOUT_EFFECT

LOG_EVERY = 10  # steps


@dataclass(frozen=True)
class Moment:
    """Where the training stands; losses may depend on it (ramps). done is in [0, 1)."""

    step: int
    epoch: int
    done: float


Losses = Callable[[nn.Module, Batch, Moment], dict[str, Tensor]]
Pictures = Callable[[nn.Module], dict[str, Tensor]]  # name -> (3, H, W) in [0, 1], shown in TensorBoard every epoch


def fit(
    model: nn.Module,
    losses: Losses,
    images: TrainingImages,
    folder: Path,
    *,
    progress: Progress,
    pictures: Pictures | None = None,
) -> dict[str, Any]:
    """Train `model` in place; the sum of the named losses is minimised.

    Writes checkpoint.pt, metrics.jsonl and tensorboard/ under `folder`; continues from the checkpoint if there is one.
    Returns: summary with n_images (seen in all), steps, final losses.
    Raises:
        TrainingError: a loss is not finite; names the batch. The last good checkpoint stays.
    """
    config, seed = images.config, images.seed
    device = next(model.parameters()).device
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(model, config)
    batches = Batches(len(images), config, seed)
    total = len(batches)
    settings = {key: value for key, value in asdict(config).items() if key not in WITHOUT_EFFECT}
    state = _Checkpoint(folder, fingerprint={"optim": settings, "seed": seed, "n": len(images)})
    start = batches.start = state.load(model, optimizer)
    log = _Log(folder, start)
    saved_at = time.monotonic()
    model.train()
    with progress.task(
        "train", total=total * config.batch_size, unit="images", initial=start * config.batch_size
    ) as bar:
        for step, batch in enumerate(batches_of(loader(images, batches)), start):
            seed_torch(seed, step)
            lr = set_learning_rate(optimizer, config, step, total)
            moment = Moment(step, step // batches.per_epoch, step / total)
            values = _step(model, losses, _to(batch, device), moment, optimizer, config.accumulate)
            bar.update(len(batch.ids), loss=values["loss"])
            log.add(moment, values, lr, len(batch.ids))
            epoch_ends = (step + 1) % batches.per_epoch == 0
            if epoch_ends and pictures is not None:
                log.pictures(pictures(model), step)
            if time.monotonic() - saved_at >= config.checkpoint_every_s and (step + 1) % config.accumulate == 0:
                state.save(model, optimizer, step + 1)
                saved_at = time.monotonic()
    log.close()
    state.save(model, optimizer, total)
    model.eval()
    return {"n_images": (total - start) * config.batch_size, "steps": total, **log.last}


def _step(
    model: nn.Module, losses: Losses, batch: Batch, moment: Moment, optimizer: torch.optim.Optimizer, accumulate: int
) -> dict[str, float]:
    """Forward, backward, and an optimiser step at every `accumulate`-th batch. Returns the losses as floats."""
    parts = losses(model, batch, moment)
    loss = torch.stack(list(parts.values())).sum()
    values = {"loss": loss.item()} | {f"loss/{name}": value.item() for name, value in parts.items()}
    if not math.isfinite(values["loss"]):
        named = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        raise TrainingError(
            f"loss is not finite at step {moment.step} ({named}); images: {', '.join(batch.ids)}. "
            "The last checkpoint is kept: lower the learning rate or look at these images"
        )
    (loss / accumulate).backward()
    if (moment.step + 1) % accumulate == 0:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return values


def _to(batch: Batch, device: torch.device) -> Batch:
    labels = None if batch.labels is None else batch.labels.to(device, non_blocking=True)
    return Batch(
        batch.images.to(device, non_blocking=True), batch.tags.to(device, non_blocking=True), labels, batch.ids
    )


class _Checkpoint:
    """Model, optimiser and step in one file, tied to the settings that it was made with."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.path = folder / "checkpoint.pt"
        self.fingerprint = json.dumps(fingerprint, sort_keys=True)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        buffer = io.BytesIO()
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(content | {"fingerprint": self.fingerprint}, buffer)
        write_bytes_atomic(self.path, buffer.getvalue())

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """The step to go on from: 0 without a checkpoint, or when it belongs to other settings."""
        if not self.path.is_file():
            return 0
        content = torch.load(self.path, map_location="cpu", weights_only=True)
        if content["fingerprint"] != self.fingerprint:
            return 0
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        return int(content["step"])


class _Log:
    """metrics.jsonl and TensorBoard, means over LOG_EVERY steps; lines past the resumed step are dropped."""

    def __init__(self, folder: Path, start: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._truncate(start)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)
        self.pending: list[dict[str, float]] = []
        self.n_images, self.since = 0, time.monotonic()
        self.last: dict[str, float] = {}

    def _truncate(self, start: int) -> None:
        lines = self.path.read_text().splitlines() if self.path.is_file() and start > 0 else []
        kept = [line for line in lines if json.loads(line)["step"] < start]
        write_bytes_atomic(self.path, "".join(line + "\n" for line in kept).encode())

    def add(self, moment: Moment, values: dict[str, float], lr: float, n_images: int) -> None:
        self.pending.append(values)
        self.n_images += n_images
        if (moment.step + 1) % LOG_EVERY:
            return
        self.last = {key: sum(v[key] for v in self.pending) / len(self.pending) for key in values}
        seconds = time.monotonic() - self.since
        row = {"step": moment.step, "epoch": moment.epoch, "seconds": seconds, "images_per_s": self.n_images / seconds}
        with self.path.open("a") as file:
            file.write(json.dumps(row | {"lr": lr} | self.last) + "\n")
        for key, value in (self.last | {"lr": lr, "images_per_s": row["images_per_s"]}).items():
            self.board.add_scalar(key, value, moment.step)
        self.pending, self.n_images, self.since = [], 0, time.monotonic()

    def pictures(self, pictures: dict[str, Tensor], step: int) -> None:
        for name, picture in pictures.items():
            self.board.add_image(name, picture, step)

    def close(self) -> None:
        self.board.close()
