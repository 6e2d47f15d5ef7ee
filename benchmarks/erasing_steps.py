"""What each step of adversarial erasing adds: `python -m benchmarks.erasing_steps runs/synthetic-erasing`.

Of a run of `weakseg run RECIPE:erasing`, as far as its pseudo-masks: for each class and step the true positives, false
positives and false negatives of all steps up to it, in percent of the three together, with the images' tags and at the
run's own threshold; beside them the step's mean loss of the class in training, and whether it counts for the class.
Over-erasing is where false positives grow by more than false negatives shrink. The tables go to stderr.

The picture, <folder>/erasing_steps-<split>.png, has a row for each image and two columns for each step: what the step
was shown, the mean colour where earlier ones have found something, magenta where what they found is background; and the
step's map of the image's classes. Tags say which maps are counted and drawn; the maps are made without.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.line import line
from training.device import pick_device
from training.graphs import ClassifierGraph, canvas_images
from training.models import load_model
from training.models.erasing import ErasingClassifier
from training.models.layers import CANVAS
from training.pseudo_label import scored_indices
from weakseg.cam import labels_from_cam, normalise, upsample
from weakseg.classes import BACKGROUND
from weakseg.datasets import read
from weakseg.datasets.truth import Truth, open_truth, trusted
from weakseg.errors import ConfigError
from weakseg.files import write_bytes_atomic
from weakseg.image import read_image
from weakseg.progress import Progress
from weakseg.recipe import Recipe
from weakseg.report import recipe_of
from weakseg.run_folder import read_json
from weakseg.scoring import Confusion
from weakseg.text import table
from weakseg.threshold import Threshold

Image = NDArray[np.uint8]
TILE = 160  # pixels of a side in the picture
OVER_ERASED = (255, 0, 255)
HEAD = ["class", "step", "loss", "counts", "TP", "FP", "FN"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="run folder")
    parser.add_argument("--images", type=int, default=6, help="rows of the picture")
    args = parser.parse_args(argv)
    recipe = recipe_of(args.folder)
    model, _ = load_model(args.folder / "train" / "classifier.pt", kind="classifier")
    if not isinstance(model, ErasingClassifier):
        raise ConfigError(f"expected a run with train.method erasing, got {recipe.train.method}: name another folder")
    model.to(pick_device())
    for split in recipe.evaluate.splits:
        with trusted("scorer", __spec__.name):
            truth = open_truth(recipe.data, split, opener="scorer")
        scores, names = scored(recipe, args.folder, split, model, truth), truth.classes.names
        print(f"{split}\n{table(HEAD, rows(scores, model, names))}", file=sys.stderr)
        for k, score in enumerate(scores, 1):
            miou = score.scores(scored_indices(recipe, truth.classes)).miou
            line(f"erasing.{split}.steps_{k}", 100 * miou, unit="points of mIoU")
        path = args.folder / f"erasing_steps-{split}.png"
        write_bytes_atomic(path, picture(recipe, split, model, truth, args.images))
        print(path, file=sys.stderr)


class UpTo:
    """CAM method: of each number of steps, the maps that the first so many make; one after the other."""

    EXPORTABLE = True

    def maps(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        out = model(images)
        return out.logits, out.steps.cummax(dim=1).values.flatten(1, 2)


def scored(recipe: Recipe, folder: Path, split: str, model: ErasingClassifier, truth: Truth) -> list[Confusion]:
    """The split's confusion with the first step, the first two, ..."""
    t = Threshold.from_dict(read_json(folder / "pseudo_label" / "threshold.json")).t
    graph = ClassifierGraph(model, UpTo(), recipe.cam.scales, recipe.cam.flip).eval()
    dataset = read(recipe.data, split)
    scores = [Confusion(len(dataset.classes)) for _ in model.members]
    for sample in Progress().each(dataset.samples, f"score {split}", total=len(dataset)):
        image = read_image(sample.image)
        with torch.inference_mode():
            cam = graph(torch.from_numpy(image[None]).to(pick_device()))["cam"][0]
        maps = cam.unflatten(0, (len(scores), -1))[:, list(sample.tags)].cpu().numpy()
        count(scores, truth.mask(sample.id, image.shape[:2]), maps, sample.tags, t, recipe.cam.normalisation)
    return scores


def count(
    scores: Sequence[Confusion],
    truth: NDArray[Any],
    maps: NDArray[np.float32],
    tags: Sequence[int],
    t: float,
    normalisation: Any = "max",
) -> None:
    """Add one image to each number of steps.

    Args:
        truth: (H, W) label map. maps: (S, K, ceil(H/4), ceil(W/4)) of the K tags with 1, 2, ... S steps.
    """
    for score, some in zip(scores, maps, strict=True):
        cam01 = upsample(normalise(some, normalisation), *truth.shape)
        score.add(truth, labels_from_cam(cam01, np.array(tags, dtype=int), t, score.n_classes))


def rows(scores: Sequence[Confusion], model: ErasingClassifier, names: Sequence[str]) -> list[list[str]]:
    """A row for each class and step, in the order of HEAD; shares in percent, "-" for a class that was not seen."""
    losses = model.loss_sums / model.loss_weights.clamp(min=1e-12)
    kept = model.kept()
    shares = [(of.iou, of.fp, of.fn) for of in (score.scores() for score in scores)]
    return [
        [
            name,
            str(k + 1),
            f"{float(losses[k, c]):.3f}",
            "yes" if kept[k, c] else "no",
            *("-" if np.isnan(share[c + 1]) else f"{100 * share[c + 1]:.1f}" for share in shares[k]),
        ]
        for c, name in enumerate(names)
        for k in range(len(scores))
    ]


def picture(recipe: Recipe, split: str, model: ErasingClassifier, truth: Truth, n: int) -> bytes:
    """PNG of the first n images with tags."""
    drawn = []
    for sample in [sample for sample in read(recipe.data, split) if sample.tags][:n]:
        image = read_image(sample.image)
        drawn.append(row(model, image, sample.tags, truth.mask(sample.id, image.shape[:2]) == BACKGROUND))
    return cv2.imencode(".png", np.concatenate(drawn)[..., ::-1])[1].tobytes()


def row(model: ErasingClassifier, image: Image, tags: Sequence[int], background: NDArray[np.bool_]) -> Image:
    """(TILE, 2 S TILE, 3): what each step is shown, and its maps of the tags; the view at scale 1 of what is counted.

    As in a graph nobody tells the model the tags: they say which of its maps are drawn.
    """
    height, width = image.shape[:2]
    canvas = canvas_images(torch.from_numpy(image[None]).to(pick_device()), model.backbone.mean, CANVAS)
    with torch.inference_mode():
        out = model.eval()(canvas)
    steps = out.steps[0, :, list(tags)].amax(dim=1)  # (S, h, w)
    heat = nn.functional.interpolate(steps[None], size=canvas.shape[2:], mode="bilinear")[0]
    heat = (heat / steps.amax().clamp(min=1e-5)).cpu().numpy()[:, :height, :width]
    erased = out.erased[0, :, 0].cpu().numpy()[:, :height, :width]
    tiles = []
    for k in range(len(steps)):
        tiles += [tile(shown(image, erased[k], background, model.backbone.mean_colour)), tile(warm(image, heat[k]))]
    return np.concatenate(tiles, axis=1)


def shown(image: Image, erased: NDArray[np.float32], background: NDArray[np.bool_], fill: Sequence[int]) -> Image:
    """(H, W, 3): what a step sees, but OVER_ERASED where erased pixels (H, W) are background."""
    colours = np.where(background[..., None], np.array(OVER_ERASED), np.array(fill))
    return np.round(image + (colours - image) * erased[..., None]).astype(np.uint8)


def warm(image: Image, heat: NDArray[np.float32]) -> Image:
    """The image under a heat map (H, W) in [0, 1]."""
    coloured = cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_TURBO)[..., ::-1]
    return (0.5 * image + 0.5 * coloured).astype(np.uint8)


def tile(image: Image) -> Image:
    """(TILE, TILE, 3): the image at a long side of TILE - 4, on white."""
    scale = (TILE - 4) / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    out = np.full((TILE, TILE, 3), 255, dtype=np.uint8)
    out[2 : 2 + size[1], 2 : 2 + size[0]] = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return out


if __name__ == "__main__":
    main()
