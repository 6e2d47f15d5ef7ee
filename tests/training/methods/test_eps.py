"""EPS: what the maps say of saliency, class by class; images without a map; then drawn situations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.training.methods.parts import START, model_of, real_batch, with_method
from training.data import UNLABELLED, Batch
from training.losses import multilabel_soft_margin
from training.methods import eps
from training.methods.eps import SALIENT, SaliencyLabels, estimated, losses, on_cells
from training.models.pixel_classifier import PixelOutput
from training.saliency import SaliencyMaps, write_map
from weakseg.classes import IGNORE
from weakseg.datasets import read
from weakseg.errors import ConfigError
from weakseg.progress import Progress
from weakseg.recipe import EpsConfig, Recipe, SaliencyConfig, TrainConfig


class Scores(nn.Module):
    """A network whose scores are its weights, whatever the images."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, images: Tensor) -> PixelOutput:
        return PixelOutput(self.scores[:, 1:].mean(dim=(2, 3)), self.scores.softmax(dim=1)[:, 1:], self.scores)


def row(*values: object) -> Tensor:
    """(1, ..., 1, w) of an image of one row."""
    return torch.tensor([values]).unsqueeze(-2)


def found(p: Tensor, tags: list[float], saliency: Tensor, tau: float = 0.4, balance: float = 0.5) -> list[float]:
    known = torch.ones_like(saliency, dtype=torch.bool)
    out: list[float] = estimated(p, torch.tensor([tags]), saliency, known, tau, balance)[0, 0].tolist()
    return out


def labelled(labels: Tensor, tags: list[float]) -> Batch:
    return Batch(torch.zeros(len(labels), 3, *labels.shape[1:]), torch.tensor([tags] * len(labels)), labels, ["a"])


def square() -> Tensor:
    """A label map in which the middle is salient."""
    labels = torch.zeros(1, 64, 64, dtype=torch.int64)
    labels[:, 16:48, 16:40] = SALIENT
    return labels


# What the maps say ----------------------------------------------------------------------------------------------------

# Background, then three classes, of which the first is mostly where the saliency map is white.
P = row([0.1, 0.1, 0.7, 0.8], [0.8, 0.7, 0.1, 0.0], [0.1, 0.1, 0.1, 0.2], [0.0, 0.1, 0.1, 0.0])
WHITE_LEFT = row(1.0, 0.8, 0.1, 0.0)


def test_a_valid_class_is_what_is_salient_and_background_what_is_not() -> None:
    expected = [0.5 * one + 0.5 * (1 - p0) for one, p0 in zip([0.8, 0.7, 0.1, 0], [0.1, 0.1, 0.7, 0.8], strict=True)]
    assert found(P, [1, 0, 0], WHITE_LEFT) == pytest.approx(expected)


def test_a_class_beside_the_salient_counts_as_background() -> None:
    swapped = row(0.0, 0.1, 0.8, 1.0)
    expected = [0.5 * (1 - p0 - one) for one, p0 in zip([0.8, 0.7, 0.1, 0], [0.1, 0.1, 0.7, 0.8], strict=True)]
    assert found(P, [1, 0, 0], swapped) == pytest.approx(expected)


def test_so_does_a_class_without_a_cell() -> None:
    expected = [0.5 * (1 - p0 - one) for one, p0 in zip([0.1, 0.1, 0.1, 0.2], [0.1, 0.1, 0.7, 0.8], strict=True)]
    assert found(P, [0, 1, 0], WHITE_LEFT) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("tau", "valid"), [(0.0, True), (0.49, True), (0.5, False), (0.9, False)])
def test_more_than_tau_of_its_cells_are_to_be_salient(tau: float, valid: bool) -> None:
    half = row(0.9, 0.2, 0.0, 0.0)  # one of its two cells
    assert found(P, [1, 0, 0], half, tau, balance=1.0) == pytest.approx([0.8, 0.7, 0.1, 0] if valid else [0] * 4)


def test_balance_weighs_both_sides() -> None:
    assert found(P, [1, 0, 0], WHITE_LEFT, balance=1.0) == pytest.approx([0.8, 0.7, 0.1, 0])
    assert found(P, [1, 0, 0], WHITE_LEFT, balance=0.0) == pytest.approx([0.9, 0.9, 0.3, 0.2])


def test_classes_that_are_absent_belong_to_neither_side() -> None:
    assert found(P, [0, 0, 0], WHITE_LEFT) == pytest.approx([0.45, 0.45, 0.15, 0.1])


def test_cells_beyond_the_image_say_nothing_of_a_class() -> None:
    beside, known = row(0.0, 0.9, 0.0, 0.0), torch.tensor([[[False, True, True, True]]])
    out = estimated(P, torch.tensor([[1.0, 0, 0]]), beside, known, 0.6, 1.0)
    assert out[0, 0].tolist() == pytest.approx([0.8, 0.7, 0.1, 0])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), tau=st.floats(0, 0.99), balance=st.floats(0, 1))
def test_it_is_a_saliency_that_classes_in_another_order_leave_as_it_is(seed: int, tau: float, balance: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(2, 4, 3, 5, generator=generator).mul(4).softmax(dim=1)
    tags = torch.randint(0, 2, (2, 3), generator=generator).float()
    saliency = torch.rand(2, 3, 5, generator=generator)
    known = torch.rand(2, 3, 5, generator=generator) < 0.8
    out = estimated(p, tags, saliency, known, tau, balance)
    assert out.min() >= -1e-6 and out.max() <= 1 + 1e-6
    order = torch.randperm(3, generator=generator)
    mixed = torch.cat([p[:, :1], p[:, 1:][:, order]], dim=1)
    torch.testing.assert_close(estimated(mixed, tags[:, order], saliency, known, tau, balance), out)
    one = estimated(p[1:], tags[1:], saliency[1:], known[1:], tau, balance)
    torch.testing.assert_close(one, out[1:])


# Cells ----------------------------------------------------------------------------------------------------------------


def test_a_cell_is_as_salient_as_the_mean_of_its_pixels_inside_the_image() -> None:
    labels = torch.tensor([[[0, 254, 127, UNLABELLED], [254, 254, UNLABELLED, UNLABELLED]]])
    labels = torch.cat([labels, torch.full((1, 2, 2), UNLABELLED)], dim=2)
    saliency, known = on_cells(labels, (1, 3))
    torch.testing.assert_close(saliency, torch.tensor([[[0.75, 0.5, 0.0]]]))
    assert known.tolist() == [[[True, True, False]]]


def test_label_maps_keep_255_for_what_is_beyond_the_image(recipe: Recipe, tmp_path: Path) -> None:
    dataset = read(recipe.data, "train")
    values = np.random.default_rng(0).random((48, 64), np.float32)
    values[0, :2] = 0, 1
    write_map(tmp_path / "000.png", values)
    of = SaliencyLabels(SaliencyMaps(tmp_path))
    labels = of(dataset.samples[0])
    assert labels.dtype == np.uint8 and labels[0, :2].tolist() == [0, SALIENT] and labels.max() < IGNORE
    assert np.abs(labels / SALIENT - values).max() < 1 / 254
    assert (of(dataset.samples[1]) == IGNORE).all() and of(dataset.samples[1]).shape == (48, 64)


def test_in_a_batch_each_image_has_its_map_and_one_without_tags_none(recipe: Recipe, tmp_path: Path) -> None:
    data = real_batch(with_method(recipe, "eps"), tmp_path, n=8)
    for tags, labels in zip(data.tags, data.labels, strict=True):
        assert ((labels != UNLABELLED).any() == tags.any()) and labels.max() <= SALIENT
    assert (tmp_path / "saliency/train/000.png").is_file()


def test_maps_that_a_user_has_of_images_without_tags_teach_nothing(recipe: Recipe, tmp_path: Path) -> None:
    recipe = with_method(recipe, "eps")
    dataset = read(recipe.data, "train")
    batches = []
    for value in (0.0, 1.0):
        for sample in dataset:
            write_map(tmp_path / f"{sample.id}.png", np.full((48, 64), 0.3 if sample.tags else value, np.float32))
        section = replace(recipe.train.eps, saliency=SaliencyConfig(folder=str(tmp_path)))
        batches.append(real_batch(replace(recipe, train=replace(recipe.train, eps=section)), tmp_path, n=8))
    black, white = (losses(model_of("eps").eval(), data, START, EpsConfig()) for data in batches)
    assert black["saliency"] > 0 and {k: v.item() for k, v in black.items()} == {k: v.item() for k, v in white.items()}
    untagged = batches[0].tags.sum(dim=1) == 0
    alone = batches[1]._replace(
        images=batches[1].images[untagged], tags=batches[1].tags[untagged], labels=batches[1].labels[untagged]
    )
    assert untagged.sum() == 2 and losses(model_of("eps").eval(), alone, START, EpsConfig())["saliency"] == 0


# Losses ---------------------------------------------------------------------------------------------------------------


def test_losses_in_closed_form() -> None:
    scores = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    data = labelled(square(), [1.0, 0.0, 1.0])
    parts = losses(Scores(scores), data, START, EpsConfig(weight=3.0))
    saliency, known = on_cells(square(), (4, 4))
    out = estimated(scores.softmax(dim=1), data.tags, saliency, known, 0.4, 0.5)
    torch.testing.assert_close(parts["saliency"], 3 * ((out - saliency) ** 2).mean())
    torch.testing.assert_close(
        parts["classification"], multilabel_soft_margin(scores[:, 1:].mean(dim=(2, 3)), data.tags)
    )


def test_maps_that_are_the_saliency_map_have_nothing_to_learn_from_it() -> None:
    scores = torch.full((1, 3, 4, 4), -20.0)
    saliency, _ = on_cells(square(), (4, 4))
    where = saliency == 1
    labels = square() * where.repeat_interleave(16, 1).repeat_interleave(16, 2)
    scores[:, 0] = torch.where(where, -20.0, 20.0)
    scores[:, 2] = torch.where(where, 20.0, -20.0)
    model = Scores(scores)
    loss = losses(model, labelled(labels, [0.0, 1.0]), START, EpsConfig())["saliency"]
    loss.backward()
    assert loss.item() < 1e-6 and model.scores.grad.abs().max() < 1e-6


def test_an_image_without_a_map_teaches_its_tags_alone() -> None:
    scores = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    both = torch.cat([square(), torch.full((1, 64, 64), UNLABELLED)])
    model = Scores(scores)
    loss = losses(model, labelled(both, [1.0, 0.0, 0.0]), START, EpsConfig())["saliency"]
    one = losses(Scores(scores[:1]), labelled(square(), [1.0, 0.0, 0.0]), START, EpsConfig())["saliency"]
    torch.testing.assert_close(loss, one)
    loss.backward()
    assert (model.scores.grad[1] == 0).all() and (model.scores.grad[0] != 0).any()
    none = losses(model, labelled(both[1:].expand(2, -1, -1), [1.0, 0.0, 0.0]), START, EpsConfig())["saliency"]
    assert none == 0 and none.requires_grad


# What it is for -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_class_ends_where_the_thing_does(weight: float) -> None:
    """From a blot of evidence about a corner of the thing: tags alone let it grow everywhere."""
    scores = torch.zeros(1, 4, 16, 16)
    scores[0, 2, 3:7, 3:7] = 2
    model, data = Scores(scores), labelled(square(), [0.0, 1.0, 0.0])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        torch.stack(list(losses(model, data, START, EpsConfig(weight=weight)).values())).sum().backward()
        optimizer.step()
    winner = model.scores.detach().argmax(dim=1)[0]
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:12, 4:10] = True
    assert (winner[inside] == 2).all()
    assert (winner[~inside] == 0).all() if weight else (winner[~inside] == 2).all()


def test_its_network_pools_by_the_mean() -> None:
    assert model_of("eps").options["pooling"] == "mean"


@pytest.mark.parametrize("setting", [{"tau": 1.0}, {"tau": -0.1}, {"balance": 1.5}, {"weight": -1.0}])
def test_settings_that_make_no_sense_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="train.eps: expected tau in"):
        model_of("eps", config=TrainConfig(eps=EpsConfig(**setting)))


def test_maps_that_cannot_be_used_are_refused_before_anything_is_trained(recipe: Recipe, tmp_path: Path) -> None:
    recipe = with_method(recipe, "eps")
    section = replace(recipe.train.eps, saliency=SaliencyConfig(folder=str(tmp_path / "nowhere")))
    recipe = replace(recipe, train=replace(recipe.train, eps=section))
    with pytest.raises(ConfigError, match="got no such folder"):
        eps.labels_of(recipe, read(recipe.data, "train"), tmp_path, Progress("silent"))
