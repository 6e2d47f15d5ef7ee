"""What methods that learn from seeds begin with: maps of the training images from a plain classifier, and the few
pixels that can be trusted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from training import cams, distributed, methods
from training.data import TrainingImages
from training.device import pick_device
from training.graphs import ClassifierGraph
from training.loop import fit
from training.make_cams import image_cam
from training.models import build_backbone, load_model, save_model
from training.randomness import seed_torch
from training.saliency import saliency_of
from weakseg.cam import mask_values
from weakseg.cam_file import CamFile, read_cam
from weakseg.classes import BACKGROUND, ignore_value, mask_dtype, voc_palette
from weakseg.datasets import Dataset, Sample
from weakseg.errors import ConfigError
from weakseg.files import write_bytes_atomic
from weakseg.image import read_image
from weakseg.masks.png import labels_from_png, png_from_labels, provenance_text
from weakseg.progress import Progress
from weakseg.recipe import GuidedConfig, OptimConfig, Recipe, SecConfig
from weakseg.run_folder import cam_path, mask_path

FOLDER = "seeds"  # in the folder of the stage
LABELS = "labels"  # in that


def shared_out(optim: OptimConfig, config: SecConfig | GuidedConfig) -> tuple[OptimConfig, OptimConfig]:
    """The budget in two: `seeds_share` of its epochs for the classifier that makes seeds, and what is left.

    Who learns from seeds does so at `lr_scale` of the learning rate.

    Raises:
        ConfigError: one of them gets no epoch, or no learning rate.
    """
    if not config.lr_scale > 0:
        raise ConfigError(f"lr_scale must be above 0, got {config.lr_scale:g}: 0.1 is the default")
    epochs = round(optim.epochs * config.seeds_share)
    if not 0 < epochs < optim.epochs:
        raise ConfigError(
            f"expected seeds_share to leave an epoch for the classifier that makes seeds and one for the method, got "
            f"{config.seeds_share:g} of {optim.epochs} epochs: raise train.optim.epochs or choose a share nearer to 0.5"
        )
    rest = replace(optim, epochs=optim.epochs - epochs, lr=config.lr_scale * optim.lr)
    return replace(optim, epochs=epochs), rest


def make_seed_maps(recipe: Recipe, dataset: Dataset, folder: Path, optim: OptimConfig, progress: Progress) -> None:
    """Train a plain classifier, seeds/classifier.pt, and write its maps of each image's tags; goes on where it stopped.

    Maps have the recipe's scales and flips. Of several processes each makes a share of them.
    """
    folder = folder / FOLDER
    if not (folder / "classifier.pt").is_file():
        _train(recipe, dataset, folder, optim, progress)
    distributed.wait()
    model, _ = load_model(folder / "classifier.pt", kind="classifier")
    device = pick_device()
    graph = ClassifierGraph(model, cams.get("cam"), recipe.cam.scales, recipe.cam.flip).to(device).eval()
    graph.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    share = dataset.samples[distributed.rank() :: distributed.size()]
    todo = [sample for sample in share if not cam_path(folder, dataset.split, sample.id).is_file()]
    for sample in progress.each(todo, "seeds", total=len(todo)):
        file = image_cam(graph, read_image(sample.image), sample.tags, device)
        file.save(cam_path(folder, dataset.split, sample.id))
    distributed.wait()


def seed_map(folder: Path, dataset: Dataset, sample: Sample) -> CamFile:
    """What `make_seed_maps` has made of one image, maps (K, h, w) of its K tags."""
    return read_cam(cam_path(folder / FOLDER, dataset.split, sample.id))


def start_backbone(model: nn.Module, folder: Path) -> None:
    """Give the model's backbone the weights of the classifier that has made the seeds.

    From start weights a short training on a few seeds collapses to background.
    """
    classifier, _ = load_model(folder / FOLDER / "classifier.pt", kind="classifier")
    model.backbone.load_state_dict(classifier.backbone.state_dict())  # type: ignore[union-attr]


@dataclass(frozen=True)
class SeedLabels:
    """Label maps (H, W) as `make_seed_labels` has written them, what is undecided as C + 1.

    A crop that reaches beyond its image is IGNORE there: the two are not to be mistaken for each other.
    """

    folder: Path
    split: str
    n_classes: int

    def __call__(self, sample: Sample) -> NDArray[np.integer]:
        labels = labels_from_png(_labels_path(self.folder, self.split, sample).read_bytes())
        undecided = labels == ignore_value(labels)
        known = labels.astype(mask_dtype(self.n_classes + 1))
        known[undecided] = self.n_classes + 1
        return known


def make_seed_labels(
    recipe: Recipe, config: SecConfig, dataset: Dataset, folder: Path, progress: Progress
) -> SeedLabels:
    """Train a plain classifier and write seeds/labels/<split>/<id>.png of every image; goes on where it stopped.

    Of several processes each makes a share of them.

    Raises:
        ConfigError, DatasetError: a budget that cannot be shared out, saliency maps that cannot be used.
    """
    optim, _ = shared_out(recipe.train.optim, config)
    salient_of = saliency_of(config.saliency, dataset, folder, progress)  # before the training: it may refuse
    make_seed_maps(recipe, dataset, folder, optim, progress)
    fields = {"mask": "seeds", "recipe": recipe.name, "seed": recipe.seed}
    text = provenance_text(fields | {"share_of_maximum": config.seed, "background": config.background})
    share = dataset.samples[distributed.rank() :: distributed.size()]
    todo = [sample for sample in share if not _labels_path(folder, dataset.split, sample).is_file()]
    for sample in progress.each(todo, "seed labels", total=len(todo)):
        cam = seed_map(folder, dataset, sample)
        salient = salient_of(sample) if sample.tags else None
        labels = seed_labels(cam.cam01(), cam.classes, salient, len(dataset.classes), config.seed, config.background)
        png = png_from_labels(labels, voc_palette(), text)
        write_bytes_atomic(_labels_path(folder, dataset.split, sample), png)
    distributed.wait()
    return SeedLabels(folder, dataset.split, len(dataset.classes))


def seed_labels(
    cam01: NDArray[np.float32],
    classes: NDArray[Any],
    salient: NDArray[np.float32] | None,
    n_classes: int,
    seed: float,
    background: float,
) -> NDArray[Any]:
    """The few pixels of an image that are all but certain, IGNORE elsewhere.

    A class's: where its map is at least `seed` of its maximum. Background's: the share `background` of the pixels that
    is least salient, and all that are no more salient than those, but none of the most salient. A pixel that several of
    them claim is that one's which claims the fewest pixels, of equals the last's.

    Args:
        cam01: (K, H, W) >= 0, classes (K,) their indices. K = 0: the image is background, every pixel.
        salient: (H, W), any scale; None = the largest of the maps.
    Returns:
        (H, W) label map in `mask_dtype(n_classes)`.
    Source: SEC, Kolesnikov & Lampert, ECCV 2016.
    """
    if not len(classes):
        return np.full(cam01.shape[1:], BACKGROUND, dtype=mask_dtype(n_classes))
    salient = cam01.max(axis=0) if salient is None else salient
    claims = [(BACKGROUND, _least(salient, background))]
    for value, values in zip(mask_values(classes, n_classes), cam01, strict=True):
        claims.append((value, (values > 0) & (values >= np.float32(seed) * values.max())))
    labels = np.zeros(cam01.shape[1:], dtype=mask_dtype(n_classes))
    labels[:] = ignore_value(labels)
    for value, claimed in sorted(claims, key=lambda claim: -np.count_nonzero(claim[1])):
        labels[claimed] = value
    return labels


def _least(values: NDArray[np.float32], share: float) -> NDArray[np.bool_]:
    """Where the smallest of `values` are, at least the share of them; nowhere where all are the same."""
    n = round(share * values.size)
    if n == 0:
        return np.zeros(values.shape, dtype=np.bool_)
    limit = np.partition(values, n - 1, axis=None)[n - 1]
    return (values <= limit) & (values < values.max())


def _labels_path(folder: Path, split: str, sample: Sample) -> Path:
    return mask_path(folder / FOLDER, split, sample.id, LABELS)


def _train(recipe: Recipe, dataset: Dataset, folder: Path, optim: OptimConfig, progress: Progress) -> None:
    plain = methods.get(methods.PLAIN)
    seed_torch(recipe.seed, 0)
    model = plain.build(build_backbone(recipe.backbone), len(dataset.classes), recipe.train).to(pick_device())
    images = TrainingImages(dataset, optim, model.backbone.mean_colour, recipe.seed)
    fit(model, plain.losses_of(recipe.train), images, folder, progress=progress)
    if distributed.rank() == 0:
        save_model(
            folder / "classifier.pt", model, kind="classifier", classes=dataset.classes.names, method=methods.PLAIN
        )
