"""One step: precision, clipping, and what stops it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from training.data import Batch, TrainingImages
from training.loop import Moment, fit
from training.losses import multilabel_soft_margin
from training.optim import build_optimizer, set_learning_rate
from training.precision import MIN_SCALE, Precision
from training.step import Step
from weakseg.datasets import read
from weakseg.errors import ConfigError, TrainingError
from weakseg.progress import Progress
from weakseg.recipe import OptimConfig, Recipe

SILENT = Progress("silent")
CPU = torch.device("cpu")


class Linear(nn.Module):
    """Mean colour to logits; remembers in which precision it computed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Conv2d(3, 3, 1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(images.float() / 255)).mean((2, 3))
        self.dtype = logits.dtype
        return logits


def losses(model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
    return {"classification": multilabel_soft_margin(model(batch.images), batch.tags)}


def broken_at(*steps: int) -> object:
    """Losses whose value is fine but whose gradient is not, at some steps."""

    def inner(model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        loss = losses(model, batch, moment)["classification"]
        root = (loss * 0).sqrt() if moment.step in steps else loss * 0  # the slope of a square root at 0 is infinite
        return {"classification": loss, "root": root}

    return inner


def images_of(recipe: Recipe, **changes: object) -> TrainingImages:
    config = replace(recipe.train.optim, **({"epochs": 4} | changes))  # type: ignore[arg-type]
    return TrainingImages(read(recipe.data, "train"), config, (124, 116, 104), recipe.seed)


def batch_of(n: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Batch(images, torch.eye(3)[torch.arange(n) % 3], None, [f"{i:03d}" for i in range(n)])


def step_of(model: nn.Module, losses: object, **config: object) -> Step:
    settings = OptimConfig(**({"lr": 0.5, "momentum": 0.0, "weight_decay": 0.0} | config))  # type: ignore[arg-type]
    optimizer = build_optimizer(model, settings)
    set_learning_rate(optimizer, settings, 0, 100)
    return Step(model, losses, optimizer, Precision(settings.precision, CPU), settings)  # type: ignore[arg-type]


def test_bf16_computes_in_bf16_and_keeps_weights_in_float32(recipe: Recipe, tmp_path: Path) -> None:
    models, last = {}, {}
    for precision in ("float32", "bf16"):
        models[precision] = Linear()
        models[precision].dropout.p = 0
        images = images_of(recipe, epochs=10, lr=0.3, precision=precision)
        last[precision] = fit(models[precision], losses, images, tmp_path / precision, progress=SILENT)["loss"]
    assert models["float32"].dtype == torch.float32 and models["bf16"].dtype == torch.bfloat16
    assert {p.dtype for p in models["bf16"].parameters()} == {torch.float32}
    assert last["bf16"] == pytest.approx(last["float32"], rel=0.01) and last["bf16"] != last["float32"]


def test_bf16_resumes_to_the_same_weights(recipe: Recipe, tmp_path: Path) -> None:
    images = images_of(recipe, checkpoint_every_s=0.0, precision="bf16")

    def killing(model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        if moment.step == 3:
            raise KeyboardInterrupt
        return losses(model, batch, moment)

    whole, resumed = Linear(), Linear()
    fit(whole, losses, images, tmp_path / "whole", progress=SILENT)
    with pytest.raises(KeyboardInterrupt):
        fit(Linear(), killing, images, tmp_path / "resumed", progress=SILENT)
    fit(resumed, losses, images, tmp_path / "resumed", progress=SILENT)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_precisions_that_cannot_be(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fp16 needs a CUDA device, this runs on cpu"):
        fit(Linear(), losses, images_of(recipe, precision="fp16"), tmp_path, progress=SILENT)
    with pytest.raises(ConfigError, match="expected one of float32, bf16, fp16, got 'half'"):
        Precision("half", CPU)


@pytest.mark.parametrize("bad", [4, 5])
def test_a_gradient_that_is_not_finite_names_its_batch_also_when_accumulated(
    recipe: Recipe, tmp_path: Path, bad: int
) -> None:
    """Step 4 or 5 of an accumulation over two: the message has the images of that one, not of its neighbour."""
    images = images_of(recipe, accumulate=2, batch_size=2, checkpoint_every_s=0.0)
    seen: dict[int, list[str]] = {}

    def breaking(model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        seen[moment.step] = batch.ids
        return broken_at(bad)(model, batch, moment)  # type: ignore[operator]

    with pytest.raises(TrainingError, match=rf"gradient is not finite at step {bad} \(loss 0\.") as error:
        fit(Linear(), breaking, images, tmp_path, progress=SILENT)
    assert f"images: {', '.join(seen[bad])}. The last checkpoint is kept" in str(error.value)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4


def test_clipping_scales_the_gradient_down_to_the_norm() -> None:
    """Plain SGD moves weights by lr times the clipped gradient, whose norm is clip_norm; a small one stays as it is."""
    moved = {}
    for clip_norm in (None, 0.01, 100.0):
        model = Linear()
        model.dropout.p = 0
        step = step_of(model, losses, clip_norm=clip_norm)
        before = [p.detach().clone() for p in model.parameters()]
        step(batch_of(), Moment(0, 0, 0.0))
        rates = {id(p): group["lr"] for group in step.optimizer.param_groups for p in group["params"]}
        steps = [(b - p.detach()) / rates[id(p)] for b, p in zip(before, model.parameters(), strict=True)]
        moved[clip_norm] = math.sqrt(sum(float(s.square().sum()) for s in steps))
    assert moved[0.01] == pytest.approx(0.01, rel=1e-3)
    assert moved[100.0] == moved[None] > 0.01


def test_loss_scaling_leaves_out_a_step_that_overflows_and_gives_up_at_scale_one() -> None:
    """The scaler of fp16, on the CPU: its own overflow is no error until the scale cannot be the reason."""
    model = Linear()
    step = step_of(model, broken_at(1, 2, 3))
    step.precision.scaler = torch.amp.GradScaler("cpu", init_scale=4 * MIN_SCALE, growth_interval=1)
    step(batch_of(), Moment(0, 0, 0.0))
    assert step.precision.scaler.get_scale() == 8 * MIN_SCALE
    before = [p.detach().clone() for p in model.parameters()]
    for n, scale in [(1, 4), (2, 2), (3, 1)]:
        step(batch_of(), Moment(n, 0, 0.0))
        assert step.precision.scaler.get_scale() == scale * MIN_SCALE
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(TrainingError, match="gradient is not finite at step 3"):
        step(batch_of(), Moment(3, 0, 0.0))
