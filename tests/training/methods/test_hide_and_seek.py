"""Hide-and-Seek: which pixels are hidden, how often and by what; then a body that is learnt while heads are hidden."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.training.methods.parts import BODY, HEAD, START, GivenFeatures, animals, batch, model_of
from training import methods
from training.data import Batch
from training.methods.hide_and_seek import around, draw_hidden, hide, sides_for
from training.models import CamClassifier
from training.randomness import seed_torch
from training.step import Moment
from weakseg.errors import ConfigError
from weakseg.recipe import HideAndSeekConfig, OptimConfig, TrainConfig


def config(crop_px: int = 224, **settings: object) -> TrainConfig:
    return TrainConfig(
        method="hide_and_seek",
        dropout=0.0,
        optim=OptimConfig(crop_px=crop_px),
        hide_and_seek=HideAndSeekConfig(**settings),  # type: ignore[arg-type]
    )


# Which pixels are hidden ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    sides=st.lists(st.integers(0, 50), min_size=1, max_size=4),
)
def test_patches_of_one_of_the_sides_from_the_top_left_on(seed: int, height: int, width: int, sides: list[int]) -> None:
    """Of any image, wider or higher; the last patches of rows and columns are cut off."""
    torch.manual_seed(seed)
    where = draw_hidden(3, (height, width), sides, 0.5)
    assert where.shape == (3, height, width) and where.dtype == torch.bool
    assert all(any(consists_of_patches(image, side) for side in sides) for image in where)


def consists_of_patches(where: Tensor, side: int) -> bool:
    if side == 0:
        return not where.any()
    rows, columns = (torch.arange(length) // side * side for length in where.shape)  # where each pixel's patch begins
    return torch.equal(where, where[rows][:, columns])


def test_a_patch_as_large_as_the_image_hides_all_or_nothing() -> None:
    torch.manual_seed(0)
    where = draw_hidden(100, (5, 7), [7], 0.5).flatten(1)
    assert (where.all(dim=1) | ~where.any(dim=1)).all()
    assert 0 < where.all(dim=1).sum() < 100


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 64), (30, 10)])
def test_the_rate_within_three_sigma(share: float, height: int, width: int) -> None:
    """Counted by patches, at the first pixel of each: those are independent."""
    torch.manual_seed(0)
    first = draw_hidden(400, (height, width), [4], share)[:, ::4, ::4]
    sigma = math.sqrt(share * (1 - share) / first.numel())
    assert float(first.float().mean()) == pytest.approx(share, abs=3 * sigma)


def test_a_share_of_nothing_hides_nothing() -> None:
    assert not draw_hidden(10, (32, 32), [0, 4, 8], 0.0).any()


def test_sides_are_drawn_for_each_image_alike() -> None:
    torch.manual_seed(0)
    n, sides = 3000, (0, 2, 8)
    where = draw_hidden(n, (16, 16), sides, 0.5)
    none = ~where.flatten(1).any(dim=1)
    eights = torch.tensor([consists_of_patches(image, 8) for image in where])
    # Four patches of 8 are all seen in one of 16 images; 64 patches of 2 are never alike by 16.
    expected = {"none": 1 / 3 + 1 / 48, "eights": 2 / 3}
    for name, share in (("none", none), ("eights", eights)):
        sigma = math.sqrt(expected[name] * (1 - expected[name]) / n)
        assert float(share.float().mean()) == pytest.approx(expected[name], abs=3 * sigma)


def test_sides_grow_with_the_crop() -> None:
    authors = (0, 16, 32, 44, 56)
    assert sides_for(authors, 224) == authors
    assert sides_for(authors, 448) == (0, 32, 64, 88, 112)
    assert sides_for(authors, 112) == (0, 8, 16, 22, 28)
    assert sides_for(authors, 8) == (0, 1, 1, 2, 2)  # a pixel at least


# What they become -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_they_are_what_the_network_takes_for_nothing(dtype: torch.dtype) -> None:
    backbone, images = model_of("cam").backbone, batch(side=32).images.to(dtype)
    before, where = images.clone(), draw_hidden(2, (32, 32), [8], 0.5)
    out = hide(images, where, backbone.mean)
    assert torch.equal(images, before) and out.dtype == dtype
    hidden = where[:, None].expand_as(images)
    assert hidden.any() and torch.equal(out[~hidden], images[~hidden])
    for channel, value in enumerate(backbone.mean_colour):
        assert (out[:, channel][where] == value).all()
    assert backbone.normalise(out)[hidden].abs().max() < 0.01  # of colours in [-2.2, 2.7]


def test_losses_are_those_of_the_hidden_images_with_their_tags() -> None:
    train, data, model = config(crop_px=64), batch(side=64), model_of("cam")
    seen: list[Batch] = []

    def losses(model: nn.Module, given: Batch, moment: Moment) -> dict[str, Tensor]:
        seen.append(given)
        return {}

    for step in (1, 2):
        seed_torch(0, step)
        around(losses, train)(model, data, START)
    seed_torch(0, 1)
    where = draw_hidden(2, (64, 64), sides_for(train.hide_and_seek.sides_px, 64), 0.5)
    assert torch.equal(seen[0].images, hide(data.images, where, model.backbone.mean))
    assert not torch.equal(seen[0].images, seen[1].images)
    assert all(given.tags is data.tags and given.ids is data.ids for given in seen)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sides_px": ()}, r"sides_px must be one or more sides .* got none: the authors have 0, 16, 32, 44, 56"),
        ({"sides_px": (16, -4)}, "sides_px must be one or more sides .* got 16, -4"),
        ({"hide": 1.0}, r"train.hide_and_seek.hide is a patch's probability, in \[0, 1\), got 1"),
        ({"hide": -0.1}, r"train.hide_and_seek.hide is a patch's probability, in \[0, 1\), got -0.1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        methods.get("hide_and_seek").losses_of(config(**settings))


# What it is for -------------------------------------------------------------------------------------------------------


def test_a_body_is_learnt_while_the_head_is_hidden() -> None:
    """Animals have a head, which nothing else has, and a body, whose colour other things have at times, too."""
    data, maps = animals(), {}
    for name in ("cam", "hide_and_seek"):
        model = over_given_features()
        losses = methods.get(name).losses_of(config(sides_px=(2,)))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for step in range(200):
            seed_torch(0, step)
            optimizer.zero_grad()
            losses(model, data, START)["classification"].backward()
            optimizer.step()
        with torch.no_grad():
            cam = model(data.images).cam[:32].relu()
        maps[name] = cam[..., BODY].mean() / cam[..., HEAD].mean()
    assert maps["cam"] < 0.25
    assert maps["hide_and_seek"] > 0.5


def over_given_features() -> CamClassifier:
    """Over "images" of two channels that are the features themselves, hidden where they are 0."""

    torch.manual_seed(0)
    return CamClassifier(GivenFeatures(), 1, dropout=0.0)  # type: ignore[arg-type]
