"""The memory of a step: counted exactly, foretold from two images, refused in words."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from training import memory
from training.data import Batch, TrainingImages
from training.loop import fit
from training.losses import multilabel_soft_margin
from training.memory import LiveBytes, StepMemory, live_bytes
from training.models import CamClassifier, build_backbone
from training.optim import build_optimizer
from training.precision import Precision
from training.step import Moment, Step
from weakseg.datasets import read
from weakseg.errors import ConfigError
from weakseg.progress import Progress
from weakseg.recipe import BackboneConfig, Recipe

CPU = torch.device("cpu")
START = Moment(0, 0, 0.0)


def losses(model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
    return {"classification": multilabel_soft_margin(model(batch.images).logits, batch.tags)}


def small(recipe: Recipe, losses: object = losses, **changes: object) -> tuple[Step, TrainingImages]:
    """A step of a small network whose batch norm learns."""
    config = replace(recipe.train.optim, **changes)  # type: ignore[arg-type]
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name="small_resnet", freeze_stages=0, freeze_bn=False))
    model = CamClassifier(backbone, 3).to(memory_format=torch.channels_last).train()
    images = TrainingImages(read(recipe.data, "train"), config, (124, 116, 104), recipe.seed)
    return Step(model, losses, build_optimizer(model, config), Precision(config.precision, CPU), config), images  # type: ignore[arg-type]


def test_bytes_are_those_of_storages_that_live() -> None:
    known = torch.zeros(1000)
    with LiveBytes(CPU, [known]) as live:
        a = torch.zeros(256)  # 1024 bytes
        b = a.view(16, 16)  # the same storage
        known += 1  # was there before
        c = a + 1
        del a
        c = c.double()  # 2048, and 1024 go; b still holds the first
        del b, c
        torch.zeros(1)
    assert live.after == [1024, 1024, 1024, 2048, 4096, 4]


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}, {"crop_px": 48}])
def test_the_peak_of_five_images_follows_from_one_and_two(recipe: Recipe, changes: dict[str, object]) -> None:
    step, images = small(recipe, **changes)
    need = StepMemory(step, images, START)
    five = live_bytes(step, images, 5, START)
    assert (need.first + 4 * need.slope).max() == five.max()


def test_optimiser_state_and_accumulated_gradients_count(recipe: Recipe) -> None:
    need = {}
    for changes in ({}, {"optimizer": "adamw"}, {"accumulate": 2}):
        step, images = small(recipe, **changes)
        need[str(changes)] = StepMemory(step, images, START)(1000, step.config.accumulate)
    weights = sum(p.nbytes for p in step.parameters)
    plain, adamw, accumulated = need.values()
    assert plain > 3 * weights and adamw == accumulated == plain + weights


def test_measuring_leaves_no_trace(recipe: Recipe) -> None:
    step, images = small(recipe)
    before = {key: value.clone() for key, value in step.model.state_dict().items()}
    StepMemory(step, images, START)
    assert all(torch.equal(before[key], value) for key, value in step.model.state_dict().items())
    assert all(p.grad is None for p in step.parameters) and not step.optimizer.state


def test_losses_whose_operations_depend_on_the_images(recipe: Recipe) -> None:
    def branching(model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        parts = losses(model, batch, moment)
        if len(batch.ids) % 2:
            parts["odd"] = parts["classification"] * 2
        return parts

    need = StepMemory(*small(recipe, branching), START)
    assert need.first.size == 1 and 0 < need(4, 1) < need(400, 1)


class Lines(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__("silent")
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_one_line_before_a_start_and_none_before_a_resumption(recipe: Recipe, tmp_path: Path) -> None:
    step, images = small(recipe, epochs=1)
    lines = Lines()
    for _ in range(2):
        fit(step.model, losses, images, tmp_path, progress=lines)
    assert len(lines.said) == 1
    assert lines.said[0].startswith("memory: a step takes about ") and lines.said[0].endswith(" GiB free")


def test_too_little_memory_stops_before_the_start(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, images = small(recipe, batch_size=8, crop_px=128)
    need = StepMemory(step, images, START)
    for free, advice in [
        (
            need(4, 2),
            r"set optim.batch_size 4 and optim.accumulate 2, which trains nearly the same and takes \d+ MiB, or",
        ),
        (need(1, 8) - 1, r"lower optim.crop_px \(now 128\) or take a smaller network"),
    ]:
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        with pytest.raises(ConfigError, match=rf"a training step needs about \d+ MiB and \d+ MiB are free: {advice}"):
            fit(step.model, losses, images, tmp_path / "run", progress=Progress("silent"))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(memory, "free_bytes", lambda device: need(8, 1))
    fit(step.model, losses, replaced(images, epochs=1), tmp_path / "run", progress=Progress("silent"))


def replaced(images: TrainingImages, **changes: object) -> TrainingImages:
    config = replace(images.config, **changes)  # type: ignore[arg-type]
    return TrainingImages(images.dataset, config, images.fill, images.seed)


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 8 * 2**30)
    assert memory.free_bytes(CPU) == 8 * 2**30
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_bytes(CPU) == 2 * 2**30
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    assert memory.free_bytes(CPU) is None


SCRIPT = """
import sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_memory import CPU, START, losses
from training.data import Batch
from training.memory import StepMemory
from training.models import CamClassifier, build_backbone
from training.optim import build_optimizer
from training.precision import Precision
from training.step import Step
from weakseg.recipe import BackboneConfig, OptimConfig

N, SIZE = 8, 320
torch.manual_seed(0)
backbone = build_backbone(BackboneConfig(name=sys.argv[2], freeze_stages=2, freeze_bn=False))
model = CamClassifier(backbone, 20).to(memory_format=torch.channels_last).train()
config = OptimConfig(batch_size=N, crop_px=SIZE)
step = Step(model, losses, build_optimizer(model, config), Precision("float32", CPU), config)

class Noise:
    def __len__(self):
        return N
    def __getitem__(self, key):
        return torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8), torch.ones(20), None, str(key[1])

images = Noise()
batch = Batch(torch.stack([images[0, i][0] for i in range(N)]), torch.ones(N, 20), None, ["x"] * N)

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

before, peak, running = resident(), 0, True
need = StepMemory(step, images, START)(N, 1)

def watch():
    global peak
    while running:
        peak = max(peak, resident())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
for _ in range(2):
    step(batch, START)
running = False
watcher.join()
print(need, peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads the resident memory from /proc")
@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet50"])
def test_the_estimate_is_what_the_process_grows_by(backbone: str) -> None:
    """Within 30 %, eight images of 320 x 320."""
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), backbone]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    estimate, measured = map(int, done.stdout.split())
    assert estimate == pytest.approx(measured, rel=0.3), f"{estimate / 2**20:.0f} and {measured / 2**20:.0f} MiB"
    print(f"{backbone}: estimated {estimate / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
