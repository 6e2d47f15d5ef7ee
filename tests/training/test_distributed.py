"""Two real processes on the CPU: they train as one does, and fall together."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from training import distributed
from training.data import Batches
from training.models import load_model
from training.randomness import epoch_order, seed_torch
from weakseg.errors import ConfigError
from weakseg.recipe import OptimConfig

SCRIPT = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from training import distributed
from training.data import TrainingImages
from training.loop import fit
from training.losses import multilabel_soft_margin
from training.models import CamClassifier, build_backbone
from weakseg.datasets import read
from weakseg.progress import Progress
from weakseg.recipe import BackboneConfig, DataConfig, OptimConfig

folder, root = Path(sys.argv[1]), sys.argv[2]
if "RANK" in os.environ:
    distributed.join()
torch.manual_seed(distributed.rank())  # other start weights: those of the first process count
model = CamClassifier(build_backbone(BackboneConfig(name="small_resnet", freeze_stages=0)), 3, dropout=0.0)
model.unused = torch.nn.Parameter(torch.ones(1))  # gets a gradient in the last process alone
config = OptimConfig(epochs=5, batch_size=4, accumulate=2, crop_px=32, long_side_px=(32, 48), workers=0, lr=0.05,
                     checkpoint_every_s=0.0, clip_norm=1.0)
images = TrainingImages(read(DataConfig(root=root, tags="imagesets"), "train"), config, (124, 116, 104), 0)

def losses(model, batch, moment):
    # Two branches with shared weights, as in SEAM.
    first, second = model(batch.images), model(batch.images.flip(3))
    last = distributed.rank() == distributed.size() - 1
    return {
        "classification": multilabel_soft_margin(first.logits, batch.tags),
        "equal": (first.cam.flip(3) - second.cam).abs().mean(),
        "share": model.unused.sum() * distributed.size() if last else first.logits.sum() * 0,
    }

def breaking(model, batch, moment):
    parts = losses(model, batch, moment)
    if moment.step == 4 and distributed.rank() == 1:
        print("mine:", ", ".join(batch.ids), file=sys.stderr)
        parts["equal"] = parts["equal"] * float("nan")
    return parts

start = {key: value.clone() for key, value in model.state_dict().items()}
summary = fit(model, losses, images, folder, progress=Progress("silent"))
if distributed.rank() == 0:
    torch.save({"start": start, "end": model.state_dict(), "loss": summary["loss"]}, folder / "final.pt")
if "RANK" in os.environ:
    fit(model, breaking, images, folder / "broken", progress=Progress("silent"))
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(command: list[str], **variables: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    environment |= {name: str(value) for name, value in variables.items()}
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def start_two(command: list[str]) -> list[subprocess.Popen[str]]:
    """As torchrun starts them."""
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": 2}
    return [start(command, RANK=rank, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=2, **meet) for rank in range(2)]


def finish(process: subprocess.Popen[str], timeout_s: float = 120) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return process.returncode, out, err


def test_two_processes_train_as_one_and_the_one_that_breaks_says_why(squares: Path, tmp_path: Path) -> None:
    """Same global batch: same weights to 1e-4 without dropout. Then a loss of the second process is not finite."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    started = start_two([str(script), str(tmp_path / "two"), str(squares)])
    started.append(start([str(script), str(tmp_path / "one"), str(squares)]))
    (first_code, _, first), (second_code, _, second), (code, _, err) = [finish(process) for process in started]
    assert code == 0, err

    a, b = (torch.load(tmp_path / name / "final.pt", weights_only=True) for name in ("one", "two"))
    moved = max(float((a["end"][key] - a["start"][key]).abs().max()) for key in ("head.weight", "unused"))
    assert moved > 0.05, "the comparison says nothing about weights that stay where they were"
    for key, value in a["end"].items():
        torch.testing.assert_close(b["end"][key], value, rtol=0, atol=1e-4)
    assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)

    assert first_code == second_code == 1
    ids = second.split("mine: ")[1].splitlines()[0]
    assert "TrainingError: loss is not finite at step 4 (loss nan, " in second and f"images: {ids}. " in second
    assert "TrainingError: another process of this training has stopped: its own message says why" in first
    assert torch.load(tmp_path / "two/broken/checkpoint.pt", weights_only=True)["step"] == 4
    assert [path.name for path in (tmp_path / "two/broken/tensorboard").iterdir()] != []


RECIPE = """
from weakseg.recipe import *
optim = OptimConfig(epochs=2, batch_size=4, crop_px=32, long_side_px=(32, 48), workers=0, lr=0.02)
RECIPE = Recipe(name="squares", data=DataConfig(root={root!r}, tags="imagesets"),
                backbone=BackboneConfig(name="small_resnet", freeze_stages=0), train=TrainConfig(optim=optim))
"""


@pytest.mark.slow
def test_torchrun_runs_falls_and_goes_on(squares: Path, tmp_path: Path) -> None:
    """The documented command: a photograph of the second's share cannot be decoded; then it can, up to train_seg."""
    shutil.copytree(squares, tmp_path / "data")
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(root=str(tmp_path / "data")))

    def torchrun(verb: str) -> tuple[int, str, str]:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "weakseg"]
        options = ["--folder", str(tmp_path / "run"), "--evaluate.splits", "train"]
        return finish(start([*launch, verb, str(recipe), *options]))

    order = epoch_order(0, 0, 8)
    broken = next(i for i in order[2:4] + order[6:8] if i > 4)  # the first four tagged ones are shown in pictures
    photograph = tmp_path / f"data/JPEGImages/{broken:03d}.jpg"
    whole = photograph.read_bytes()
    photograph.write_bytes(whole[:300])
    code, _, err = torchrun("train")
    assert code == 1
    assert err.count(f"error: {photograph}: expected a whole JPEG file") == 1
    photograph.write_bytes(whole)

    for verb in ("train", "train", "cam", "pseudo-label", "train-seg"):
        code, out, err = torchrun(verb)
        assert code == 0, err
        assert len(out.splitlines()) == 2, "one table, of the first process"
        assert ("train: up to date" in err) == (verb == "train" and "train: done" not in err)
    assert "warning: 13 batch norms learn from each process's own images" in err
    assert (tmp_path / "run/train_seg/segmentation.pt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["erasing", "guided"])
def test_torchrun_trains_methods_of_several_parts(method: str, squares: Path, tmp_path: Path) -> None:
    """Cycles whose losses all processes know, and label maps of which each process makes a share."""
    recipe, folder = tmp_path / "recipe.py", tmp_path / "run"
    recipe.write_text(RECIPE.format(root=str(squares)))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "weakseg"]
    options = ["--folder", str(folder), "--evaluate.splits", "train", "--train.optim.epochs", "4"]
    code, _, err = finish(start([*launch, "run", f"{recipe}:{method}", *options, "--to", "train"]), timeout_s=600)
    assert code == 0, err
    model, classes = load_model(folder / "train/classifier.pt", kind="classifier")
    assert classes == ("blue", "green", "red") and all(torch.isfinite(p).all() for p in model.parameters())
    if method == "erasing":
        assert (model.loss_weights > 0).all() and torch.isfinite(model.loss_sums).all()
    else:
        made = {path.stem for path in (folder / "train/guides").rglob("*.png")}
        assert made == {f"{i:03d}" for i in range(8)}


def test_shares_of_a_batch_are_the_batch() -> None:
    config = OptimConfig(epochs=2, batch_size=4)
    whole = list(Batches(9, config, seed=0))
    shares = [list(Batches(9, config, 0, process=i, n_processes=2)) for i in range(2)]
    assert [first + second for first, second in zip(*shares, strict=True)] == whole
    small = [list(Batches(2, config, 0, process=i, n_processes=2)) for i in range(2)]
    assert [first + second for first, second in zip(*small, strict=True)] == list(Batches(2, config, 0))


@pytest.mark.parametrize(("n", "batch_size", "said"), [(9, 5, "got 5$"), (3, 16, "got 3 images in all")])
def test_shares_that_are_not_equal_are_refused(n: int, batch_size: int, said: str) -> None:
    with pytest.raises(ConfigError, match=f"a multiple of the 2 processes, {said}"):
        Batches(n, OptimConfig(batch_size=batch_size), 0, n_processes=2)


def test_dropout_differs_between_processes_and_is_as_before_in_the_first() -> None:
    drawn = []
    for process in (0, 1, 2):
        seed_torch(7, 5, process)
        drawn.append(torch.rand(4))
    seed_torch(7, 5)
    assert torch.equal(torch.rand(4), drawn[0])
    assert torch.initial_seed() == 4346648539189822640
    assert len({tuple(d.tolist()) for d in drawn}) == 3


def test_alone_nothing_is_exchanged() -> None:
    layer = nn.Linear(2, 2)
    distributed.average_gradients(list(layer.parameters()))
    assert layer.weight.grad is None
    assert distributed.mean({"loss": 2.0}) == {"loss": 2.0}
    assert (distributed.rank(), distributed.size()) == (0, 1)
