"""What every file of training/methods promises, whatever its method."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.onnx_from_torch import onnx_from_graphs
from export.parity import check
from tests.training.cams.networks import photographs, state_of
from tests.training.methods.parts import END, START, learnt, losses_of, real_batch, total, with_method
from tests.training.methods.parts import model_of as untrained
from training import cams, loop, methods, seeds, train_classifier
from training.data import Batch
from training.graphs import ClassifierGraph
from training.models import load_model, save_model
from training.randomness import seed_torch
from training.saliency import objectness
from weakseg import presets
from weakseg.classes import ClassTable
from weakseg.datasets import Dataset, read
from weakseg.progress import Progress
from weakseg.recipe import Recipe, SaliencyConfig, TrainConfig

every_method = pytest.mark.parametrize("name", methods.names())
SHORT = replace(objectness.OPTIM, epochs=1, batch_size=4, crop_px=32, long_side_px=(32, 48), checkpoint_every_s=0.0)
# Who calls `fit`, and where it leaves its checkpoints
PHASES = {"train": (train_classifier, ""), "seeds": (seeds, "seeds"), "objectness": (objectness, "saliency/objectness")}


def phases_of(name: str) -> list[str]:
    """What is trained for a method, last things first; objectness for one of those that ask for it in the same way."""
    seeded = hasattr(getattr(TrainConfig(), name, None), "seeds_share")
    return ["train"] + ["seeds"] * seeded + ["objectness"] * (name == "eps")


def model_of(name: str, n_classes: int, config: TrainConfig | None = None) -> nn.Module:
    return learnt(untrained(name, n_classes, config))


@every_method
@pytest.mark.parametrize("n_classes", [1, 4, 81])
def test_logits_and_maps_of_every_class(name: str, n_classes: int) -> None:
    model = model_of(name, n_classes).eval()
    images = photographs(2, 64, 96)
    with torch.no_grad():
        out = model(images)
    stride = model.backbone.strides[-1]
    assert out.logits.shape == (2, n_classes) and out.logits.dtype == torch.float32
    assert out.cam.shape == (2, n_classes, 64 // stride, 96 // stride) and out.cam.dtype == torch.float32
    assert torch.isfinite(out.logits).all() and torch.isfinite(out.cam).all()


@every_method
def test_an_image_alone_or_in_a_batch(name: str) -> None:
    model, images = model_of(name, 4).eval(), photographs(3, 64, 64)
    with torch.no_grad():
        together = model(images)
        alone = [model(images[i : i + 1]) for i in range(3)]
    for k in ("logits", "cam"):
        torch.testing.assert_close(
            getattr(together, k), torch.cat([getattr(one, k) for one in alone]), atol=1e-5, rtol=1e-4
        )


@every_method
def test_looking_changes_nothing(name: str) -> None:
    model, images = model_of(name, 2).eval(), photographs()
    before, state = images.clone(), {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        first, second = model(images), model(images)
    assert torch.equal(images, before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(first.logits, second.logits) and torch.equal(first.cam, second.cam)
    assert not model.training


@every_method
@pytest.mark.parametrize("moment", [START, END])
def test_a_step_learns_is_reproducible_and_leaves_the_batch_alone(
    name: str, moment: loop.Moment, recipe: Recipe, tmp_path: Path
) -> None:
    recipe = with_method(recipe, name)
    data = real_batch(recipe, tmp_path)
    if "cycles" in vars(methods.get(name)):
        moment = moment if moment is START else moment_of_last_cycle(recipe)
    model, losses = model_of(name, 3, recipe.train), losses_of(name, recipe.train)
    next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.LayerNorm)).eval()
    before, state = copy_of(data), {key: value.clone() for key, value in model.state_dict().items()}
    modes = state_of(model)  # a part is in a mode of its own

    def step() -> dict[str, Tensor]:
        model.load_state_dict(state)
        model.zero_grad(set_to_none=True)
        seed_torch(3, 7)
        parts: dict[str, Tensor] = losses(model, data, moment)
        total(parts).backward()
        return parts

    first, gradients = step(), gradients_of(model)
    second = step()
    assert all(value.ndim == 0 and torch.isfinite(value) for value in first.values())
    assert {k: v.item() for k, v in first.items()} == {k: v.item() for k, v in second.items()}
    assert gradients and any(gradient.abs().sum() > 0 for gradient in gradients.values())
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert all(torch.equal(gradient, gradients[key]) for key, gradient in gradients_of(model).items())
    assert state_of(model) == modes
    for one, other in zip(data, before, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


@every_method
@pytest.mark.parametrize(
    ("n_classes", "tags"), [(1, [(0,), ()]), (4, [(1, 3), (2,)]), (81, [(0, 5, 80), (7,)]), (2, [(), ()])]
)
def test_any_number_of_classes_and_tags(
    name: str, n_classes: int, tags: list[tuple[int, ...]], recipe: Recipe, tmp_path: Path
) -> None:
    recipe = with_method(recipe, name)
    data = real_batch(recipe, tmp_path, len(tags), tagged(read(recipe.data, "train"), n_classes, tags))
    model, losses = model_of(name, n_classes), losses_of(name, recipe.train)
    for moment in (START, END):
        model.zero_grad(set_to_none=True)
        loss = total(losses(model, data, moment))
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("name", "phase"), [(name, phase) for name in methods.names() for phase in phases_of(name)])
def test_a_killed_training_goes_on_to_the_same_weights(
    name: str, phase: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_method(recipe, name, epochs=4)
    train = replace(recipe.train, optim=replace(recipe.train.optim, checkpoint_every_s=0.0))
    if phase == "objectness":
        monkeypatch.setattr(objectness, "train", partial(objectness.train, n=16, optim=SHORT))
        section = getattr(train, name)
        train = replace(train, **{name: replace(section, saliency=SaliencyConfig(estimator="objectness"))})
    recipe = replace(recipe, train=train)
    caller, folder = PHASES[phase]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caller, "fit", fails_after(2))
        with pytest.raises(KeyboardInterrupt):
            train_classifier.run(recipe, tmp_path / "killed", stage="train", progress=Progress("silent"))
    assert torch.load(tmp_path / "killed/train" / folder / "checkpoint.pt", weights_only=True)["step"] == 2
    for run in ("killed", "whole"):
        train_classifier.run(recipe, tmp_path / run, stage="train", progress=Progress("silent"))
    killed, whole = (
        load_model(tmp_path / run / "train/classifier.pt", kind="classifier")[0] for run in ("killed", "whole")
    )
    for key, value in whole.state_dict().items():
        assert torch.equal(value, killed.state_dict()[key]), key


@every_method
def test_it_is_stored_and_read_again(name: str, tmp_path: Path) -> None:
    model = model_of(name, 3).eval()
    save_model(tmp_path / "m.pt", model, kind="classifier", classes=("a", "b", "c"), method=name)
    again, classes = load_model(tmp_path / "m.pt", kind="classifier")
    assert type(again) is type(model) and classes == ("a", "b", "c")
    with torch.no_grad():
        one, other = model(photographs()), again(photographs())
    assert torch.equal(one.logits, other.logits) and torch.equal(one.cam, other.cam)


@every_method
def test_its_maps_by_the_cam_method_that_goes_with_it(name: str, recipe: Recipe) -> None:
    made = presets.with_method(recipe, name)
    assert made.train.method == name and made.name == f"squares-{name}"
    method = cams.get(made.cam.method)
    with torch.no_grad():
        _, maps = method.maps(model_of(name, 3).eval(), photographs(2, 64, 64))
    assert method.EXPORTABLE and maps.min() >= 0 and maps.max() > 0


@pytest.mark.slow
@every_method
def test_its_maps_are_the_same_in_onnx(name: str, recipe: Recipe, tmp_path: Path) -> None:
    """Scores, maps and label maps of real sizes and of edge cases, to the tolerance of an export."""
    method = cams.get(presets.with_method(recipe, name).cam.method)
    graph = ClassifierGraph(model_of(name, 3).eval(), method).eval()
    path = tmp_path / "maps.onnx"
    path.write_bytes(onnx_from_graphs({"maps": graph})["maps"])
    images = [photographs(1, *size)[0].permute(1, 2, 0).numpy().astype(np.uint8) for size in ((48, 64), (75, 50))]
    report = check("maps", graph, path, images)
    assert report.n_cases > len(images) and {one.output for one in report.differences} >= {"scores", "cam", "labels"}
    assert all(one.ok for one in report.differences)


def tagged(dataset: Dataset, n_classes: int, tags: list[tuple[int, ...]]) -> Dataset:
    """As many of its images, with other tags."""
    samples = tuple(replace(sample, tags=own) for sample, own in zip(dataset, tags, strict=False))
    return replace(dataset, classes=ClassTable(tuple(f"class {c}" for c in range(n_classes))), samples=samples)


def moment_of_last_cycle(recipe: Recipe) -> loop.Moment:
    cycles = methods.get(recipe.train.method).cycles(recipe.train)  # type: ignore[attr-defined]
    return replace(END, cycle=cycles - 1)


def copy_of(data: Batch) -> list[object]:
    return [value.clone() if isinstance(value, Tensor) else list(value) if value else value for value in data]


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def fails_after(n: int) -> object:
    """`fit` that is interrupted at step n; not before, where the last step is tried for its memory."""

    def fit(model: nn.Module, losses: loop.Losses, *args: object, **options: object) -> object:
        def interrupted(model: nn.Module, data: Batch, moment: loop.Moment) -> dict[str, Tensor]:
            if moment.step == n:
                raise KeyboardInterrupt
            return losses(model, data, moment)

        return loop.fit(model, interrupted, *args, **options)  # type: ignore[arg-type]

    return fit
