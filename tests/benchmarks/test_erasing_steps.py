"""Counts and colours of benchmarks/erasing_steps.py, on what can be counted by hand."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.erasing_steps import OVER_ERASED, TILE, UpTo, count, row, rows, shown, tile
from tests.training.methods.parts import batch, learnt, model_of
from weakseg.scoring import Confusion


def test_what_is_counted_is_the_union_of_the_steps() -> None:
    """12 pixels in a row of three cells, class 0 on the first 8; a map's edge lies between two cells."""
    truth = np.repeat(np.array([[1] * 8 + [0] * 4], dtype=np.uint8), 4, axis=0)
    steps = np.array([[3.0, 0, 0], [3, 3, 0], [3, 3, 3]], dtype=np.float32).reshape(3, 1, 1, 3)
    scores = [Confusion(2) for _ in steps]
    count(scores, truth, steps, (0,), 0.5)
    count(scores, np.zeros((4, 12), dtype=np.uint8), np.zeros((3, 0, 1, 3), dtype=np.float32), (), 0.5)
    model = model_of("erasing", n_classes=2)
    model.note(0, torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]))
    model.note(1, torch.tensor([3.0, 0.0]), torch.tensor([2.0, 0.0]))
    assert rows(scores, model, ["a", "b"]) == [  # type: ignore[arg-type]
        ["a", "1", "0.500", "yes", "50.0", "0.0", "50.0"],
        ["a", "2", "1.500", "no", "100.0", "0.0", "0.0"],
        ["a", "3", "0.000", "no", "66.7", "33.3", "0.0"],
        ["b", "1", "0.000", "yes", "-", "-", "-"],
        ["b", "2", "0.000", "yes", "-", "-", "-"],
        ["b", "3", "0.000", "no", "-", "-", "-"],
    ]
    assert [score.n_images for score in scores] == [2, 2, 2]


def test_all_steps_are_the_runs_own_maps() -> None:
    model = learnt(model_of("erasing")).eval()
    with torch.no_grad():
        logits, maps = UpTo().maps(model, batch().images)
        out = model(batch().images)
    by_steps = maps.unflatten(1, (3, 3))
    assert torch.equal(by_steps[:, 0], out.steps[:, 0]) and torch.equal(by_steps[:, 2], out.cam)
    assert (by_steps[:, 1] >= by_steps[:, 0]).all() and torch.equal(logits, out.logits)


def test_what_is_erased_of_the_background_stands_out() -> None:
    image = np.full((1, 4, 3), 50, dtype=np.uint8)
    erased = np.array([[0, 1, 1, 0.5]], dtype=np.float32)
    background = np.array([[True, True, False, False]])
    colours = shown(image, erased, background, (100, 110, 120))[0]
    assert colours.tolist() == [[50, 50, 50], list(OVER_ERASED), [100, 110, 120], [75, 80, 85]]


def test_a_row_of_the_picture_is_of_maps_that_are_made_without_tags() -> None:
    model, seen = learnt(model_of("erasing")), []
    model.register_forward_pre_hook(lambda _, args, given: seen.append((len(args), given)), with_kwargs=True)
    image = batch().images[0].permute(1, 2, 0).numpy()
    drawn = row(model, image, (0, 2), np.zeros(image.shape[:2], dtype=bool))  # type: ignore[arg-type]
    assert drawn.shape == (TILE, 6 * TILE, 3) and drawn.dtype == np.uint8 and seen == [(1, {})]
    assert (drawn[:, :TILE] != drawn[:, 2 * TILE : 3 * TILE]).any(), "the second step is shown less"


def test_tiles_have_one_size() -> None:
    for height, width in ((300, 100), (7, 900), (10, 10)):
        out = tile(np.zeros((height, width, 3), dtype=np.uint8))
        assert out.shape == (TILE, TILE, 3) and out.min() == 0 and out.max() == 255
