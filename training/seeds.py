"""Maps of the training images from a plain classifier, for methods that learn from seeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from training import cams, distributed, methods
from training.data import TrainingImages
from training.device import pick_device
from training.graphs import ClassifierGraph
from training.loop import fit
from training.make_cams import image_cam
from training.models import build_backbone, load_model, save_model
from training.randomness import seed_torch
from weakseg.cam_file import CamFile, read_cam
from weakseg.datasets import Dataset, Sample
from weakseg.errors import ConfigError
from weakseg.image import read_image
from weakseg.progress import Progress
from weakseg.recipe import OptimConfig, Recipe
from weakseg.run_folder import cam_path

FOLDER = "seeds"  # in the folder of the stage


def shared_out(optim: OptimConfig, share: float) -> tuple[OptimConfig, OptimConfig]:
    """The budget in two: `share` of its epochs for the classifier that makes seeds, the rest for who learns from them.

    Raises:
        ConfigError: one of them gets no epoch.
    """
    epochs = round(optim.epochs * share)
    if not 0 < epochs < optim.epochs:
        raise ConfigError(
            f"expected seeds_share to leave an epoch for the classifier that makes seeds and one for the method, got "
            f"{share:g} of {optim.epochs} epochs: raise train.optim.epochs or choose a share nearer to 0.5"
        )
    return replace(optim, epochs=epochs), replace(optim, epochs=optim.epochs - epochs)


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
