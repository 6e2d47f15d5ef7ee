"""What needs a CUDA device: precisions, compilation, memory. `pytest -m gpu`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from training import distributed
from training.data import Batch, TrainingImages
from training.device import pick_device
from training.loop import fit
from training.losses import multilabel_soft_margin
from training.memory import StepMemory
from training.models import CamClassifier, DeepLabV3Plus, build_backbone
from training.optim import build_optimizer
from training.precision import Precision
from training.step import Moment, Step
from weakseg.datasets import read
from weakseg.errors import ConfigError
from weakseg.progress import Progress
from weakseg.recipe import BackboneConfig, OptimConfig, Recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # of torch's compiler, about torch
]
SILENT = Progress("silent")


def network(*, freeze_bn: bool = True) -> CamClassifier:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name="small_resnet", freeze_stages=0, freeze_bn=freeze_bn))
    return CamClassifier(backbone, 3, dropout=0.0).to(pick_device())


def losses(model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
    return {"classification": multilabel_soft_margin(model(batch.images).logits, batch.tags)}


def images_of(recipe: Recipe, **changes: object) -> TrainingImages:
    config = replace(recipe.train.optim, **({"epochs": 10} | changes))  # type: ignore[arg-type]
    return TrainingImages(read(recipe.data, "train"), config, (124, 116, 104), recipe.seed)


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"precision": "fp16"}, {"compile": True}])
def test_every_way_to_compute_trains_to_the_same_loss(
    recipe: Recipe, tmp_path: Path, changes: dict[str, object]
) -> None:
    last = {}
    for name, options in (("float32", {}), ("other", changes)):
        model = network()
        last[name] = fit(model, losses, images_of(recipe, **options), tmp_path / name, progress=SILENT)["loss"]
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert not any(key.startswith("_orig_mod") for key in model.state_dict())
    assert last["other"] == pytest.approx(last["float32"], rel=0.05)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_killed_training_goes_on_as_if_undisturbed(recipe: Recipe, tmp_path: Path, precision: str) -> None:
    """fp16: the scale of the loss is in the checkpoint. Convolutions may add in another order: close, not equal."""
    images = images_of(recipe, precision=precision, checkpoint_every_s=0.0)

    def killing(model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        if moment.step == 5:
            raise KeyboardInterrupt
        return losses(model, batch, moment)

    whole, resumed = network(), network()
    fit(whole, losses, images, tmp_path / "whole", progress=SILENT)
    with pytest.raises(KeyboardInterrupt):
        fit(network(), killing, images, tmp_path / "resumed", progress=SILENT)
    saved = torch.load(tmp_path / "resumed/checkpoint.pt", weights_only=True)
    assert ("scale" in saved["scaler"]) == (precision == "fp16")
    fit(resumed, losses, images, tmp_path / "resumed", progress=SILENT)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_the_estimate_is_what_torch_allocates(precision: str) -> None:
    """Within 30 %, sixteen images of 320 x 320 in MobileNetV2."""
    n, size, device = 16, 320, pick_device()
    backbone = build_backbone(BackboneConfig(freeze_bn=False))
    model = CamClassifier(backbone, 20).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    config = OptimConfig(batch_size=n, crop_px=size, precision=precision)  # type: ignore[arg-type]
    step = Step(model, losses, build_optimizer(model, config), Precision(precision, device), config)

    class Noise:
        def __len__(self) -> int:
            return n

        def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, None, str]:
            return torch.randint(0, 256, (3, size, size), dtype=torch.uint8), torch.ones(20), None, str(key[1])

    start = Moment(0, 0, 0.0)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)
    batch = Batch(images, torch.ones(n, 20), None, ["x"] * n).to(device)
    before = torch.cuda.memory_allocated(device)
    estimate = StepMemory(step, Noise(), start)(n, 1)  # type: ignore[arg-type]
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):
        step(batch, start)
    assert estimate == pytest.approx(torch.cuda.max_memory_allocated(device) - before, rel=0.3)


def test_a_batch_that_cannot_fit_is_refused_before_the_start(recipe: Recipe, tmp_path: Path) -> None:
    """As if the device had 64 MiB."""
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 64 * 2**20) / total))
    try:
        with pytest.raises(ConfigError, match=r"lower optim\.crop_px"):
            fit(network(), losses, images_of(recipe, crop_px=4096, batch_size=1), tmp_path, progress=SILENT)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one process."""
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_batch_norm_that_learns_is_joined_and_frozen_is_not(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "size", lambda: 2)
    torch.manual_seed(0)
    model = DeepLabV3Plus(build_backbone(BackboneConfig(name="small_resnet")), 3, 16).to(pick_device())
    keys = list(model.state_dict())
    distributed.prepare(model, SILENT)
    kinds = [type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert kinds.count(nn.SyncBatchNorm) == 13 and nn.BatchNorm2d in kinds
    assert list(model.state_dict()) == keys
    model.train()
    assert not any(m.training for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d))
    model(torch.zeros(2, 3, 32, 32, device=pick_device())).sum().backward()
    assert math.isfinite(sum(float(p.grad.sum()) for p in model.aspp.parameters() if p.grad is not None))


def test_more_processes_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(ConfigError, match="at most one process a CUDA device: torchrun --nproc-per-node"):
        pick_device()
    monkeypatch.delenv("LOCAL_RANK")
    assert pick_device() == torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
