"""Mixup-CAM: what is mixed and in which shares, both losses in closed form, hooks; then specks that are given up."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from tests.training.conftest import write_squares
from tests.training.methods.parts import START, batch, losses_of, model_of, total, with_method
from training import distributed, methods, train_classifier
from training.data import Batch
from training.losses import multilabel_soft_margin
from training.methods.mixup_cam import LEAST, LEAST_ALPHA, around, concentration, draw_shares, entropy, mixed
from training.models import CamClassifier
from training.randomness import seed_torch
from training.step import Moment
from weakseg.errors import ConfigError
from weakseg.progress import Progress
from weakseg.recipe import MixupCamConfig, OptimConfig, Recipe, TrainConfig


def config(method: str = "mixup_cam", **settings: object) -> TrainConfig:
    return TrainConfig(method=method, dropout=0.0, mixup_cam=MixupCamConfig(**settings))  # type: ignore[arg-type]


# Shares ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_shares_are_of_a_beta_distribution(alpha: float) -> None:
    """At points of its distribution function, within four sigma each; float32 rounds 1.6 % of alpha 0.2 to 1."""
    torch.manual_seed(0)
    n, points = 20_000, np.array([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    shares = draw_shares(n, alpha)
    assert shares.dtype == torch.float32 and shares.min() >= 0 and shares.max() <= 1
    expected = stats.beta(alpha, alpha).cdf(points)
    below = (shares.numpy()[:, None] <= points).mean(axis=0)
    assert (np.abs(below - expected) <= 4 * np.sqrt(expected * (1 - expected) / n)).all()


def test_the_smallest_alpha_mixes_next_to_nothing() -> None:
    """What is smaller is refused: its shares would become halves."""
    torch.manual_seed(0)
    shares = draw_shares(5000, LEAST_ALPHA)
    assert float(torch.minimum(shares, 1 - shares).mean()) < 0.01
    assert not (shares == 0.5).any()


# What is mixed --------------------------------------------------------------------------------------------------------


def test_images_and_tags_are_mixed_with_the_one_before_by_a_share_each() -> None:
    data = batch(tags=[(0,), (1, 2), ()])
    before = data.images.clone(), data.tags.clone()
    out = mixed(data, torch.tensor([1.0, 0.25, 0.6]))
    images = data.images.float()
    assert torch.equal(out.images[0], images[0])
    torch.testing.assert_close(out.images[1], 0.25 * images[1] + 0.75 * images[0])
    torch.testing.assert_close(out.images[2], 0.6 * images[2] + 0.4 * images[1])
    torch.testing.assert_close(out.tags, torch.tensor([[1.0, 0.0, 0.0], [0.75, 0.25, 0.25], [0.0, 0.4, 0.4]]))
    assert torch.equal(data.images, before[0]) and torch.equal(data.tags, before[1])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), n=st.integers(1, 6))
def test_what_is_mixed_lies_between_and_one_image_stays_itself(seed: int, n: int) -> None:
    data = batch(2, 16, [(i % 2,) for i in range(n)], seed=seed)
    torch.manual_seed(seed)
    out, images = mixed(data, draw_shares(n, 1.0)), data.images.float()
    for mix, one in ((out.images, images), (out.tags, data.tags)):
        other = one.roll(1, dims=0)
        assert (mix >= torch.minimum(one, other) - 1e-4).all() and (mix <= torch.maximum(one, other) + 1e-4).all()
    if n == 1:
        assert torch.equal(out.images, images) and torch.equal(out.tags, data.tags)


def test_losses_are_those_of_the_mixed_batch() -> None:
    model, data = model_of("cam", config=config()), batch(tags=[(0,), (1, 2), (1,)])
    seed_torch(0, 1)
    parts = losses_of("mixup_cam", config())(model, data, START)
    seed_torch(0, 1)
    made = mixed(data, draw_shares(3, 0.2))
    out = model(made.images)
    torch.testing.assert_close(parts["classification"], multilabel_soft_margin(out.logits, made.tags))
    expected = {"entropy": 0.02 * entropy(out.cam), "concentration": 0.5 * concentration(out.cam, made.tags)}
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value, atol=0, rtol=1e-5)


@pytest.mark.parametrize("left_out", [{"entropy"}, {"concentration"}, {"entropy", "concentration"}])
def test_a_weight_of_zero_leaves_a_loss_out(left_out: set[str]) -> None:
    train = config(**dict.fromkeys(left_out, 0.0))
    parts = losses_of("mixup_cam", train)(model_of("cam"), batch(), START)
    assert set(parts) == {"classification", "entropy", "concentration"} - left_out


# Entropy --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [1, 2, 20])
def test_alike_classes_have_the_most_of_it_and_one_that_stands_out_none(n_classes: int) -> None:
    scores = torch.full((2, n_classes, 3, 4), -7.0)
    assert float(entropy(scores)) == pytest.approx(math.log(n_classes), abs=1e-5)
    scores[:, 0] = 200.0
    assert float(entropy(scores)) == pytest.approx(0, abs=1e-6)


def test_entropy_of_a_cell_in_closed_form() -> None:
    scores = torch.tensor([1 / 2, 1 / 4, 1 / 4]).log().add(3.0).view(1, 3, 1, 1)
    certain = torch.tensor([500.0, 0.0, 0.0]).view(1, 3, 1, 1)
    assert float(entropy(scores)) == pytest.approx(1.5 * math.log(2), abs=1e-6)
    assert float(entropy(torch.cat([scores, certain], dim=3))) == pytest.approx(0.75 * math.log(2), abs=1e-6)


# Concentration --------------------------------------------------------------------------------------------------------


def maps_of(*points: tuple[int, int], size: tuple[int, int] = (8, 8), height: float = 500.0) -> Tensor:
    """(1, 1, h, w): `height` at the points, below 0 elsewhere."""
    maps = torch.full((1, 1, *size), -3.0)
    for row, column in points:
        maps[..., row, column] = height
    return maps


ONE = torch.ones(1, 1)


@pytest.mark.parametrize("point", [(0, 0), (3, 5), (7, 7)])
def test_of_a_point_it_is_nothing(point: tuple[int, int]) -> None:
    assert float(concentration(maps_of(point), ONE)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("size", [(8, 8), (8, 20), (32, 4)])
def test_of_two_points_half_an_image_apart(size: tuple[int, int]) -> None:
    """A quarter from their centre each, so 1/16, at any size; of a diagonal twice that."""
    height, width = size
    for points, expected in (
        ([(0, 1), (height // 2, 1)], 1 / 16),
        ([(2, width // 2), (2, 0)], 1 / 16),
        ([(0, 0), (height // 2, width // 2)], 2 / 16),
    ):
        assert float(concentration(maps_of(*points, size=size), ONE)) == pytest.approx(expected, abs=1e-6)


def test_points_count_by_their_height() -> None:
    """Shares 3/4 and 1/4, half an image apart: 3/16 of 1/4."""
    maps = maps_of((0, 0), (4, 0))
    maps[..., 0, 0] *= 3
    assert float(concentration(maps, ONE)) == pytest.approx(3 / 64, abs=1e-6)


def test_a_constant_map_is_as_spread_as_a_square() -> None:
    assert float(concentration(torch.full((1, 1, 200, 300), 5.0), ONE)) == pytest.approx(2 / 12, abs=1e-4)


def test_present_classes_add_up_and_others_do_not_count() -> None:
    apart = maps_of((0, 0), (4, 0))
    maps = torch.cat([apart, apart, maps_of((1, 1)), torch.full_like(apart, -1.0), apart], dim=1)
    for tags, expected in (
        ([1.0, 0.0, 1.0, 1.0, 0.0], 1 / 16),
        ([1.0, 0.3, 0.0, 0.0, 1e-6], 3 / 16),  # shares are present, whatever they are
        ([0.0] * 5, 0.0),
    ):
        assert float(concentration(maps, torch.tensor([tags]))) == pytest.approx(expected, abs=1e-6)
    both = torch.cat([maps, maps]), torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0], [0.0] * 5])
    assert float(concentration(*both)) == pytest.approx(1 / 16, abs=1e-6)  # the mean over images


def test_a_map_that_barely_answers_counts_as_much_less() -> None:
    for mean in (2.0, 1.0, 0.5, 1e-3, 0.0):
        maps = maps_of((0, 0), (4, 0), height=mean * LEAST * 32)
        assert float(concentration(maps, ONE)) == pytest.approx(min(1.0, mean) / 16, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), rows=st.integers(1, 9), columns=st.integers(1, 9), scale=st.floats(1, 100))
def test_it_knows_neither_height_nor_orientation_and_is_bounded(
    seed: int, rows: int, columns: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = 20 * torch.rand(2, 3, rows, columns, generator=generator) + 1  # so that all answer
    tags = torch.randint(0, 2, (2, 3), generator=generator).float()
    value = concentration(maps, tags)
    assert 0 <= value <= tags.sum(dim=1).mean() / 2
    for other in (scale * maps, maps.flip(2), maps.flip(3), maps.transpose(2, 3)):
        torch.testing.assert_close(concentration(other, tags), value, atol=1e-5, rtol=1e-4)


def test_gradients_pull_together_and_are_bounded_where_a_map_barely_answers() -> None:
    """Far cells down, near ones up; no map gains by being weaker as a whole."""
    for height in (100.0, 1e-4):
        maps = (height * torch.ones(1, 2, 8, 8)).requires_grad_()
        concentration(maps, torch.tensor([[1.0, 0.0]])).backward()
        assert maps.grad is not None
        gradient = maps.grad[0]
        assert (gradient[1] == 0).all()
        assert gradient[0, 0, 0] > 0 > gradient[0, 3, 3]
        assert float(gradient.sum()) == pytest.approx(0, abs=1e-6)
        assert gradient.abs().max() <= 0.5 / (64 * LEAST)
    nothing = torch.full((1, 1, 4, 4), -1.0, requires_grad=True)
    concentration(nothing, ONE).backward()
    assert nothing.grad is not None and (nothing.grad == 0).all()


def test_both_losses_teach_the_whole_network() -> None:
    model = model_of("cam", config=config())
    out = model(batch().images)
    for loss in (entropy(out.cam), concentration(out.cam, batch().tags)):
        model.zero_grad()
        loss.backward(retain_graph=True)
        assert model.head.weight.grad.abs().sum() > 0
        assert model.backbone.stage1[0].weight.grad.abs().sum() > 0


# Hooks ----------------------------------------------------------------------------------------------------------------


def test_they_look_at_the_first_pass_and_cost_none() -> None:
    model, data = model_of("cam", config=config()), batch()
    maps: list[Tensor] = []
    model.head.register_forward_hook(lambda _model, _inputs, output: maps.append(output))

    def twice(model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        return {"sum": model(batch.images).logits.sum() + model(batch.images / 2).logits.sum()}

    parts = around(twice, config(entropy=1.0))(model, data, START)
    assert len(maps) == 2
    assert torch.equal(parts["entropy"], entropy(maps[0]))
    assert not torch.equal(parts["entropy"], entropy(maps[1]))


def test_they_are_gone_whatever_is_raised() -> None:
    def broken(model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        model(batch.images)
        assert len(model._forward_hooks) == 1
        raise KeyboardInterrupt

    model = model_of("cam")
    with pytest.raises(KeyboardInterrupt):
        around(broken, config())(model, batch(), START)
    assert not model._forward_hooks
    losses_of("mixup_cam")(model, batch(), START)
    assert not model._forward_hooks


def test_a_method_without_a_forward_pass_is_named() -> None:
    with pytest.raises(ConfigError, match="in training there is none with train.method mixup_cam: leave mixup_cam out"):
        around(lambda model, batch, moment: {}, config())(model_of("cam"), batch(), START)


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.001}, "train.mixup_cam.alpha must be at least 0.01, got 0.001: the paper has 0.2"),
        ({"entropy": -1.0}, "expected weights of at least 0, got entropy -1 and concentration 0.5"),
        ({"concentration": -0.5}, "expected weights of at least 0, got entropy 0.02 and concentration -0.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        losses_of("mixup_cam", config(**settings))


@pytest.mark.parametrize("method", ["mixup_cam", "seam+mixup_cam"])
@pytest.mark.parametrize(
    ("batch_size", "processes", "n_images", "message"),
    [
        (1, 1, 9, "of 1 processes, got train.optim.batch_size 1: raise it"),
        (2, 2, 9, "of 2 processes, got train.optim.batch_size 2: raise it"),
        (1, 1, 1, "of 1 processes, got train.optim.batch_size 1: raise it"),
        (16, 1, 1, "of 1 processes, got 1 training images: add some"),
        (16, 2, 3, "of 2 processes, got 3 training images: add some"),
        (2, 1, 2, None),
        (4, 2, 9, None),
        (16, 2, 4, None),
    ],
)
def test_batches_of_one_are_refused(
    monkeypatch: pytest.MonkeyPatch, method: str, batch_size: int, processes: int, n_images: int, message: str | None
) -> None:
    monkeypatch.setattr(distributed, "size", lambda: processes)
    train = replace(config(method), optim=OptimConfig(batch_size=batch_size))
    if message is None:
        methods.check_batch(train, n_images)
        return
    with pytest.raises(ConfigError, match=f"^mixup_cam: expected batches of at least 2 images for each {message}"):
        methods.check_batch(train, n_images)


def test_a_single_image_is_refused_before_the_training(recipe: Recipe, tmp_path: Path) -> None:
    """Batches are as small as the data are; the plain classifier takes one."""
    write_squares(tmp_path / "squares", n=5)  # of which four are not for training
    recipe = replace(recipe, data=replace(recipe.data, root=str(tmp_path / "squares")))
    for method in ("cam", "mixup_cam"):
        run = partial(train_classifier.run, with_method(recipe, method, epochs=1), tmp_path / method, stage="train")
        if method == "cam":
            run(progress=Progress("silent"))
            continue
        with pytest.raises(ConfigError, match="got 1 training images: add some"):
            run(progress=Progress("silent"))
        assert not (tmp_path / method / "train/metrics.jsonl").exists()


# With SEAM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parity", [False, True])
def test_seam_asks_of_shares_only_whether_they_are_there(parity: bool) -> None:
    """Its maps know no half presence; the targets of its classifier do."""
    train = TrainConfig(method="seam", dropout=0.0)
    train = replace(train, seam=replace(train.seam, parity=parity))
    model, data = model_of("seam", config=train), batch(tags=[(0,), (1, 2), ()])
    shares = torch.tensor([[0.7], [0.01], [1.0]])
    whole, mix = (
        losses_of("seam", train)(model, data._replace(tags=tags), START) for tags in (data.tags, data.tags * shares)
    )
    for name in ("er", "ecr", "min_pooling"):
        assert torch.equal(whole[name], mix[name])
    assert whole["classification"] != mix["classification"]


# What it is for -------------------------------------------------------------------------------------------------------


def test_specks_that_come_with_a_class_are_given_up_for_the_object_in_one_place() -> None:
    """Both tell the class equally well, so that plain maps have both."""
    data, weights = scenes(), {}
    for name in ("cam", "mixup_cam"):
        model, losses = over_given_features(), methods.get(name).losses_of(config(concentration=5.0))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for step in range(200):
            seed_torch(0, step)
            optimizer.zero_grad()
            total(losses(model, data, START)).backward()
            optimizer.step()
        weights[name] = torch.stack([model.head.weight[c, [c, 2 + c], 0, 0].detach() for c in range(2)])
    objects, specks = weights["cam"].unbind(dim=1)
    assert (specks > 0.8 * objects).all()
    objects, specks = weights["mixup_cam"].unbind(dim=1)
    assert (objects > 3).all() and (specks < 0.1 * objects).all()


def over_given_features() -> CamClassifier:
    """Over "images" of four channels that are the features themselves."""

    class Given(nn.Module):
        channels = (4,)

        def forward(self, images: Tensor) -> list[Tensor]:
            return [images]

    torch.manual_seed(0)
    return CamClassifier(Given(), 2, dropout=0.0)  # type: ignore[arg-type]


def scenes() -> Batch:
    """96 images of 12 x 12 cells: of two classes, or of nothing. An object is a square, its specks are anywhere."""
    generator = torch.Generator().manual_seed(0)
    tags, images = torch.zeros(96, 2), torch.zeros(96, 4, 12, 12)
    for i in range(96):
        if (c := i % 3) == 2:
            continue
        tags[i, c] = 1
        y, x = torch.randint(0, 10, (2,), generator=generator).tolist()
        images[i, c, y : y + 3, x : x + 3] = 1
        images[i, 2 + c].view(-1)[torch.randperm(144, generator=generator)[:9]] = 1
    return Batch(images, tags, None, [str(i) for i in range(96)])
