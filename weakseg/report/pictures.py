"""Which images a report shows, and what of each: photograph, heatmap, pseudo-mask, prediction, truth."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from weakseg.classes import BACKGROUND, ClassTable, ignore_value
from weakseg.datasets import Dataset, Sample, read
from weakseg.datasets.truth import Truth, has_truth, open_truth
from weakseg.image import read_image
from weakseg.masks.png import labels_from_png
from weakseg.progress import Progress
from weakseg.recipe import Recipe
from weakseg.report.colours import class_colours
from weakseg.report.layers import heat, overlay
from weakseg.run_folder import mask_path, prediction_path
from weakseg.scoring import Confusion
from weakseg.stages import mask_stage

N_SHOWN = 12
MAX_RANKED = 1000  # of a larger split, evenly spaced ones are ranked
LONG_SIDE_PX = 360
FEW_CLASSES = 10  # so many have a colour even when no shown image has them
LAYERS = ("CAM", "pseudo-mask", "prediction", "truth")  # over the photograph, in this order
Paths = Callable[[str, str, Sample], Path]  # (layer, split, sample) -> its label map
GROUPS = ("best", "around the median", "worst")


@dataclass(frozen=True)
class Picture:
    """One image of the report. Layers are data URIs of transparent pictures over the photograph, None = not there."""

    id: str
    tags: tuple[str, ...]
    height: int
    width: int
    photograph: str
    layers: dict[str, str | None]  # by name, all of LAYERS
    iou: float | None
    group: str | None


@dataclass(frozen=True)
class Pictures:
    """What the page shows of one split. ranked_by: whose label maps the IoU is of; None = no truth, no ranking."""

    split: str
    shown: list[Picture]
    colours: dict[int, tuple[int, int, int]]  # class index -> RGB, of the classes that the page speaks of
    classes: ClassTable
    n_images: int
    n_ranked: int
    ranked_by: str | None


def main_split(recipe: Recipe) -> str:
    """The first scored split that is not the training split; the training split when there is no other."""
    others = [split for split in recipe.evaluate.splits if split != recipe.data.train]
    return others[0] if others else recipe.data.train


def choose_pictures(recipe: Recipe, folder: Path, progress: Progress) -> Pictures:
    """The best, median and worst images by their own IoU; evenly spaced ones where nothing can be ranked."""
    split = main_split(recipe)
    dataset = read(recipe.data, split)
    paths = partial(_path, folder, mask_stage(recipe))
    truth = open_truth(recipe.data, split, opener="report") if has_truth(recipe.data) else None
    names = recipe.data.scored_classes
    scored = None if names is None else [dataset.classes.index(name) for name in names]
    ranked_by = next((what for what in ("prediction", "pseudo-mask") if _made(paths, what, dataset)), None)
    candidates = _spaced(dataset.samples, MAX_RANKED)
    ranking: list[tuple[Sample, float]] = []
    if truth is not None and ranked_by is not None:
        ranking = _ranking(paths, split, ranked_by, candidates, truth, scored, progress)
    chosen = _best_median_worst(ranking) or [(sample, None, None) for sample in _spaced(dataset.samples, N_SHOWN)]
    maps = [_label_maps(paths, split, sample, truth) for sample, _, _ in chosen]
    seen = {int(c) - 1 for per_image in maps for labels in per_image.values() for c in _values(labels)}
    seen |= {c for sample, _, _ in chosen for c in sample.tags}
    headline = range(len(dataset.classes)) if scored is None else scored
    seen |= set(headline) if len(headline) <= FEW_CLASSES else set()
    colours = class_colours(sorted(seen))
    shown = [
        _picture(recipe, folder, split, sample, layers, colours, dataset.classes, iou, group)
        for (sample, iou, group), layers in zip(chosen, maps, strict=True)
    ]
    return Pictures(split, shown, colours, dataset.classes, len(dataset), len(ranking), ranked_by if ranking else None)


def _ranking(
    paths: Paths,
    split: str,
    what: str,
    samples: Sequence[Sample],
    truth: Truth,
    scored: list[int] | None,
    progress: Progress,
) -> list[tuple[Sample, float]]:
    """(sample, mean IoU of the foreground classes in its truth or its label map), best first."""
    out = []
    for sample in progress.each(samples, "report: rank images", total=len(samples)):
        path = paths(what, split, sample)
        if not path.is_file() or not truth.has(sample.id):
            continue
        confusion = Confusion(len(truth.classes))
        confusion.add(truth.mask(sample.id), labels_from_png(path.read_bytes()))
        foreground = confusion.scores(scored).iou[1:]
        if not np.isnan(foreground).all():
            out.append((sample, float(np.nanmean(foreground))))
    return sorted(out, key=lambda pair: (-pair[1], pair[0].id))


def _best_median_worst(ranking: list[tuple[Sample, float]]) -> list[tuple[Sample, float | None, str | None]]:
    """Four of each; every image once, so a short ranking gives fewer."""
    each = N_SHOWN // len(GROUPS)
    middle = max(each, (len(ranking) - each) // 2)
    starts = (0, middle, max(middle + each, len(ranking) - each))
    return [
        (*pair, group) for start, group in zip(starts, GROUPS, strict=True) for pair in ranking[start : start + each]
    ]


def _label_maps(paths: Paths, split: str, sample: Sample, truth: Truth | None) -> dict[str, NDArray[Any]]:
    maps: dict[str, NDArray[Any]] = {}
    for what in ("pseudo-mask", "prediction"):
        path = paths(what, split, sample)
        if path.is_file():
            maps[what] = labels_from_png(path.read_bytes())
    if truth is not None and truth.has(sample.id):
        maps["truth"] = truth.mask(sample.id)
    return maps


def _picture(
    recipe: Recipe,
    folder: Path,
    split: str,
    sample: Sample,
    maps: dict[str, NDArray[Any]],
    colours: dict[int, tuple[int, int, int]],
    classes: ClassTable,
    iou: float | None,
    group: str | None,
) -> Picture:
    image = read_image(sample.image)
    full_height, full_width = image.shape[:2]
    scale = min(1.0, LONG_SIDE_PX / max(full_height, full_width))
    size = (max(1, round(full_width * scale)), max(1, round(full_height * scale)))
    heated = heat(recipe, folder, split, sample, size)
    layers: dict[str, str | None] = {"CAM": None if heated is None else _webp(heated, quality=70)}
    for what in LAYERS[1:]:
        layers[what] = _webp(overlay(maps[what], colours, size), lossless=True) if what in maps else None
    return Picture(
        sample.id,
        tuple(classes.names[c] for c in sample.tags),
        size[1],
        size[0],
        _webp(cv2.resize(image, size, interpolation=cv2.INTER_AREA), quality=78),
        layers,
        iou,
        group,
    )


def _webp(pixels: NDArray[Any], **options: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", method=4, **options)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _path(folder: Path, masks: str, what: str, split: str, sample: Sample) -> Path:
    if what == "prediction":
        return prediction_path(folder, "segmentation", split, sample.id)
    return mask_path(folder, split, sample.id, masks)


def _made(paths: Paths, what: str, dataset: Dataset) -> bool:
    return any(paths(what, dataset.split, sample).is_file() for sample in dataset)


def _values(labels: NDArray[Any]) -> list[int]:
    return [int(v) for v in np.unique(labels) if v not in (BACKGROUND, ignore_value(labels))]


def _spaced(samples: Sequence[Sample], n: int) -> list[Sample]:
    """n of the samples, evenly spaced; all when there are no more."""
    if len(samples) <= n:
        return list(samples)
    return [samples[i * len(samples) // n] for i in range(n)]
