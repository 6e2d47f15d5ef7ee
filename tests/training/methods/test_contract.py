"""What every file of training/methods promises, whatever its method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.training.cams.networks import photographs
from tests.training.methods.parts import END, START, batch, learnt, losses_of, real_batch, total, with_method
from tests.training.methods.parts import model_of as untrained
from training import cams, loop, methods, train_classifier
from training.data import Batch
from training.models import load_model, save_model
from training.randomness import seed_torch
from weakseg import presets
from weakseg.progress import Progress
from weakseg.recipe import Recipe, TrainConfig

every_method = pytest.mark.parametrize("name", methods.names())
of_tags_alone = pytest.mark.parametrize(  # labels of the others are those of a dataset
    "name", [name for name in methods.names() if not hasattr(methods.get(name), "labels_of")]
)


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
    before, state = copy_of(data), {key: value.clone() for key, value in model.state_dict().items()}

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
    assert model.training
    for one, other in zip(data, before, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


@of_tags_alone
@pytest.mark.parametrize(
    ("n_classes", "tags"), [(1, [(0,), ()]), (4, [(1, 3), (2,)]), (81, [(0, 5, 80), (7,)]), (2, [(), ()])]
)
def test_any_number_of_classes_and_tags(name: str, n_classes: int, tags: list[tuple[int, ...]]) -> None:
    model = model_of(name, n_classes)
    for moment in (START, END):
        model.zero_grad(set_to_none=True)
        loss = total(losses_of(name)(model, batch(n_classes, 64, tags), moment))
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@every_method
def test_a_killed_training_goes_on_to_the_same_weights(name: str, recipe: Recipe, tmp_path: Path) -> None:
    recipe = with_method(recipe, name, epochs=4)
    optim = replace(recipe.train.optim, checkpoint_every_s=0.0)
    recipe = replace(recipe, train=replace(recipe.train, optim=optim))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_classifier, "fit", fails_after(2))
        with pytest.raises(KeyboardInterrupt):
            train_classifier.run(recipe, tmp_path / "killed", stage="train", progress=Progress("silent"))
    for folder in ("killed", "whole"):
        train_classifier.run(recipe, tmp_path / folder, stage="train", progress=Progress("silent"))
    killed, whole = (
        load_model(tmp_path / f / "train/classifier.pt", kind="classifier")[0] for f in ("killed", "whole")
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


def moment_of_last_cycle(recipe: Recipe) -> loop.Moment:
    cycles = methods.get(recipe.train.method).cycles(recipe.train)  # type: ignore[attr-defined]
    return replace(END, cycle=cycles - 1)


def copy_of(data: Batch) -> list[object]:
    return [value.clone() if isinstance(value, Tensor) else list(value) if value else value for value in data]


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def fails_after(n: int) -> object:
    """`fit` that is interrupted at step n."""

    def fit(model: nn.Module, losses: loop.Losses, *args: object, **options: object) -> object:
        def interrupted(model: nn.Module, data: Batch, moment: loop.Moment) -> dict[str, Tensor]:
            if moment.step >= n:
                raise KeyboardInterrupt
            return losses(model, data, moment)

        return loop.fit(model, interrupted, *args, **options)  # type: ignore[arg-type]

    return fit
