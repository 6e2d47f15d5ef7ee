"""Adversarial erasing: what is found, erased and given up, in closed form; then an object of two parts."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from export.onnx_from_torch import onnx_from_graphs
from export.parity import check
from tests.training.methods.parts import START, backbone_for, batch, learnt, model_of
from training import cams, methods
from training.data import Batch
from training.graphs import ClassifierGraph, canvas_images
from training.losses import multilabel_soft_margin
from training.methods import erasing
from training.models import build_backbone
from training.models.classifier import ClassifierOutput
from training.models.erasing import LEAST, SURE, ErasingClassifier, found, some_left
from training.step import Moment
from weakseg.errors import ConfigError
from weakseg.recipe import ErasingConfig, TrainConfig


def moment(cycle: int, done: float = 0.99, steps: int = 3) -> Moment:
    """At a share of a cycle."""
    return Moment(0, 0, (cycle + done) / steps, cycle)


def losses(model: nn.Module, data: Batch, at: Moment) -> dict[str, Tensor]:
    return erasing.losses(model, data, at, set())


class Says(nn.Module):
    """A member with maps of its own choice; it remembers what it was shown and in which mode."""

    def __init__(self, maps: list[list[list[float]]]) -> None:
        super().__init__()
        self.maps, self.seen, self.modes = torch.tensor(maps), [], []  # type: ignore[var-annotated]

    def forward(self, images: Tensor) -> ClassifierOutput:
        self.seen.append(images)
        self.modes.append(self.training)
        cam = self.maps.expand(images.shape[0], -1, -1, -1)
        return ClassifierOutput(cam.mean(dim=(2, 3)), cam)


def model_that_says(*maps: list[list[list[float]]], hot: float = 0.8) -> ErasingClassifier:
    """maps: (C, h, w) of each step."""
    backbone = build_backbone(backbone_for("erasing"))
    model = ErasingClassifier(backbone, len(maps[0]), 0.0, len(maps), hot)
    for k, said in enumerate(maps):
        says = Says(said)
        says.backbone = model.members[k].backbone
        model.members[k] = says
    return learnt(model).eval()  # type: ignore[return-value]


# What is found -------------------------------------------------------------------------------------------------------


def test_found_is_what_reaches_a_share_of_a_present_classs_maximum() -> None:
    maps = torch.tensor([[[[10.0, 8.0], [7.75, 7.5]], [[0.0, 0.0], [0.0, 1.0]], [[2.0, 2.0], [2.0, 2.0]]]])
    tags = torch.tensor([[1.0, 0.0, 0.0]])
    torch.testing.assert_close(found(maps, tags, 0.8, 2, 2), torch.tensor([[[[1.0, 1.0], [0.5, 0.0]]]]))
    tags = torch.tensor([[1.0, 1.0, 0.0]])
    torch.testing.assert_close(found(maps, tags, 0.8, 2, 2), torch.tensor([[[[1.0, 1.0], [0.5, 1.0]]]]))
    assert (found(maps, torch.zeros(1, 3), 0.8, 2, 2) == 0).all()
    assert (found(torch.zeros(1, 3, 2, 2), torch.ones(1, 3), 0.8, 4, 4) == 0).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), hot=st.floats(0.1, 0.9), more=st.floats(0.0, 0.1), n=st.integers(1, 4))
def test_a_higher_share_finds_less_and_the_order_of_classes_does_not_matter(
    seed: int, hot: float, more: float, n: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps, tags = torch.rand(2, n, 3, 4, generator=generator), torch.randint(0, 2, (2, n), generator=generator).float()
    low, high = found(maps, tags, hot, 12, 16), found(maps, tags, hot + more, 12, 16)
    assert (high <= low).all() and (low >= 0).all() and (low <= 1).all()
    order = torch.randperm(n, generator=generator)
    assert torch.equal(found(maps[:, order], tags[:, order], hot, 12, 16), low)
    scaled = found(maps * 7, tags, hot, 12, 16)
    torch.testing.assert_close(scaled, low, atol=1e-3, rtol=0)


def test_nothing_left_is_every_pixel_of_the_image_erased() -> None:
    contrast, erased = torch.full((5, 3, 2, 2), -0.5), torch.ones(5, 1, 2, 2)
    contrast[:4, 1, 1] = -0.6  # the upper row of all is padding
    erased[1, 0, 1, 0], erased[2, 0, 0] = 0.99, 0
    erased[3:] = 0
    assert some_left(contrast, erased).tolist() == [0, 1, 0, 1, 1]
    assert some_left(contrast[4:], erased[:1]).tolist() == [0]


# What each step is shown ---------------------------------------------------------------------------------------------


def test_a_step_is_shown_the_mean_colour_where_all_earlier_ones_have_found_something() -> None:
    left, right = [[[4.0, 1.0], [4.0, 1.0]]], [[[0.0, 1.0], [0.0, 0.0]]]
    model = model_that_says(left, right, left)
    images, tags = torch.full((1, 3, 32, 32), 200.0), torch.ones(1, 1)
    erased = model(images, tags).erased[0, :, 0]
    assert (erased[0] == 0).all()
    assert (erased[1, :, :8] == 1).all() and (erased[1, :, 24:] == 0).all()
    assert (erased[2] >= erased[1]).all() and erased[2, 0, 31] == 1 and erased[2, 31, 31] == 0
    seen = model.members[2].seen[0]
    mean = model.backbone.mean[0, :, 0, 0]
    torch.testing.assert_close(seen[0, :, 0, 0], mean)
    torch.testing.assert_close(seen[0, :, 31, 31], images[0, :, 31, 31])
    for k in range(3):
        shown, some = model.shown(k, images, tags)
        torch.testing.assert_close(shown, model.members[k].seen[0])
        assert some.tolist() == [1]


def test_without_tags_the_first_steps_scores_say_what_is_there() -> None:
    there, absent = [[9.0, 0.0], [0.0, 0.0]], [[-9.0, -9.0], [-9.0, 1.0]]
    model = model_that_says([there, absent], [there, absent])
    images = torch.zeros(1, 3, 32, 32)
    by_scores, by_tags = (model(images, tags).erased for tags in (None, torch.tensor([[1.0, 0.0]])))
    torch.testing.assert_close(by_scores, by_tags, atol=0.01, rtol=0)
    assert by_scores[0, 1, 0, 0, 0] == 1 and by_scores[0, 1, 0, 31, 31] == 0
    assert model(images, torch.ones(1, 2)).erased[0, 1, 0, 31, 31] == 1


def test_earlier_steps_look_in_evaluation_mode_and_only_the_cycles_own_learns() -> None:
    config = TrainConfig(method="erasing", dropout=0.5)
    backbone = build_backbone(replace(backbone_for("erasing"), freeze_bn=False))
    model = methods.get("erasing").build(backbone, 3, config).train()
    learnt(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    losses(model, batch(), moment(1))["classification"].backward()
    moved = {key[:9] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {name for name in moved if name.startswith("members")} == {"members.1"}  # batch norm's statistics
    gradients = [any(p.grad is not None for p in member.parameters()) for member in model.members]
    assert gradients == [False, True, False]
    assert all(module.training for module in model.modules())


# Maps of all steps ---------------------------------------------------------------------------------------------------


def test_maps_of_later_steps_are_brought_to_the_height_of_the_first_ones() -> None:
    model = model_that_says([[[6.0, -1.0]]], [[[1.0, 2.0]]], [[[0.5 * LEAST, 0.0]]])
    out = model(torch.zeros(1, 3, 16, 32), torch.ones(1, 1))
    expected = torch.tensor([[[[6.0, 0.0]]], [[[3.0, 6.0]]], [[[3.0, 0.0]]]])
    torch.testing.assert_close(out.steps[0], expected)
    torch.testing.assert_close(out.cam[0], torch.tensor([[[6.0, 6.0]]]))
    assert out.logits.item() == 2.5


def test_what_the_first_step_does_not_find_is_found_by_none() -> None:
    model = model_that_says([[[-1.0, -2.0]]], [[[3.0, 5.0]]])
    assert (model(torch.zeros(1, 3, 16, 32), torch.ones(1, 1)).cam == 0).all()


def test_one_step_is_a_plain_classifier() -> None:
    config = TrainConfig(erasing=ErasingConfig(steps=1))
    plain, one = model_of("cam"), model_of("erasing", config=config)
    images = batch().images
    with torch.no_grad():
        expected, got = plain.eval()(images), one.eval()(images)
    assert torch.equal(got.logits, expected.logits) and torch.equal(got.cam, expected.cam.relu())


def test_steps_that_have_not_learnt_do_not_count() -> None:
    model = model_of("erasing").eval()
    with torch.no_grad():
        untrained, all_count = model(batch().images), learnt(model)(batch().images)
    assert (untrained.steps[:, 1:] == 0).all() and torch.equal(untrained.cam, untrained.steps[:, 0])
    assert (all_count.steps[:, 1:].amax(dim=(2, 3, 4)) > 0).all()
    assert torch.equal(all_count.steps[:, 0], untrained.steps[:, 0])


# When a class is given up --------------------------------------------------------------------------------------------

NEAR, FAR = 1.5 * SURE, 2.5 * SURE


@pytest.mark.parametrize(
    ("means", "kept"),
    [
        ((0.1, 0.1, 0.1), (1, 1, 1)),
        ((0.1, FAR, 0.1), (1, 0, 0)),  # lost once is lost for good
        ((0.1, NEAR, FAR), (1, 1, 0)),  # near to 0 in the first step does not count against later ones
        ((2.0, 3.9, 4.1), (1, 1, 0)),
        ((2.0, 4.0, 3.0), (1, 0, 0)),
    ],
)
def test_a_class_is_lost_where_its_loss_is_a_multiple_of_the_first_steps(
    means: tuple[float, ...], kept: tuple[int, ...]
) -> None:
    model = model_of("erasing", n_classes=2)
    for k, mean in enumerate(means):
        model.note(k, torch.tensor([3 * mean, 0.3]), torch.tensor([3.0, 3.0]))
    assert model.kept()[:, 0].tolist() == list(kept) and model.kept()[:, 1].tolist() == [1, 1, 1]
    assert [model.learning(k)[0].item() for k in range(3)] == [1, *kept[:2]]


def test_a_class_that_was_lost_is_neither_learnt_nor_erased() -> None:
    model = model_that_says(
        [[[4.0, 0, 0]], [[0, 1.0, 0]]], [[[0, 0, 9.0]], [[0, 1.0, 0]]], [[[1.0, 1, 1]], [[2.0, 2, 2]]]
    )
    model.note(1, torch.tensor([9.0, 0.0]), torch.zeros(2))
    data = Batch(torch.zeros(1, 3, 16, 48), torch.ones(1, 2), None, ["one"])
    logits = torch.tensor([[1.0, 2.0]])
    torch.testing.assert_close(
        losses(model, data, moment(2))["classification"],
        nn.functional.softplus(-logits[:, 1]).sum() / 2,
    )
    erased = model(data.images, data.tags).erased[0, :, 0]
    assert erased[1, 8].amax() == 1 and torch.equal(erased[2], erased[1]), "the third cell is of the lost class alone"
    assert (model(data.images, data.tags).steps[0, 1:, 0] == 0).all()


def test_losses_of_present_classes_are_noted_late_ones_most() -> None:
    model = model_that_says([[[1.0]], [[-2.0]]], [[[0.0]], [[0.0]]])
    data = Batch(torch.zeros(2, 3, 16, 16), torch.tensor([[1.0, 0.0], [1.0, 1.0]]), None, ["one", "other"])
    model.loss_weights.zero_()
    for done in (0.5, 1.0):
        losses(model, data, moment(0, done, steps=2))
    late = 0.5**4 + 1
    torch.testing.assert_close(model.loss_weights, torch.tensor([[2 * late, late], [0, 0]]))
    own = nn.functional.softplus(torch.tensor([-1.0, 2.0]))
    torch.testing.assert_close(model.loss_sums[0] / model.loss_weights[0], own)


def test_the_first_cycle_is_plain_classification() -> None:
    model, data = model_of("erasing", config=TrainConfig(dropout=0.0)), batch()
    expected = multilabel_soft_margin(model.members[0](data.images).logits, data.tags)
    torch.testing.assert_close(losses(model, data, START)["classification"], expected)


# Nothing left --------------------------------------------------------------------------------------------------------


def finds_the_left_half() -> ErasingClassifier:
    """Of two steps, in training mode."""
    model = model_of("erasing", n_classes=1, config=TrainConfig(dropout=0.0, erasing=ErasingConfig(steps=2)))
    says = Says([[[1.0, 0.0], [1.0, 0.0]]])
    says.backbone = model.members[0].backbone
    model.members[0] = says
    return learnt(model)  # type: ignore[return-value]


def padded(model: ErasingClassifier, ids: list[str]) -> Batch:
    """Crops of images that are 8 pixels wide, as `crop` pads them."""
    data = batch(1, 32, [(0,)] * len(ids))
    data.images[:, :, :, 8:] = torch.tensor(model.backbone.mean_colour, dtype=torch.uint8)[:, None, None]
    return data._replace(ids=ids)


def test_an_image_of_which_nothing_is_left_is_harmless_and_told_of() -> None:
    """All of the image is found, and what pads it is not."""
    model = finds_the_left_half()
    data, noted = padded(model, ["one", "other"]), model.loss_sums.clone()
    with pytest.warns(UserWarning, match=r"no pixels of crops of 2 images \(one, other\), from which"):
        loss = losses(model, data, moment(1, steps=2))["classification"]
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.members[1].parameters() if p.grad is not None)
    assert torch.equal(model.loss_sums, noted)
    with torch.no_grad():
        out = model.eval()(data.images, data.tags)
    assert torch.equal(out.cam, out.steps[:, 0]) and (out.steps[:, 1] == 0).all()


def test_a_crop_with_image_beside_what_is_found_teaches() -> None:
    model = finds_the_left_half()
    data = padded(model, ["one", "other"])
    data.images[1, 0, 31, 31] = 255
    with pytest.warns(UserWarning, match=r"no pixels of crops of 1 images \(one\)"):
        loss = losses(model, data, moment(1, steps=2))["classification"]
    shown, left = model.shown(1, data.images, data.tags)
    assert left.tolist() == [0, 1]
    expected = nn.functional.softplus(-model.members[1](shown[1:]).logits).sum() / 2
    torch.testing.assert_close(loss, expected)


def test_canvas_beside_an_image_is_padding() -> None:
    """In a graph, which pads with the mean itself."""
    model = finds_the_left_half()
    canvas = canvas_images(torch.full((1, 32, 8, 3), 255), model.backbone.mean, 32)
    assert canvas.shape == (1, 3, 32, 32) and model.shown(1, canvas, torch.ones(1, 1))[1].tolist() == [0]


def test_it_is_told_at_one_image_and_at_twice_as_many() -> None:
    model, told = finds_the_left_half(), []
    step = erasing.losses_of(TrainConfig())
    for i in range(8):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):  # an image counts once
                step(model, padded(model, [str(i)]), moment(1, steps=2))
        told += [str(one.message).partition(")")[0] for one in caught]
    assert [one.partition("crops of ")[2] for one in told] == [
        "1 images (0",
        "2 images (0, 1",
        "4 images (0, 1, 2, 3",
        "8 images (0, 1, 2, 3, 4, …",
    ]


def test_images_without_tags_are_shown_as_they_are() -> None:
    model, data = learnt(model_of("erasing")), batch(tags=[(), ()])
    shown, left = model.shown(2, data.images, data.tags)
    assert torch.equal(shown, data.images.float()) and left.tolist() == [1, 1]


# Settings and export -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"hot": 0.0}, r"hot must lie in \(0.05, 1\], got 0"),
        ({"hot": 1.1}, r"hot must lie in \(0.05, 1\], got 1.1"),
        ({"stop": 1.0}, "stop must be above 1, got 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.erasing\.{message}"):
        model_of("erasing", config=TrainConfig(erasing=ErasingConfig(**wrong)))  # type: ignore[arg-type]


def test_maps_of_all_steps_are_the_same_in_onnx(tmp_path: Path) -> None:
    model = learnt(model_of("erasing", config=TrainConfig(erasing=ErasingConfig(steps=2)))).eval()
    graph = ClassifierGraph(model, cams.get("cam")).eval()
    path = tmp_path / "erasing.onnx"
    path.write_bytes(onnx_from_graphs({"maps": graph})["maps"])
    rng = np.random.default_rng(0)
    photographs = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((48, 64), (75, 50))]
    assert all(difference.ok for difference in check("maps", graph, path, photographs).differences)
    with torch.no_grad():
        assert model(torch.from_numpy(photographs[0][None]).permute(0, 3, 1, 2)).erased[:, 1].max() > 0


# What it is for ------------------------------------------------------------------------------------------------------


class Colours(nn.Module):
    """A backbone of two channels, how red and how green cells of 4 x 4 pixels are; red is seen better."""

    channels, strides = (2,), (4,)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 100.0))

    def forward(self, images: Tensor) -> list[Tensor]:
        colours = nn.functional.avg_pool2d((images - self.mean).relu()[:, :2] / 155, 4)
        return [colours * torch.tensor([8.0, 2.0])[:, None, None]]


def test_an_object_of_two_parts_is_found_whole_and_then_no_more() -> None:
    """Class 0 has a red part and a green one, of which red tells it best; class 1 is in other images and not seen."""
    images = torch.full((12, 3, 32, 32), 100.0)
    images[:, 2] = 150  # blue, which the backbone does not see: something is left of the third step's images
    images[:4, 0, :, 8:16], images[:4, 1, :, 16:24] = 255, 255
    tags = torch.zeros(12, 2)
    tags[:4, 0], tags[8:, 1] = 1, 1
    data = Batch(images, tags, None, [str(i) for i in range(12)])
    model = ErasingClassifier(Colours(), 2, 0.0, hot=0.5).train()  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    for cycle in range(3):
        for i in range(30):
            optimizer.zero_grad(set_to_none=True)
            losses(model, data, moment(cycle, i / 30))["classification"].backward()
            optimizer.step()
    with torch.no_grad():
        out = model.eval()(images[:1], tags[:1])
    first, second, third = out.steps[0, :, 0] / out.steps[0, 0, 0].max()
    assert (first[:, 2:4] > 0.9).all() and (first[:, 4:6] < 0.5).all()
    assert (second[:, 4:6] > 0.9).all() and (second[:, 2:4] < 0.1).all()
    assert (third == 0).all() and model.kept()[:, 0].tolist() == [1, 1, 0]
    assert ((out.cam[0, 0] > 0.8 * out.cam[0, 0].max()).nonzero()[:, 1].unique()).tolist() == [2, 3, 4, 5]
