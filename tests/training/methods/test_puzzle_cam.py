"""Puzzle-CAM: tiles and the losses in closed form; then a class that is told by what comes with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.training.methods.parts import END, batch, losses_of, model_of, total
from training.data import Batch
from training.losses import multilabel_soft_margin
from training.methods.puzzle_cam import join, split, weight_at
from training.models import CamClassifier
from training.models.classifier import ClassifierOutput
from training.step import Moment
from weakseg.errors import ConfigError
from weakseg.recipe import OptimConfig, PuzzleCamConfig, TrainConfig


def config(crop_px: int = 64, **settings: object) -> TrainConfig:
    puzzle = PuzzleCamConfig(**settings)  # type: ignore[arg-type]
    return TrainConfig(method="puzzle_cam", puzzle_cam=puzzle, optim=OptimConfig(crop_px=crop_px))


# Tiles ----------------------------------------------------------------------------------------------------------------


def test_tiles_are_those_of_the_image_row_by_row() -> None:
    image = torch.arange(24).view(1, 1, 4, 6)
    images = torch.cat([image, 100 + image])
    tiles = split(images, 2)
    assert tiles.shape == (8, 1, 2, 3)
    assert tiles[:4, 0].tolist() == [
        [[0, 1, 2], [6, 7, 8]],
        [[3, 4, 5], [9, 10, 11]],
        [[12, 13, 14], [18, 19, 20]],
        [[15, 16, 17], [21, 22, 23]],
    ]
    assert torch.equal(tiles[4:], 100 + tiles[:4])


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 4),
    n_images=st.integers(1, 3),
    channels=st.integers(1, 3),
    h=st.integers(1, 5),
    w=st.integers(1, 5),
)
def test_put_together_again_they_are_the_image(n: int, n_images: int, channels: int, h: int, w: int) -> None:
    images = torch.rand(n_images, channels, n * h, n * w)
    images = images.to(memory_format=torch.channels_last)
    assert torch.equal(join(split(images, n), n), images)
    torch.testing.assert_close(
        split(images, n).mean(dim=(1, 2, 3)).view(n_images, -1).mean(dim=1), images.mean((1, 2, 3))
    )


# The step -------------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Two classes; the map of the first is the image's first channel, that of the second how many cells are seen."""

    def forward(self, images: Tensor) -> ClassifierOutput:
        first = images[:, :1].float()
        cells = float(first[0, 0].numel())
        cam = torch.cat([first, torch.full_like(first, cells)], dim=1)
        return ClassifierOutput(cam.mean(dim=(2, 3)), cam)


def test_the_losses_of_known_maps() -> None:
    """16 cells in the image and 4 in a tile: the second class's maps differ by 12, the first's not at all."""
    images, tags = torch.rand(3, 3, 4, 4), torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    data = Batch(images, tags, None, ["a", "b", "c"])
    parts = losses_of("puzzle_cam", config(weight=4.0))(Counting(), data, END)
    pooled = images[:, 0].mean(dim=(1, 2))
    for name, seen in (("classification", 16.0), ("tiles", 4.0)):
        logits = torch.stack([pooled, torch.full((3,), seen)], dim=1)
        torch.testing.assert_close(parts[name], multilabel_soft_margin(logits, tags))
    by_image = [(0 + 12) / 2, 12, 0]
    assert float(parts["reconstruction"]) == pytest.approx(4 * 0.05 * sum(by_image) / 3)


@pytest.mark.parametrize("n_classes", [2, 20, 80])
def test_classes_that_are_not_there_change_nothing_of_the_difference(n_classes: int) -> None:
    class Padded(nn.Module):
        def forward(self, images: Tensor) -> ClassifierOutput:
            cam = nn.functional.pad(Counting()(images).cam, (0, 0, 0, 0, 0, n_classes - 2), value=7.0)
            return ClassifierOutput(cam.mean(dim=(2, 3)), cam)

    parts = losses_of("puzzle_cam", config())(Padded(), batch(n_classes, 4, [(0,), (1,)]), END)
    assert float(parts["reconstruction"]) == pytest.approx(4 * 0.05 * (0 + 12) / 2)


@pytest.mark.parametrize(
    ("ramp", "done", "share"),
    [(0.5, 0.0, 0), (0.5, 0.25, 0.5), (0.5, 0.5, 1), (0.5, 0.9, 1), (1.0, 0.5, 0.5), (0.0, 0.0, 1)],
)
def test_the_weight_grows_and_stays(ramp: float, done: float, share: float) -> None:
    assert weight_at(Moment(0, 0, done), PuzzleCamConfig(weight=4.0, ramp=ramp)) == pytest.approx(4 * share)


def test_both_sides_of_the_difference_learn() -> None:
    model, maps = model_of("puzzle_cam", config=config()), []

    class Watched(nn.Module):
        def forward(self, images: Tensor) -> ClassifierOutput:
            output = model(images)
            output.cam.retain_grad()
            maps.append(output.cam)
            return output

    losses_of("puzzle_cam", config())(Watched(), batch(tags=[(0,), (2,)]), END)["reconstruction"].backward()
    whole, tiles = (cam.grad for cam in maps)
    assert whole.shape == (2, 3, 4, 4) and tiles.shape == (8, 3, 2, 2)
    torch.testing.assert_close(join(tiles, 2), -whole)
    assert whole[0, 0].abs().sum() > 0 and (whole[0, 1:] == 0).all()  # of absent classes there is no difference


def test_in_training_maps_are_what_they_are_in_evaluation() -> None:
    """Channels that are dropped for the image and not for its tiles would be most of the difference."""
    model, images = model_of("puzzle_cam", config=replace(config(), dropout=0.5)), batch().images
    assert model.options == {"dropout": 0.0}
    with torch.no_grad():
        torch.testing.assert_close(model.train()(images).cam, model.eval()(images).cam)


@pytest.mark.parametrize(("crop_px", "tiles"), [(64, 4), (96, 3), (96, 2)])
def test_tiles_of_whole_cells(crop_px: int, tiles: int) -> None:
    train = config(crop_px, tiles=tiles)
    parts = losses_of("puzzle_cam", train)(model_of("puzzle_cam", config=train), batch(side=crop_px), END)
    assert parts["reconstruction"] > 0


@pytest.mark.parametrize(
    ("crop_px", "settings", "message"),
    [
        (112, {}, "train.optim.crop_px must be a multiple of 32, got 112: 2 tiles a side"),
        (64, {"tiles": 3}, "train.optim.crop_px must be a multiple of 48, got 64"),
        (64, {"tiles": 1}, "train.puzzle_cam.tiles must be at least 2 a side, got 1"),
        (64, {"weight": -1.0}, "train.puzzle_cam.weight must not be negative, got -1"),
        (64, {"ramp": 1.5}, r"train.puzzle_cam.ramp is a share of the training, in \[0, 1\], got 1.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(crop_px: int, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_of("puzzle_cam", config=config(crop_px, **settings))


# What it is for -------------------------------------------------------------------------------------------------------


def test_a_class_is_looked_for_where_it_is_and_not_all_over_its_image() -> None:
    """Deep in a network every cell knows what else is in view, and often knows it better than what is in itself.

    In tiles without the object that knowledge is not there, and the class must be found by its own cells.
    """
    plain, puzzle = trained("cam"), trained("puzzle_cam")
    assert share_in_boats(plain) < 0.6 and share_in_boats(puzzle) > 0.95
    data = boats()
    assert torch.equal(puzzle(data.images).logits > 0, data.tags == 1)


def trained(method: str) -> CamClassifier:
    model, data, losses = over_given_features(), boats(), losses_of(method)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        total(losses(model, data, END)).backward()
        optimizer.step()
    return model.eval()


def share_in_boats(model: CamClassifier) -> float:
    """Of the sum of the maps of those images that have one."""
    data = boats()
    with torch.no_grad():
        maps = model(data.images).cam[data.tags[:, 0] == 1, 0].relu()
    return float(maps[:, BOAT, BOAT].sum() / maps.sum())


def over_given_features() -> CamClassifier:
    """ "Images" of one channel; features are the cell itself, and the largest cell in view, everywhere."""

    class Given(nn.Module):
        channels = (2,)

        def forward(self, images: Tensor) -> list[Tensor]:
            return [torch.cat([images, torch.ones_like(images) * images.amax(dim=(2, 3), keepdim=True)], dim=1)]

    torch.manual_seed(0)
    return CamClassifier(Given(), 1, dropout=0.0)  # type: ignore[arg-type]


BOAT = slice(1, 4)


def boats() -> Batch:
    """64 images of 8 x 8 cells; every other has a boat of 3 x 3 cells in the first of four tiles."""
    tags = torch.zeros(64, 1)
    tags[::2] = 1
    images = -0.1 * torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.05
    images[::2, 0, BOAT, BOAT] = 1
    return Batch(images, tags, None, [str(i) for i in range(64)])
