"""What a checkpoint keeps, and which it goes on from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from training.checkpoint import Checkpoint
from weakseg.recipe import OptimConfig
from weakseg.stages import effective

# What the loop wrote for default settings before precision, compilation and clipping.
BEFORE = (
    '{"n": 8, "optim": {"accumulate": 1, "batch_size": 16, "crop_px": 256, "epochs": 6, "flip": true, "jitter": 0.3, '
    '"long_side_px": [256, 384], "lr": 0.01, "momentum": 0.9, "new_lr_scale": 10.0, "optimizer": "sgd", '
    '"poly_power": 0.9, "warmup_steps": 0, "weight_decay": 0.0005}, "seed": 0}'
)


def test_the_scale_of_the_loss_is_kept(tmp_path: Path) -> None:
    saved, loaded = (torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3) for scale in (8.0, 2.0))
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for _ in range(4):
        saved.scale(weight.sum()).backward()
        saved.step(optimizer)
        saved.update()
    Checkpoint(tmp_path, {"scaler": saved}, {"seed": 0}).save(4)
    assert Checkpoint(tmp_path, {"scaler": loaded}, {"seed": 0}).load() == 4
    assert loaded.get_scale() == 16.0 and loaded.state_dict() == saved.state_dict()


def test_a_checkpoint_from_before_precisions_goes_on(tmp_path: Path) -> None:
    def parts() -> dict[str, object]:
        return {"model": nn.Linear(2, 2), "scaler": torch.amp.GradScaler("cpu", enabled=False)}

    old = parts()
    torch.save({"model": old["model"].state_dict(), "step": 3, "fingerprint": BEFORE}, tmp_path / "checkpoint.pt")  # type: ignore[attr-defined]
    for config, step in [(OptimConfig(compile=True), 3), (OptimConfig(precision="bf16"), 0)]:
        new = parts()
        fingerprint = {"optim": effective(config), "seed": 0, "n": 8}
        assert Checkpoint(tmp_path, new, fingerprint).load() == step  # type: ignore[arg-type]
        assert torch.equal(old["model"].weight, new["model"].weight) == (step == 3)  # type: ignore[attr-defined]
