"""Maps of several methods beside each other, as one picture: a column an image, a row a method."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from weakseg.classes import ClassTable
from weakseg.datasets import Sample, read
from weakseg.datasets.truth import Truth, open_truth
from weakseg.image import read_image
from weakseg.recipe import Recipe
from weakseg.report.colours import class_colours
from weakseg.report.layers import heat, overlay
from weakseg.report.pictures import main_split
from weakseg.run_folder import read_json

N_IMAGES = 6
CELL_PX = (160, 120)  # images are fitted into it
GAP_PX, LABEL_PX, HEADER_PX = 6, 170, 44
LIMIT_BYTES = 1_400_000
QUALITIES = (82, 70, 55, 40)
Row = tuple[str, Recipe, Path]  # a method's name, its recipe and its run folder
INK, PAPER = "#222222", "#ffffff"


def draw(rows: Sequence[Row]) -> tuple[bytes, list[str]]:
    """(a WebP file, ids of the images): image, truth, then each method's maps and the outline at its threshold.

    The images are of the first scored split that is not the training split, chosen by `spread`.
    """
    _, recipe, _ = rows[0]
    split = main_split(recipe)
    dataset = read(recipe.data, split)
    truth = open_truth(recipe.data, split, opener="report")
    names = recipe.data.scored_classes
    headline = range(len(dataset.classes)) if names is None else [dataset.classes.index(name) for name in names]
    shown = spread([sample for sample in dataset if truth.has(sample.id)], headline, N_IMAGES)
    colours = class_colours(sorted({c for sample in shown for c in sample.tags} | _seen(shown, truth)))
    width = LABEL_PX + len(shown) * (CELL_PX[0] + GAP_PX)
    height = HEADER_PX + (len(rows) + 2) * (CELL_PX[1] + GAP_PX)
    sheet = Image.new("RGB", (width, height), PAPER)
    _write_labels(sheet, ["image", "true mask", *(_label(name, folder) for name, _, folder in rows)])
    for i, sample in enumerate(shown):
        left = LABEL_PX + i * (CELL_PX[0] + GAP_PX)
        _write_tags(sheet, left, sample, dataset.classes, colours)
        for j, cell in enumerate(_column(sample, split, truth, colours, rows)):
            top = HEADER_PX + j * (CELL_PX[1] + GAP_PX)
            sheet.paste(cell, (left, top + (CELL_PX[1] - cell.height) // 2))
    return _webp(sheet), [sample.id for sample in shown]


def spread(samples: Sequence[Sample], classes: Sequence[int], n: int) -> list[Sample]:
    """n of the samples: the first of each class in turn that is not taken yet, by the order of the list.

    Where there are more classes than n, evenly spaced ones are asked first.
    """
    classes = [c for c in classes if any(c in sample.tags for sample in samples)]
    order = [classes[i * len(classes) // n] for i in range(n)] if len(classes) > n else list(classes)
    order += [c for c in classes if c not in order]
    taken: list[Sample] = []
    while len(taken) < n:
        before = len(taken)
        for c in order:
            found = next((s for s in samples if c in s.tags and s not in taken), None)
            taken += [found] if found is not None and len(taken) < n else []
        if len(taken) == before:
            break
    return taken


def _seen(samples: Sequence[Sample], truth: Truth) -> set[int]:
    """Class indices in the true masks."""
    values = {int(v) for sample in samples for v in np.unique(truth.mask(sample.id))}
    return {v - 1 for v in values if 0 < v <= len(truth.classes)}


def _column(
    sample: Sample, split: str, truth: Truth, colours: dict[int, tuple[int, int, int]], rows: Sequence[Row]
) -> list[Image.Image]:
    image = read_image(sample.image)
    scale = min(CELL_PX[0] / image.shape[1], CELL_PX[1] / image.shape[0])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    photograph = Image.fromarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    over = [overlay(truth.mask(sample.id), colours, size)]
    cells = [photograph, *(_laid(photograph, layer) for layer in over)]
    return cells + [_laid(photograph, heat(recipe, folder, split, sample, size)) for _, recipe, folder in rows]


def _laid(photograph: Image.Image, layer: NDArray[np.uint8] | None) -> Image.Image:
    """The layer over the photograph; an empty cell where there is none."""
    if layer is None:
        return Image.new("RGB", photograph.size, "#eeeeee")
    both = photograph.convert("RGBA")
    both.alpha_composite(Image.fromarray(layer))
    return both.convert("RGB")


def _label(name: str, folder: Path) -> str:
    threshold = folder / "pseudo_label" / "threshold.json"
    return f"{name}\nt = {read_json(threshold)['t']:.2f}" if threshold.is_file() else name


def _write_labels(sheet: Image.Image, labels: Sequence[str]) -> None:
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for j, label in enumerate(labels):
        middle = HEADER_PX + j * (CELL_PX[1] + GAP_PX) + CELL_PX[1] / 2
        lines = label.replace("+", "\n+ ").replace("/", "\n/ ")
        pen.multiline_text((8, middle), lines, fill=INK, font=font, anchor="lm", spacing=5)


def _write_tags(
    sheet: Image.Image, left: int, sample: Sample, classes: ClassTable, colours: dict[int, tuple[int, int, int]]
) -> None:
    """A swatch and a name each, as many as there is room for."""
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    x, y = left, 8
    for c in sample.tags:
        length = 15 + round(pen.textlength(classes.names[c], font=font)) + 8
        if x > left and x + length > left + CELL_PX[0]:
            x, y = left, y + 17
        if y + 17 > HEADER_PX:
            break
        pen.rectangle((x, y + 2, x + 10, y + 12), fill=colours[c])
        pen.text((x + 15, y), classes.names[c], fill=INK, font=font)
        x += length


def _webp(sheet: Image.Image) -> bytes:
    """The best quality that stays below LIMIT_BYTES; the lowest where none does."""
    data = b""
    for quality in QUALITIES:
        buffer = io.BytesIO()
        sheet.save(buffer, "WEBP", quality=quality, method=4)
        data = buffer.getvalue()
        if len(data) <= LIMIT_BYTES:
            break
    return data
