"""The loop: exact resume, accumulation, schedule, groups, logs, errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from training.data import Batch, Batches, TrainingImages, loader
from training.loop import Moment, fit, part_of
from training.losses import multilabel_soft_margin
from training.models import CamClassifier, build_backbone
from training.optim import build_optimizer, parameter_groups, poly_factor, set_learning_rate
from weakseg.datasets import read
from weakseg.errors import ConfigError, TrainingError
from weakseg.progress import Progress
from weakseg.recipe import BackboneConfig, OptimConfig, Recipe

SILENT = Progress("silent")


class Linear(nn.Module):
    """A fast stand-in for a network: mean colour to logits, with dropout, so that torch's generator matters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Conv2d(3, 3, 1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(images.float() / 255)).mean((2, 3))


def losses(model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
    return {"classification": multilabel_soft_margin(model(batch.images), batch.tags)}


def images_of(recipe: Recipe, **changes: object) -> TrainingImages:
    config = replace(recipe.train.optim, **({"epochs": 2} | changes))  # type: ignore[arg-type]
    return TrainingImages(read(recipe.data, "train"), config, (124, 116, 104), recipe.seed)


def test_training_lowers_the_loss_and_logs_every_tenth_step(recipe: Recipe, tmp_path: Path) -> None:
    summary = fit(Linear(), losses, images_of(recipe, epochs=30, lr=0.3), tmp_path, progress=SILENT)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [9, 19, 29, 39, 49, 59]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0]["loss"] == pytest.approx(rows[0]["loss/classification"])
    assert summary["n_images"] == 240 and summary["steps"] == 60
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_resumed_equals_undisturbed(recipe: Recipe, tmp_path: Path, stop: int) -> None:
    images = images_of(recipe, epochs=4, checkpoint_every_s=0.0)

    class KilledError(Exception):
        pass

    def killing(model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        if moment.step == stop:
            raise KilledError
        return losses(model, batch, moment)

    whole, resumed = Linear(), Linear()
    fit(whole, losses, images, tmp_path / "whole", progress=SILENT)
    with pytest.raises(KilledError):
        fit(Linear(), killing, images, tmp_path / "resumed", progress=SILENT)
    fit(resumed, losses, images, tmp_path / "resumed", progress=SILENT)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert _steps(tmp_path / "whole") == _steps(tmp_path / "resumed")


def _steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_process_killed_with_sigkill_resumes_to_the_same_weights(
    recipe: Recipe, squares: Path, tmp_path: Path
) -> None:
    """The real network, the real loop, a real SIGKILL in the middle of a step."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, time
        from dataclasses import replace
        from pathlib import Path
        import torch
        torch.set_num_threads(1)
        from training import loop
        from training.data import TrainingImages
        from training.methods import cam
        from training.models import build_backbone
        from weakseg.datasets import read
        from weakseg.progress import Progress
        from weakseg.recipe import BackboneConfig, DataConfig, OptimConfig, TrainConfig
        config = OptimConfig(epochs=3, batch_size=4, crop_px=32, long_side_px=(32, 48), workers=1, lr=0.01,
                             checkpoint_every_s=0.0)
        dataset = read(DataConfig(root={str(squares)!r}, tags="imagesets"), "train")
        torch.manual_seed(0)
        model = cam.build(build_backbone(BackboneConfig(freeze_stages=0)), 3, TrainConfig())
        pause = float(sys.argv[2])
        def losses(model, batch, moment):
            time.sleep(pause)
            print(moment.step, flush=True)
            return cam.losses(model, batch, moment)
        loop.fit(model, losses, TrainingImages(dataset, config, (124, 116, 104), 0), Path(sys.argv[1]),
                 progress=Progress("silent"))
        torch.save(model.state_dict(), Path(sys.argv[1]) / "final.pt")
        """)
    )
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}

    def start(folder: str, pause: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), str(tmp_path / folder), pause]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    whole = start("whole", "0")
    assert whole.wait(120) == 0
    killed = start("killed", "0.3")
    assert killed.stdout is not None
    for line in killed.stdout:
        if int(line) == 3:
            time.sleep(0.1)
            killed.send_signal(signal.SIGKILL)
            break
    assert killed.wait(30) == -signal.SIGKILL
    killed.stdout.close()
    assert not (tmp_path / "killed/final.pt").exists()
    resumed = start("killed", "0")
    assert resumed.wait(120) == 0
    assert whole.stdout is not None and resumed.stdout is not None
    assert int(resumed.stdout.readline()) >= 3, "it must continue, not begin again"
    a, b = (torch.load(tmp_path / f / "final.pt", weights_only=True) for f in ("whole", "killed"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    for stream in (whole.stdout, resumed.stdout):
        stream.close()


def test_a_checkpoint_of_other_settings_is_not_continued(recipe: Recipe, tmp_path: Path) -> None:
    fit(Linear(), losses, images_of(recipe), tmp_path, progress=SILENT)
    summary = fit(Linear(), losses, images_of(recipe, lr=0.5), tmp_path, progress=SILENT)
    assert summary["n_images"] == 16


def test_workers_change_nothing(recipe: Recipe) -> None:
    batches = {}
    for workers in (0, 2):
        images = images_of(recipe, workers=workers)
        batches[workers] = list(loader(images, Batches(len(images), images.config, images.seed)))
    for a, b in zip(batches[0], batches[2], strict=True):
        assert a.ids == b.ids and torch.equal(a.images, b.images) and torch.equal(a.tags, b.tags)


def test_accumulated_batches_are_one_big_batch(recipe: Recipe, tmp_path: Path) -> None:
    """Two batches of 4 accumulated = one batch of 8, without dropout; the same images in the same epoch."""
    models = [Linear(), Linear()]
    for model, (size, accumulate) in zip(models, [(8, 1), (4, 2)], strict=True):
        model.dropout.p = 0
        images = images_of(recipe, epochs=1, batch_size=size, accumulate=accumulate, poly_power=0.0)
        fit(model, losses, images, tmp_path / str(size), progress=SILENT)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_non_finite_loss_names_the_images_and_keeps_the_checkpoint(recipe: Recipe, tmp_path: Path) -> None:
    def exploding(model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        loss = losses(model, batch, moment)["classification"]
        return {"classification": loss * (float("nan") if moment.step == 2 else 1.0)}

    images = images_of(recipe, checkpoint_every_s=0.0)
    with pytest.raises(TrainingError, match=r"not finite at step 2 .*images: 0\d\d, .*lower the learning rate"):
        fit(Linear(), exploding, images, tmp_path, progress=SILENT)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2


def test_poly_schedule_runs_from_one_to_zero() -> None:
    assert poly_factor(0, 100, 0.9) == 1
    assert poly_factor(100, 100, 0.9) == 0
    assert poly_factor(50, 100, 0.9) == pytest.approx(0.5**0.9)
    assert poly_factor(0, 100, 0.9, warmup=3) == 0.25


@given(st.integers(1, 40), st.data())
def test_cycles_are_all_but_equal_parts(total: int, data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, total))
    found = [part_of(n, total, parts) for n in range(total)]
    assert {part for part, _, _ in found} == set(range(parts))
    assert all(first <= n < end for n, (_, first, end) in enumerate(found))
    sizes = {end - first for _, first, end in found}
    assert max(sizes) - min(sizes) <= 1


def test_the_rate_starts_anew_with_each_cycle(recipe: Recipe, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def watched(model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        seen.append((moment.step, moment.cycle))
        return losses(model, batch, moment)

    images = images_of(recipe, epochs=20, lr=0.3)  # 40 steps, every tenth is logged
    fit(Linear(), watched, images, tmp_path, progress=SILENT, cycles=2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows] == pytest.approx([0.3 * (1 - n / 20) ** 0.9 for n in (9, 19, 9, 19)])
    assert seen[-40:] == [(n, n // 20) for n in range(40)]


def test_fewer_steps_than_cycles_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 3 steps for as many cycles, got 2: raise optim.epochs"):
        fit(Linear(), losses, images_of(recipe, epochs=1), tmp_path, progress=SILENT, cycles=3)


def test_four_groups_with_their_rates_and_decays() -> None:
    config = OptimConfig(lr=0.1, weight_decay=5e-4, new_lr_scale=10)
    model = CamClassifier(build_backbone(BackboneConfig(freeze_stages=0, freeze_bn=False)), 3)
    model.extra = nn.Linear(2, 2)  # a new layer with a bias
    groups = parameter_groups(model, config)
    assert [(g["lr_scale"], g["weight_decay"]) for g in groups] == [(1, 5e-4), (2, 0), (10, 5e-4), (20, 0)]
    assert [len(g["params"]) for g in groups] == [52, 104, 2, 1]  # type: ignore[arg-type]
    optimizer = build_optimizer(model, config)
    assert set_learning_rate(optimizer, config, 50, 100) == pytest.approx(0.1 * 0.5**0.9)
    assert optimizer.param_groups[3]["lr"] == pytest.approx(20 * 0.1 * 0.5**0.9)
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_everything_frozen_is_an_error() -> None:
    model = build_backbone(BackboneConfig(freeze_stages=5))
    with pytest.raises(ConfigError, match="freeze_stages"):
        build_optimizer(model, OptimConfig())
