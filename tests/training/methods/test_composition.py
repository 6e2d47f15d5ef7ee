"""Methods and additions joined by "+": which go together, in which order, what they become; each pair trains a step."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.methods.parts import END, START, batch, losses_of, model_of, total, with_method
from training import methods, train_classifier
from training.models import load_model
from training.models.seam import SeamClassifier
from weakseg import presets
from weakseg.errors import ConfigError
from weakseg.progress import Progress
from weakseg.recipe import EvaluateConfig, HideAndSeekConfig, OptimConfig, Recipe, TrainConfig
from weakseg.recipe_loading import load_recipe
from weakseg.stages import stage_keys

MODULES: dict[str, Any] = {name: methods._module(name) for name in methods.names()}
ADDITIONS = [name for name, module in MODULES.items() if hasattr(module, "around")]
METHODS = [name for name in MODULES if name not in ADDITIONS]
PAIRS = [(method, addition) for method in METHODS for addition in ADDITIONS]


# Names ----------------------------------------------------------------------------------------------------------------


def test_there_are_additions_and_methods() -> None:
    assert {"hide_and_seek", "mixup_cam"} <= set(ADDITIONS)
    assert {"cam", "seam"} <= set(METHODS)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("cam", "cam"),
        ("hide_and_seek", "cam"),
        ("mixup_cam+hide_and_seek", "cam"),
        ("seam+mixup_cam", "seam"),
        ("mixup_cam+seam+hide_and_seek", "seam"),
    ],
)
def test_without_a_method_additions_are_to_plain_classification(name: str, base: str) -> None:
    assert methods.base_of(name) == base
    made, own = methods.get(name), MODULES[base]
    assert made.build is own.build
    assert getattr(made, "NETWORK", None) is getattr(own, "NETWORK", None)


def test_a_method_alone_is_its_file() -> None:
    assert methods.get("seam") is MODULES["seam"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("seem", r"unknown training method 'seem': expected one of .*seam"),
        ("seam+hide", r"unknown training method 'hide': expected one of .*hide_and_seek"),
        ("seam+", r"unknown training method '': expected one of "),
        ("cam+seam", r"cam and seam are methods of their own, .* any additions \(.*hide_and_seek.*mixup_cam.*\)"),
        ("seam+mixup_cam+cam", r"seam and cam are methods of their own"),
        ("seam+seam", r"expected each name once in train.method, got 'seam\+seam'"),
        ("mixup_cam+seam+mixup_cam", r"expected each name once in train.method, got 'mixup_cam\+seam\+mixup_cam'"),
    ],
)
def test_names_that_make_no_method(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        methods.get(name)


# Order ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "expected"), [("hide_and_seek+mixup_cam", 0.25), ("mixup_cam+hide_and_seek", 0.5)])
def test_additions_that_come_first_see_the_images_first(name: str, expected: float) -> None:
    """Of two mixed images, a pixel has the mean colour where it is hidden in both; of a hidden mixture where it is."""
    train = TrainConfig(optim=OptimConfig(crop_px=224), hide_and_seek=HideAndSeekConfig(sides_px=(1,)))
    train = replace(train, mixup_cam=replace(train.mixup_cam, alpha=50.0))  # no share near 0 or 1
    model, given = model_of("cam"), []
    model.backbone.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    torch.manual_seed(0)
    losses_of(name, train)(model, batch(), START)
    colour = torch.tensor(model.backbone.mean_colour)[:, None, None]
    hidden = ((given[0] - colour).abs() < 1e-3).all(dim=1)
    sigma = (expected * (1 - expected) / hidden.numel()) ** 0.5
    assert float(hidden.float().mean()) == pytest.approx(expected, abs=3 * sigma)


# Pairs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "addition"), PAIRS)
def test_every_pair_trains_a_step_or_is_refused_with_the_reason(method: str, addition: str) -> None:
    name = f"{method}+{addition}"
    if method in getattr(MODULES[addition], "REFUSES", {}):
        with pytest.raises(ConfigError, match=f"^{addition} cannot be added to {method}: [a-z].*[a-z]$"):
            methods.get(name)
        return
    model, data = model_of(name), batch(tags=[(0,), (1, 2), ()])
    alone = set(losses_of(method)(model, data, START))
    for moment in (START, END):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        parts = losses_of(name)(model, data, moment)
        total(parts).backward()
        assert alone <= set(parts) and all(torch.isfinite(part) for part in parts.values())
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("addition", ["hide_and_seek", "mixup_cam"])
def test_methods_that_learn_from_label_maps_are_refused(addition: str) -> None:
    assert {name for name in METHODS if hasattr(MODULES[name], "labels_of")} <= set(MODULES[addition].REFUSES)


def test_all_of_it_trains_and_is_stored_as_its_method(recipe: Recipe, tmp_path: Path) -> None:
    recipe = with_method(recipe, "hide_and_seek+seam+mixup_cam", epochs=5)  # 10 steps, of which losses are logged
    summary = train_classifier.run(recipe, tmp_path, stage="train", progress=Progress("silent"))
    assert {"loss/er", "loss/ecr", "loss/entropy", "loss/concentration"} <= set(summary)
    model, classes = load_model(tmp_path / "train/classifier.pt", kind="classifier")
    assert isinstance(model, SeamClassifier) and classes == ("blue", "green", "red")


# Recipes --------------------------------------------------------------------------------------------------------------


def test_a_recipe_with_additions_by_its_name() -> None:
    recipe = load_recipe("synthetic:seam+hide_and_seek")
    assert recipe.train.method == "seam+hide_and_seek"
    assert recipe.name == "synthetic-seam+hide_and_seek"
    assert recipe.export.name == "demo-seam-hide-and-seek"  # a name of a bundle
    seam = load_recipe("synthetic:seam")
    assert (recipe.cam, recipe.train.seam) == (seam.cam, seam.train.seam)
    assert recipe == presets.with_method(load_recipe("synthetic"), "seam+hide_and_seek")


def test_an_addition_alone_leaves_the_maps_as_they_are() -> None:
    plain = load_recipe("synthetic")
    assert load_recipe("synthetic:mixup_cam").cam == plain.cam
    assert load_recipe("synthetic:mixup_cam").train == replace(plain.train, method="mixup_cam")


@pytest.mark.parametrize("name", ["cam", "seam", "hide_and_seek", "seam+hide_and_seek", "hide_and_seek+mixup_cam+seam"])
def test_keys_depend_on_the_sections_of_all_methods_in_use_and_on_no_other(recipe: Recipe, name: str) -> None:
    recipe = replace(recipe, evaluate=EvaluateConfig(splits=("train",)))
    recipe = replace(recipe, train=replace(recipe.train, method=name))
    before = stage_keys(recipe)
    sections = {key: value for key, value in vars(recipe.train).items() if is_dataclass(value) and key != "optim"}
    assert set(name.split("+")) - {"cam"} <= set(sections)
    for key, section in sections.items():
        after = stage_keys(replace(recipe, train=replace(recipe.train, **{key: changed(section)})))
        assert (after["train"] != before["train"]) is (key in name.split("+")), key
        assert (after["cam"] != before["cam"]) is (key in name.split("+")), key


def test_an_addition_moves_the_key(recipe: Recipe) -> None:
    names = ["cam", "hide_and_seek", "mixup_cam", "seam", "seam+mixup_cam", "mixup_cam+hide_and_seek"]
    keys = {stage_keys(replace(recipe, train=replace(recipe.train, method=name)))["train"] for name in names}
    assert len(keys) == len(names)


def changed(section: Any) -> Any:
    """Another value for the first number of it."""
    values = {field.name: getattr(section, field.name) for field in fields(section)}
    name = next(name for name, value in values.items() if isinstance(value, int | float))
    return replace(section, **{name: values[name] + 1})
