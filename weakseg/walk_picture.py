"""What a random walk does to one image, as a picture: a cell's affinities, and the scores after 0, 1, 8, … steps."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
from numpy.typing import NDArray

from weakseg.pseudo_mask import Walk, refined_probabilities
from weakseg.random_walk import around

PANEL_PX = 280  # height of a panel
CAPTION_PX, GAP_PX = 22, 4
STEPS = (0, 1, 8)  # and the walk's own


def walk_picture(
    image: NDArray[np.uint8], cam01: NDArray[np.float32], t: float, walk: Walk, name: str
) -> NDArray[np.uint8]:
    """(PANEL_PX + CAPTION_PX, W, 3) uint8 RGB: panels side by side, of the class that is strongest in the image.

    First the surroundings of the cell where that class is strongest, and how strongly it holds on to them; then the
    class's share of each pixel after some of the steps, before any CRF.

    Args:
        image: (H, W, 3) uint8 RGB. cam01: (K, H, W) in [0, 1], K >= 1. t: the threshold of the background.
        name: of the class that is shown, for the captions.
    """
    c, y, x = np.unravel_index(int(cam01.argmax()), cam01.shape)
    panels = [
        _captioned(_surroundings(image, walk, int(y) // walk.stride, int(x) // walk.stride), "affinities of a cell")
    ]
    for steps in (*(n for n in STEPS if n < walk.config.steps), walk.config.steps):
        some = replace(walk, config=replace(walk.config, steps=steps, crf=None))
        share = refined_probabilities(image, cam01, [t], None, some)[0, 1 + int(c)]
        said = f"{name}: {steps} step{'' if steps == 1 else 's'}"
        panels.append(_captioned(_sized(_heated(image, share)), said))
    gap = np.full((panels[0].shape[0], GAP_PX, 3), 255, np.uint8)
    return np.concatenate([part for panel in panels for part in (gap, panel)][1:], axis=1)


def _surroundings(image: NDArray[np.uint8], walk: Walk, row: int, column: int) -> NDArray[np.uint8]:
    """The part of the image around the cell; its neighbours as bright as what flows to them, beside the strongest."""
    stride, reach = walk.stride, walk.config.radius - 1
    held = around(walk.affinities, walk.config.radius, row, column) ** walk.config.beta
    middle = (reach, reach)
    held[middle] = 0  # it keeps most for itself
    held /= max(float(held.max()), 1e-12)
    held[middle] = 1
    margin = reach + 2
    cells = np.zeros((2 * margin + 1, 2 * margin + 1), np.float32)
    cells[2:-2, 2:-2] = held
    pad = margin * stride
    edge = cv2.copyMakeBorder(image, pad, pad + stride, pad, pad + stride, cv2.BORDER_CONSTANT, value=(128, 128, 128))
    side = len(cells) * stride
    shown = edge[row * stride : row * stride + side, column * stride : column * stride + side]
    shown = cv2.resize(shown, (PANEL_PX, PANEL_PX), interpolation=cv2.INTER_LINEAR)
    heat = cv2.resize(cells, (PANEL_PX, PANEL_PX), interpolation=cv2.INTER_NEAREST)
    panel = _heated(np.asarray(shown, np.uint8), np.asarray(heat, np.float32))
    first, last = (round(PANEL_PX * n / len(cells)) for n in (margin, margin + 1))
    cv2.rectangle(panel, (first, first), (last, last), (255, 255, 255), 2)
    return panel


def _heated(image: NDArray[np.uint8], values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """values (H, W) in [0, 1] as colours over a grey image."""
    grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2) * 0.6
    colours = cv2.applyColorMap(np.round(np.clip(values, 0, 1) * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    alpha = np.clip(values, 0, 0.75)[..., None]
    return np.ascontiguousarray(np.round(grey * (1 - alpha) + colours * alpha).astype(np.uint8))


def _sized(panel: NDArray[np.uint8]) -> NDArray[np.uint8]:
    width = max(1, round(panel.shape[1] * PANEL_PX / panel.shape[0]))
    return np.asarray(cv2.resize(panel, (width, PANEL_PX), interpolation=cv2.INTER_AREA), np.uint8)


def _captioned(panel: NDArray[np.uint8], text: str) -> NDArray[np.uint8]:
    strip = np.full((CAPTION_PX, panel.shape[1], 3), 255, np.uint8)
    cv2.putText(strip, text, (4, CAPTION_PX - 7), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (20, 20, 20), 1, cv2.LINE_AA)
    return np.concatenate([panel, strip])
