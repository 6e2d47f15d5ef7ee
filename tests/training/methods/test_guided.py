"""Guided labelling: the rules on drawn components, one by one, then what is written of a dataset."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.training.methods.parts import START, batch, losses_of, model_of, with_method
from training.data import UNLABELLED
from training.methods import guided
from training.methods.guided import components, divide, g0, g1, g2, guide, labels_of, optim_of, seeds_of, start
from training.models import build_backbone, load_model
from training.models.pixel_classifier import PixelClassifier
from weakseg.cam_file import CamFile
from weakseg.classes import BACKGROUND, IGNORE, IGNORE_U16
from weakseg.datasets import read
from weakseg.errors import ConfigError
from weakseg.masks.png import provenance_of
from weakseg.progress import Progress
from weakseg.recipe import GuidedConfig, OptimConfig, Recipe, SaliencyConfig, TrainConfig

QUIET = Progress("silent")
CAT, DOG = 2, 5  # mask values of classes 1 and 4
VALUES = np.array([CAT, DOG], np.uint8)
HEIGHT, WIDTH = 32, 48
LEFT, RIGHT = np.s_[4:20, 4:20], np.s_[8:28, 28:44]  # two things
GREY, RED, BLUE = (120, 120, 120), (200, 40, 40), (40, 40, 200)


def plane(dtype: type = np.float32, **parts: object) -> NDArray[np.generic]:
    out = np.zeros((HEIGHT, WIDTH), dtype)
    for name, value in parts.items():
        out[{"left": LEFT, "right": RIGHT}[name]] = value
    return out


def two_things() -> tuple[NDArray[np.int32], int]:
    return components(plane(left=1, right=1), 0.5, 0.01)


def seeds(*where: tuple[object, int]) -> NDArray[np.uint8]:
    out = np.zeros((HEIGHT, WIDTH), np.uint8)
    for place, value in where:
        out[place] = value
    return out


def picture() -> NDArray[np.uint8]:
    return np.full((HEIGHT, WIDTH, 3), GREY, np.uint8)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Components -----------------------------------------------------------------------------------------------------------


def test_components_are_numbered_and_small_ones_dropped() -> None:
    salient = plane(left=0.5, right=0.9)
    salient[0, 30:44] = 1  # 14 of 1536 pixels
    salient[22:26, 0:4] = 0.49
    regions, n = components(salient, 0.5, 0.01)
    assert n == 2 and set(np.unique(regions)) == {0, 1, 2}
    assert np.array_equal(regions > 0, plane(left=1, right=1) > 0) and regions[LEFT].min() == regions[LEFT].max() == 1
    assert components(salient, 0.5, 14 / 1536)[1] == 3
    assert components(salient, 0.95, 0.01)[1] == 0


def test_corners_join() -> None:
    regions, n = components(np.eye(10, dtype=np.float32), 0.5, 0.0)
    assert n == 1 and np.array_equal(regions, np.eye(10))


# Seeds ----------------------------------------------------------------------------------------------------------------


def test_a_pixel_is_the_strongest_classs_if_that_is_strong_for_it() -> None:
    cam = np.array([[[1.0, 0.6, 0.15, 0.0, 0.0]], [[0.0, 0.7, 0.1, 0.2, 0.0]]], np.float32)
    assert seeds_of(cam, VALUES, 0.2).tolist() == [[CAT, DOG, 0, DOG, 0]]
    assert seeds_of(cam, VALUES, 1.0).tolist() == [[CAT, DOG, 0, 0, 0]]
    assert seeds_of(np.zeros((2, 1, 3), np.float32), VALUES, 0.2).tolist() == [[0, 0, 0]]


# Rule G0 --------------------------------------------------------------------------------------------------------------


def test_g0_draws_a_present_class_for_each_component() -> None:
    regions, n = two_things()
    drawn = {(int(out[4, 4]), int(out[8, 28])) for out in (g0(regions, n, VALUES, rng(i)) for i in range(40))}
    assert drawn == {(CAT, CAT), (CAT, DOG), (DOG, CAT), (DOG, DOG)}
    out = g0(regions, n, VALUES, rng())
    assert out.dtype == np.uint8 and (out[regions == 0] == BACKGROUND).all()
    assert np.array_equal(out, g0(regions, n, VALUES, rng()))


# Rule G1 --------------------------------------------------------------------------------------------------------------


def test_g1_gives_a_component_the_class_that_is_seen_in_it() -> None:
    regions, n = two_things()
    maps = np.stack([plane(left=0.2, right=3.0), plane(left=0.1)])
    maps[1, 8:10, 28:30] = 50  # 4 of 320 pixels: a mean of 0.6
    maps[1, 0] = 1000  # not in a component
    out = g1(regions, n, maps, VALUES)
    assert (out[LEFT] == CAT).all() and (out[RIGHT] == CAT).all() and (out[regions == 0] == BACKGROUND).all()
    maps[1, 8:20, 28:30] = 50  # 24 pixels: 3.75
    assert (g1(regions, n, maps, VALUES)[RIGHT] == DOG).all()


# Rule G2 --------------------------------------------------------------------------------------------------------------


def test_g2_a_component_with_seeds_of_one_class_is_that_class() -> None:
    regions, n = two_things()
    out = g2(picture(), regions, n, seeds((np.s_[6, 6], CAT), (np.s_[9:12, 30:34], DOG)), VALUES)
    assert np.array_equal(out, plane(np.uint8, left=CAT, right=DOG))


def test_g2_one_without_seeds_is_background() -> None:
    regions, n = two_things()
    assert np.array_equal(g2(picture(), regions, n, seeds((np.s_[6, 6], CAT)), VALUES), plane(np.uint8, left=CAT))


def test_g2_seeds_beside_all_components_keep_their_class() -> None:
    regions, n = two_things()
    beside = np.s_[24:28, 4:8]
    out = g2(picture(), regions, n, seeds((np.s_[6, 6], CAT), (beside, CAT)), VALUES)
    expected = plane(np.uint8, left=CAT)
    expected[beside] = CAT
    assert np.array_equal(out, expected)


def test_g2_seeds_that_reach_out_of_a_component_end_there() -> None:
    regions, n = two_things()
    out = g2(picture(), regions, n, seeds((np.s_[10:12, 15:26], CAT)), VALUES)
    assert np.array_equal(out, plane(np.uint8, left=CAT))


def test_g2_seeds_of_several_classes_divide_a_component_along_the_edges_of_the_image() -> None:
    image = picture()
    image[RIGHT] = RED
    image[8:28, 38:44] = BLUE
    regions, n = two_things()
    found = seeds((np.s_[14:20, 30:33], CAT), (np.s_[14:20, 41:43], DOG), (np.s_[6:9, 6:9], CAT))
    out = g2(image, regions, n, found, VALUES)
    expected = plane(np.uint8, left=CAT, right=CAT)
    expected[8:28, 38:44] = DOG
    assert np.array_equal(out, expected)


def test_g2_a_class_with_seeds_elsewhere_takes_no_part() -> None:
    """Blue is a third class in the thing on the left; the blue part of the other has none of its seeds."""
    image = picture()
    image[RIGHT] = RED
    image[8:28, 38:44] = image[LEFT] = BLUE
    regions, n = two_things()
    found = seeds((np.s_[14:20, 30:33], CAT), (np.s_[14:20, 41:43], DOG), (np.s_[5:19, 5:19], 7))
    out = g2(image, regions, n, found, np.array([CAT, DOG, 7], np.uint8))
    expected = plane(np.uint8, left=7, right=CAT)
    expected[8:28, 38:44] = DOG
    assert np.array_equal(out, expected)


def test_g2_components_of_the_same_classes_are_divided_together(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(guided, "divide", lambda *args: calls.append(args[2].tolist()) or divide(*args))
    image = picture()
    image[:16], image[16:] = RED, BLUE
    regions, n = two_things()
    spots = [
        (np.s_[6:10, 6:10], CAT),
        (np.s_[17:19, 6:18], DOG),
        (np.s_[10:13, 30:40], CAT),
        (np.s_[22:26, 30:40], DOG),
    ]
    out = g2(image, regions, n, seeds(*spots), VALUES)
    expected = np.where(regions > 0, CAT, BACKGROUND)
    expected[16:][regions[16:] > 0] = DOG
    assert calls == [[CAT, DOG]] and np.array_equal(out, expected)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), share=st.floats(0, 0.3))
def test_g2_components_have_their_seeds_classes_and_all_else_is_background(seed: int, share: float) -> None:
    generator = rng(seed)
    found = np.zeros((12, 16), np.uint8)
    found[generator.random(found.shape) < share] = CAT
    found[generator.random(found.shape) < share / 2] = DOG
    regions, n = components(generator.random((12, 16), np.float32), 0.7, 0.02)
    image = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    before = found.copy(), regions.copy(), image.copy()
    out = g2(image, regions, n, found, VALUES)
    for i in range(1, n + 1):
        own = set(np.unique(found[regions == i])) - {BACKGROUND}
        assert set(np.unique(out[regions == i])) <= (own or {BACKGROUND})
    outside = regions == 0
    assert ((out == found) | (out == BACKGROUND))[outside].all()
    for array, old in zip((found, regions, image), before, strict=True):
        assert np.array_equal(array, old)


def test_blurred_seeds_win_where_the_image_says_nothing() -> None:
    out = divide(picture(), seeds((np.s_[:, :8], CAT), (np.s_[:, 40:], DOG)), VALUES)
    assert (out[:, :16] == CAT).all() and (out[:, 32:] == DOG).all()


# An image -------------------------------------------------------------------------------------------------------------


def cam_file(*maps: NDArray[np.generic], classes: tuple[int, ...] = (1, 4)) -> CamFile:
    """Of maps at the image's size: one value of each 4 x 4 pixels."""
    cells = np.stack([one[2::4, 2::4] for one in maps]) if maps else np.zeros((0, HEIGHT // 4, WIDTH // 4))
    scores = np.zeros(6, np.float32)
    return CamFile(np.array(classes, np.int32), cells.astype(np.float16), HEIGHT, WIDTH, scores)


def made(cam: CamFile, salient: object, rule: str = "g2", n_classes: int = 6) -> NDArray[np.generic]:
    return guide(picture(), cam, salient, n_classes, GuidedConfig(rule=rule), rng())  # type: ignore[arg-type]


RULES = pytest.mark.parametrize("rule", ["g0", "g1", "g2"])


@RULES
def test_one_class_fills_what_is_salient(rule: str) -> None:
    out = made(cam_file(plane(left=3.0), classes=(1,)), plane(left=0.8), rule)
    assert out.dtype == np.uint8 and np.array_equal(out, plane(np.uint8, left=CAT))


@pytest.mark.parametrize("rule", ["g1", "g2"])
def test_two_things_of_two_classes(rule: str) -> None:
    cam = cam_file(plane(left=3.0), plane(right=0.4))
    assert np.array_equal(made(cam, plane(left=0.9, right=0.9), rule), plane(np.uint8, left=CAT, right=DOG))


@RULES
def test_where_nothing_is_salient_seeds_alone_are_left(rule: str) -> None:
    out = made(cam_file(plane(left=3.0), plane()), plane(), rule)
    expected = seeds_of(cam_file(plane(left=3.0)).cam01(), VALUES[:1], 0.2) if rule == "g2" else plane(np.uint8)
    assert np.array_equal(out, expected) and (out == CAT).any() == (rule == "g2")


@RULES
def test_everything_may_be_salient(rule: str) -> None:
    assert (made(cam_file(plane(left=3.0), classes=(1,)), plane() + 1, rule) == CAT).all()


@RULES
def test_without_tags_all_is_background(rule: str) -> None:
    for salient in (plane(left=1), None):
        assert (made(cam_file(classes=()), salient, rule) == BACKGROUND).all()


@RULES
def test_without_a_saliency_map_nothing_is_background(rule: str) -> None:
    out = made(cam_file(plane(left=3.0), plane()), None, rule)
    assert set(np.unique(out)) == ({IGNORE, CAT} if rule == "g2" else {IGNORE})
    wide = made(cam_file(plane(left=3.0), plane()), None, rule, n_classes=300)
    assert wide.dtype == np.uint16 and wide.max() == IGNORE_U16


# A dataset ------------------------------------------------------------------------------------------------------------


def of_rule(recipe: Recipe, rule: str, **settings: object) -> Recipe:
    recipe = with_method(recipe, "guided")
    section = replace(recipe.train.guided, rule=rule, **settings)
    return replace(recipe, train=replace(recipe.train, guided=section))


@RULES
def test_label_maps_of_a_dataset_go_on_where_they_stopped(
    rule: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = of_rule(recipe, rule)
    dataset = read(recipe.data, "train")
    labels = labels_of(recipe, dataset, tmp_path, QUIET)
    for sample in dataset:
        values = labels(sample)
        assert values.shape == (48, 64) and set(np.unique(values)) <= {BACKGROUND, *(c + 1 for c in sample.tags)}
        assert (values != BACKGROUND).any() == bool(sample.tags)
    files = {path: path.read_bytes() for path in sorted(tmp_path.glob("guides/train/*.png"))}
    assert [path.stem for path in files] == [sample.id for sample in dataset]
    provenance = provenance_of(files[tmp_path / "guides/train/000.png"])
    assert provenance["mask"] == "guide" and provenance["rule"] == rule
    (tmp_path / "guides/train/001.png").unlink()
    written = []
    write = guided.write_bytes_atomic
    monkeypatch.setattr(guided, "write_bytes_atomic", lambda path, data: written.append(path.name) or write(path, data))
    labels_of(recipe, dataset, tmp_path, QUIET)
    assert written == ["001.png"] and {path: path.read_bytes() for path in files} == files


def test_saliency_is_looked_at_before_the_training(recipe: Recipe, tmp_path: Path) -> None:
    recipe = of_rule(recipe, "g2", saliency=SaliencyConfig(folder=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match="got no such folder"):
        labels_of(recipe, read(recipe.data, "train"), tmp_path / "stage", QUIET)
    assert not (tmp_path / "stage").exists()


@pytest.mark.parametrize("setting", [{"seed": 0.0}, {"salient": 0.0}, {"salient": 1.5}, {"smallest": 1.0}])
def test_settings_that_make_no_sense_are_refused(setting: dict[str, float], recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train.guided: expected seed and salient in"):
        labels_of(of_rule(recipe, "g2", **setting), read(recipe.data, "train"), tmp_path, QUIET)


# The network ----------------------------------------------------------------------------------------------------------


def test_cells_learn_the_label_at_their_centre_and_both_sides_weigh_the_same() -> None:
    model, data = model_of("guided", config=TrainConfig(dropout=0.0)), batch(tags=[(0,), (1, 2)])
    labels = torch.zeros(2, 64, 64, dtype=torch.int64)
    labels[:, :16, :16], labels[:, 16:32], labels[1] = 3, UNLABELLED, UNLABELLED
    loss = losses_of("guided")(model, data._replace(labels=labels), START)["segmentation"]
    log = model(data.images).scores.log_softmax(dim=1)[0]
    background = torch.cat([log[0, 0, 1:], log[0, 2:].flatten()]).mean()
    torch.testing.assert_close(loss, -(background + log[3, 0, 0]) / 2)


def test_the_budget_is_shared_and_the_backbone_is_the_classifiers(recipe: Recipe, tmp_path: Path) -> None:
    assert optim_of(TrainConfig(optim=OptimConfig(epochs=10), guided=GuidedConfig(seeds_share=0.3))).epochs == 7
    recipe = of_rule(recipe, "g1")
    labels_of(recipe, read(recipe.data, "train"), tmp_path, QUIET)
    model = PixelClassifier(build_backbone(recipe.backbone), 3)
    start(model, tmp_path)
    classifier, _ = load_model(tmp_path / "seeds/classifier.pt", kind="classifier")
    for key, value in classifier.backbone.state_dict().items():
        assert torch.equal(value, model.backbone.state_dict()[key]), key
