"""SEC against its specification: each loss in closed form, then images drawn for it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.training.methods.parts import START
from training.data import UNLABELLED, Batch
from training.methods import sec
from training.methods.sec import (
    CRF,
    SIDE,
    balanced_seed,
    check,
    divergence,
    expand,
    floored,
    losses,
    on_cells,
    rank_pooling,
    sharpened,
)
from training.models.pixel_classifier import PixelOutput
from weakseg import crf
from weakseg.errors import ConfigError
from weakseg.recipe import CrfConfig, OptimConfig, SecConfig, TrainConfig

NO_CRF = CrfConfig(gaussian_weight=0.0, bilateral_weight=0.0)


class Scores(nn.Module):
    """A network whose scores are its weights, whatever the images."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, images: Tensor) -> PixelOutput:
        cam = self.scores.softmax(dim=1)[:, 1:]
        return PixelOutput(cam.amax(dim=(2, 3)), cam, self.scores)


def everywhere(*of: int) -> Tensor:
    return torch.ones(of, dtype=torch.bool)


def probabilities(*shape: int, seed: int = 0) -> Tensor:
    return floored(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(dim=1))


def blob(width: float) -> Tensor:
    """Scores (1, 4, 16, 16) of a network that has found something round, of value 2, about the seed of `square`."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    scores = torch.zeros(1, 4, 16, 16)
    scores[0, 2] = 4 * torch.exp(-((y - 6.5) ** 2 + (x - 6.5) ** 2) / (2 * width**2)) - 2
    return scores


def learnt(data: Batch, scores: Tensor, config: SecConfig, steps: int = 100) -> Tensor:
    """The likeliest value of each cell after some steps, of the first image."""
    model = Scores(scores.clone())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack(list(losses(model, data, START, config).values())).sum().backward()
        optimizer.step()
    return model.scores.detach().argmax(dim=1)[0]


def square(side: int = 64) -> Batch:
    """A red square on grey, with a seed inside it, mask value 2 of 3 classes, and one of background in a corner."""
    images = torch.full((1, 3, side, side), 120, dtype=torch.uint8)
    images[:, :, 16:48, 16:40] = torch.tensor([220, 40, 40], dtype=torch.uint8)[:, None, None]
    labels = torch.full((1, side, side), 4)  # undecided
    labels[:, 24:32, 24:32], labels[:, :8, :8] = 2, 0
    return Batch(images, torch.tensor([[0.0, 1.0, 0.0]]), labels, ["square"])


# Ranks ----------------------------------------------------------------------------------------------------------------


def test_without_decay_the_mean_and_with_all_the_largest() -> None:
    p = torch.rand(3, 4, 6, 5)
    torch.testing.assert_close(rank_pooling(p, everywhere(3, 6, 5), 0), p.amax(dim=(2, 3)))
    torch.testing.assert_close(rank_pooling(p, everywhere(3, 6, 5), 1), p.mean(dim=(2, 3)))


@pytest.mark.parametrize("decay", [0, 0.5, 0.996, 0.999, 1])
def test_of_one_value_that_value(decay: float) -> None:
    out = rank_pooling(torch.full((2, 3, 7, 4), 0.3), everywhere(2, 7, 4), decay)
    torch.testing.assert_close(out, torch.full((2, 3), 0.3))


@pytest.mark.parametrize("decay", [0.996, 0.999])
def test_on_the_papers_grid_it_is_the_papers_sum(decay: float) -> None:
    p = np.random.default_rng(0).random((2, 3, SIDE, SIDE))
    ranked = -np.sort(-p.reshape(2, 3, -1), axis=2)
    weights = decay ** np.arange(SIDE**2)
    expected = torch.from_numpy((ranked * weights).sum(axis=2) / weights.sum())
    torch.testing.assert_close(rank_pooling(torch.from_numpy(p), everywhere(2, SIDE, SIDE), decay), expected)


def test_on_another_grid_the_same_share_of_the_image_counts() -> None:
    p = torch.rand(1, 1, 20, 20)
    fine = p.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    coarse, finer = (rank_pooling(x, everywhere(1, *x.shape[2:]), 0.996) for x in (p, fine))
    torch.testing.assert_close(coarse, finer, atol=0.01, rtol=0)
    assert abs(float(finer) - float(coarse)) < 0.2 * abs(float(coarse) - float(p.mean()))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), low=st.floats(0, 1), high=st.floats(0, 1))
def test_ranks_alone_count_and_a_larger_decay_counts_more_of_them(seed: int, low: float, high: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(2, 3, 5, 6, generator=generator)
    real = everywhere(2, 5, 6)
    few, many = (rank_pooling(p, real, decay) for decay in (min(low, high), max(low, high)))
    assert (p.mean(dim=(2, 3)) - 1e-5 <= many).all() and (many <= few + 1e-5).all()
    assert (few <= p.amax(dim=(2, 3)) + 1e-5).all()
    mixed = p.flatten(2)[..., torch.randperm(30, generator=generator)].view_as(p)
    torch.testing.assert_close(rank_pooling(mixed, real, high), rank_pooling(p, real, high))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), decay=st.floats(0, 1))
def test_padding_has_no_rank(seed: int, decay: float) -> None:
    p = torch.rand(1, 2, 4, 5, generator=torch.Generator().manual_seed(seed))
    padded, real = torch.rand(1, 2, 7, 9), torch.zeros(1, 7, 9, dtype=torch.bool)
    padded[..., 2:6, 3:8], real[:, 2:6, 3:8] = p, True
    expected = rank_pooling(p, everywhere(1, 4, 5), decay)
    torch.testing.assert_close(rank_pooling(padded, real, decay), expected)


# Expand ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ([1, 0, 1], [math.log(0.3) / 2 + math.log(0.1) / 2, math.log(0.8), math.log(0.4)]),
        ([0, 0, 0], [(math.log(0.7) + math.log(0.8) + math.log(0.9)) / 3, math.log(0.4)]),
        ([1, 1, 1], [(math.log(0.3) + math.log(0.2) + math.log(0.1)) / 3, math.log(0.4)]),
    ],
)
def test_expansion_of_constants(tags: list[int], expected: list[float]) -> None:
    p = torch.tensor([0.4, 0.3, 0.2, 0.1]).view(1, 4, 1, 1).expand(1, 4, 5, 6)
    vector = torch.tensor([tags]).float()
    assert float(expand(p, vector, everywhere(1, 5, 6), 0.996, 0.999)) == pytest.approx(-sum(expected))
    both = expand(p.expand(2, 4, 5, 6), vector.expand(2, 3), everywhere(2, 5, 6), 0.9, 0.5)
    assert float(both) == pytest.approx(-sum(expected))


def test_each_class_has_its_decay() -> None:
    p, real = probabilities(1, 3, 4, 4), everywhere(1, 4, 4)
    out = expand(p, torch.tensor([[1.0, 0.0]]), real, 0.99, 0.5)
    present, background = rank_pooling(p[:, 1:2], real, 0.99), rank_pooling(p[:, :1], real, 0.5)
    torch.testing.assert_close(out, -(present.log() + (1 - p[:, 2].amax()).log() + background.log()).squeeze())


def test_the_surest_scores_have_a_loss() -> None:
    """An absent class of probability 1, and a present one of 0: FLOOR keeps logarithms finite."""
    scores = torch.tensor([0.0, 300.0]).view(1, 2, 1, 1).expand(1, 2, 3, 3).clone().requires_grad_()
    for tag in (0.0, 1.0):
        loss = expand(floored(scores.softmax(dim=1)), torch.tensor([[tag]]), everywhere(1, 3, 3), 0.996, 0.999)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(scores.grad).all()  # type: ignore[arg-type]


# Seed -----------------------------------------------------------------------------------------------------------------


def test_seeds_of_background_and_objects_weigh_the_same() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1], [0.1, 0.1, 0.8], [0.6, 0.3, 0.1]]).T.reshape(1, 3, 2, 2)
    p = p.log()
    labels = torch.tensor([[[0, 1], [2, 0]]])
    background, objects = (math.log(0.5) + math.log(0.6)) / 2, (math.log(0.7) + math.log(0.8)) / 2
    assert float(balanced_seed(p, labels)) == pytest.approx(-background - objects)
    assert float(balanced_seed(p, torch.tensor([[[0, 1], [3, UNLABELLED]]]))) == pytest.approx(
        -math.log(0.5) - math.log(0.7)
    )
    two = balanced_seed(p.expand(2, 3, 2, 2), torch.tensor([[[0, 1], [2, 0]], [[3, 3], [2, 3]]]))
    assert float(two) == pytest.approx((-background - objects - math.log(0.8)) / 2)


@pytest.mark.parametrize("value", [UNLABELLED, 3, 255])
def test_without_seeds_there_is_nothing_to_learn(value: int) -> None:
    p = probabilities(2, 3, 4, 4).log().requires_grad_()
    loss = balanced_seed(p, torch.full((2, 4, 4), value))
    loss.backward()
    assert loss.item() == 0 and p.grad is not None and not p.grad.any()


def test_a_network_that_is_sure_of_background_learns_from_a_seed_of_an_object() -> None:
    scores = torch.tensor([50.0, 0.0, 0.0]).view(1, 3, 1, 1).requires_grad_()
    balanced_seed(scores.log_softmax(dim=1), torch.tensor([[[1]]])).backward()
    torch.testing.assert_close(scores.grad, torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1))


# Constrain ------------------------------------------------------------------------------------------------------------


def test_divergence_of_two_distributions() -> None:
    q, p = torch.tensor([0.9, 0.1]).view(1, 2, 1, 1), torch.tensor([0.5, 0.5]).view(1, 2, 1, 1)
    exact = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert float(divergence(q, p, everywhere(1, 1, 1))) == pytest.approx(exact, abs=1e-3)
    clipped = 0.9 * math.log(1.5) + 0.1 * math.log(0.5)
    assert float(divergence(q, p, everywhere(1, 1, 1), (0.5, 1.5))) == pytest.approx(clipped, abs=1e-3)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_divergence_is_least_where_both_are_the_same(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, other = (torch.randn(2, 4, 3, 3, generator=generator).softmax(dim=1) for _ in range(2))
    assert float(divergence(q, floored(q), everywhere(2, 3, 3))) == pytest.approx(0, abs=1e-6)
    assert float(divergence(q, floored(other), everywhere(2, 3, 3))) > 0


def test_what_arrives_at_the_scores_is_the_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(1, 3, 4, 4, generator=generator).requires_grad_()  # no p near FLOOR, which changes its gradient
    q = torch.randn(1, 3, 4, 4, generator=generator).softmax(dim=1).requires_grad_()
    p = scores.softmax(dim=1)
    divergence(q, floored(p), everywhere(1, 4, 4)).backward()
    assert q.grad is None
    torch.testing.assert_close(scores.grad * 16, (p - q).detach(), atol=2e-3, rtol=0)  # type: ignore[operator]


def test_where_the_crf_changes_nothing_there_is_nothing_to_learn() -> None:
    images, scores, real = torch.randint(0, 256, (2, 3, 24, 24)), torch.randn(2, 4, 6, 6), everywhere(2, 6, 6)
    q = sharpened(images, scores, real, NO_CRF)
    torch.testing.assert_close(q, scores.softmax(dim=1))
    assert float(divergence(q, floored(scores.softmax(dim=1)), real)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("n_values", [2, 5])
def test_a_crf_sees_the_image_at_the_size_of_the_cells_and_nothing_beyond_it(n_values: int) -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)
    scores = torch.randn(2, n_values, 16, 16, generator=generator)
    real = everywhere(2, 16, 16)
    real[1, :5], real[1, :, 12:] = False, False
    before = images.clone(), scores.clone(), real.clone()
    out = sharpened(images, scores, real)
    small = (
        images.float().reshape(2, 3, 16, 4, 16, 4).mean(dim=(3, 5)).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    )
    likely = scores.softmax(dim=1).numpy()
    np.testing.assert_allclose(out[0], crf.refine(small[0], likely[0], CRF), atol=1e-6)
    np.testing.assert_allclose(out[1, :, 5:, :12], crf.refine(small[1, 5:, :12], likely[1, :, 5:, :12], CRF), atol=1e-6)
    assert not out[1, :, :5].any() and not out[1, :, :, 12:].any()
    for now, then in zip((images, scores, real), before, strict=True):
        assert torch.equal(now, then)


def test_its_widths_are_those_of_the_paper_on_the_papers_grid() -> None:
    there = crf.scaled(CRF, SIDE, SIDE)
    assert (there.gaussian_sxy, there.bilateral_sxy) == pytest.approx((0.25, 80 / 12))
    twice = crf.scaled(CRF, 2 * SIDE, SIDE)
    assert (twice.gaussian_sxy, twice.bilateral_sxy, twice.bilateral_srgb) == pytest.approx((0.5, 160 / 12, 13))


def test_scores_that_have_diverged_end_by_their_loss() -> None:
    data = square()
    parts = losses(Scores(torch.full((1, 4, 16, 16), math.nan)), data, START, SecConfig())
    assert not any(torch.isfinite(part) for part in parts.values())


# Cells ----------------------------------------------------------------------------------------------------------------


def test_labels_at_the_centres_of_cells() -> None:
    labels = torch.full((1, 8, 8), UNLABELLED)
    labels[:, 3:, 3:] = 70_000 // 2  # above float16 and bfloat16, as many classes have
    labels[:, 6, 6] = 3
    values, real = on_cells(labels, (2, 2))
    assert values.tolist() == [[[-1, -1], [-1, 3]]]
    assert real.tolist() == [[[True, True], [True, True]]]  # the first cells see a row of the image, though not centred
    assert on_cells(labels, (4, 4))[1].tolist() == [[[False] * 4] + [[False, True, True, True]] * 3]


def test_a_sliver_of_an_image_is_real() -> None:
    labels = torch.full((1, 64, 64), UNLABELLED)
    labels[:, :, 17:19] = 0
    values, real = on_cells(labels, (4, 4))
    assert real.any(dim=1).tolist() == [[False, True, False, False]]
    assert (values == UNLABELLED).all()


# The step -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2.0, 3.0, 4.0])
def test_what_is_found_roughly_becomes_the_square(width: float) -> None:
    """Too small or too large to begin with, and round: its edges come from the image."""
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:12, 4:10] = True
    assert torch.equal(learnt(square(), blob(width), SecConfig()), 2 * inside)
    without = learnt(square(), blob(width), SecConfig(constrain=0.0)) == 2
    assert (without & inside).sum() < 0.6 * (without | inside).sum()


def test_a_tag_has_an_area() -> None:
    scores = torch.zeros(1, 4, 16, 16)
    scores[:, 0] = 1.0  # all background
    alone, expanded = (learnt(square(), scores, SecConfig(constrain=0.0, expand=weight)) for weight in (0.0, 1.0))
    assert (alone == 2).sum() == 4  # the seed
    assert (expanded == 2).sum() > 16 and not ((expanded == 1) | (expanded == 3)).any()


def test_an_image_without_tags_is_learnt_as_background() -> None:
    data = square()
    data = data._replace(tags=torch.zeros(1, 3), labels=torch.zeros_like(data.labels))  # type: ignore[arg-type]
    assert not learnt(data, blob(3), SecConfig(), 30).any()


@pytest.mark.parametrize("tag", [0.0, 1.0])
def test_one_class(tag: float) -> None:
    data = square()
    assert data.labels is not None
    labels = torch.where(data.labels == 2, 1, torch.where(data.labels == 4, 2, data.labels))
    data = data._replace(tags=torch.tensor([[tag]]), labels=labels * int(tag))
    out = learnt(data, blob(3)[:, [0, 2]], SecConfig())
    assert out[4:12, 4:10].float().mean() == tag and out.sum() == 48 * tag


def test_what_lies_beyond_the_image_does_not_count() -> None:
    data = square()
    assert data.labels is not None
    labels = data.labels.clone()
    labels[:, :, 48:] = UNLABELLED
    scores, other = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 16, 16)
    images = data.images.clone()
    images[..., 48:], other[..., :12] = 200, scores[..., :12]
    one = Scores(scores)
    parts = losses(one, data._replace(labels=labels), START, SecConfig())
    again = losses(Scores(other), data._replace(images=images, labels=labels), START, SecConfig())
    assert {k: v.item() for k, v in parts.items()} == {k: v.item() for k, v in again.items()}
    torch.stack(list(parts.values())).sum().backward()
    assert one.scores.grad is not None
    assert not one.scores.grad[..., 12:].any() and one.scores.grad[..., :12].abs().sum() > 0


def test_a_weight_of_zero_leaves_a_loss_out() -> None:
    model = Scores(torch.randn(1, 4, 16, 16))
    assert set(losses(model, square(), START, SecConfig())) == {"seed", "expand", "constrain"}
    assert set(losses(model, square(), START, SecConfig(expand=0.0, constrain=0.0))) == {"seed"}
    for part in ("expand", "constrain"):
        once, twice = (losses(model, square(), START, SecConfig(**{part: weight}))[part] for weight in (1.0, 2.0))
        torch.testing.assert_close(twice, 2 * once)


def test_inputs_are_left_alone() -> None:
    data, scores = square(), torch.randn(1, 4, 16, 16)
    before = data.images.clone(), data.tags.clone(), data.labels.clone(), scores.clone()  # type: ignore[union-attr]
    losses(Scores(scores), data, START, SecConfig())
    for now, then in zip((data.images, data.tags, data.labels, scores), before, strict=True):
        assert torch.equal(now, then)  # type: ignore[arg-type]


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": 0.0},
        {"seed": 1.1},
        {"background": 1.0},
        {"background": -0.1},
        {"expand_decay": 1.1},
        {"background_decay": -0.1},
    ],
)
def test_settings_that_cannot_be_used_are_refused(wrong: dict[str, float]) -> None:
    name = next(iter(wrong))
    with pytest.raises(ConfigError, match=f"train.sec: expected.*{name} {wrong[name]:g}.*the paper has"):
        check(SecConfig(**wrong), "sec")  # type: ignore[arg-type]


def test_it_has_what_the_seeds_have_left_of_the_epochs() -> None:
    config = TrainConfig(optim=OptimConfig(epochs=10), sec=SecConfig(seeds_share=0.3))
    assert sec.optim_of(config) == replace(config.optim, epochs=7, lr=0.1 * config.optim.lr)
