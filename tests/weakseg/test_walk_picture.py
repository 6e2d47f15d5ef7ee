from __future__ import annotations

import numpy as np
import pytest

from weakseg.pseudo_mask import Walk
from weakseg.random_walk import around, pair_offsets
from weakseg.recipe import WalkConfig
from weakseg.walk_picture import CAPTION_PX, GAP_PX, PANEL_PX, walk_picture


@pytest.mark.parametrize("cell", [(3, 4), (0, 0), (5, 8)])
def test_affinities_around_a_cell_are_those_of_its_pairs(cell: tuple[int, int]) -> None:
    radius, height, width = 3, 6, 9
    offsets = pair_offsets(radius).tolist()
    affinities = np.random.default_rng(0).random((len(offsets), height, width)).astype(np.float32)
    found = around(affinities, radius, *cell)
    assert found.shape == (5, 5) and found[2, 2] == 1
    for row in range(5):
        for column in range(5):
            y, x = cell[0] + row - 2, cell[1] + column - 2
            step = [row - 2, column - 2]
            back = [-step[0], -step[1]]
            inside = 0 <= y < height and 0 <= x < width
            if inside and step in offsets:
                assert found[row, column] == affinities[(offsets.index(step), *cell)]
            elif inside and back in offsets:
                assert found[row, column] == affinities[offsets.index(back), y, x]
            elif step != [0, 0]:
                assert found[row, column] == 0


@pytest.mark.parametrize(("steps", "panels"), [(64, 5), (8, 4), (1, 3)])
def test_scores_spread_up_to_a_wall(steps: int, panels: int) -> None:
    height, width, stride = 64, 96, 8
    rows, columns = height // stride, width // stride
    offsets = pair_offsets(3)
    affinities = np.ones((len(offsets), rows, columns), np.float32)
    for s, (_, dx) in enumerate(offsets):
        for x in range(columns):
            affinities[s, :, x] = (x < 6) == (x + dx < 6)  # nothing passes between the columns 5 and 6
    cam01 = np.zeros((2, height, width), np.float32)
    cam01[1, 16:32, 8:24] = 0.9
    cam01[0, 40:48, 80:88] = 0.5
    walk = Walk(affinities, stride, WalkConfig(radius=3, steps=steps))
    picture = walk_picture(np.full((height, width, 3), 90, np.uint8), cam01, 0.4, walk, "cat")
    wide = round(PANEL_PX * width / height)
    assert picture.shape == (PANEL_PX + CAPTION_PX, PANEL_PX + (panels - 1) * (wide + GAP_PX), 3)
    last = picture[:PANEL_PX, -wide:].astype(int)
    assert np.ptp(last[:, wide // 2 + 30 :], axis=(0, 1)).max() < 20, "nothing came through the wall"
    if steps == 64:
        first = picture[:PANEL_PX, PANEL_PX + GAP_PX : PANEL_PX + GAP_PX + wide].astype(int)
        before, after = (np.ptp(panel[:, : wide // 2 - 30], axis=(0, 1)).max() for panel in (first, last))
        assert before > 100 and after < 30, "it spreads evenly over its own side"
