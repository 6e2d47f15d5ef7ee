"""Small models, data and batches for the tests of training methods."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.training.cams.networks import transformer
from training import methods
from training.data import Batch, TrainingImages, collate
from training.models import build_backbone
from training.models.erasing import ErasingClassifier
from training.step import Moment
from weakseg import presets
from weakseg.datasets import Dataset, read
from weakseg.progress import Progress
from weakseg.recipe import BackboneConfig, Recipe, TrainConfig

START, END = Moment(0, 0, 0.0), Moment(99, 9, 0.99)
HEAD, BODY = slice(2, 4), slice(8, 10)  # columns of `animals`


def backbone_for(method: str) -> BackboneConfig:
    """One that learns as a whole, with batch norm of stored statistics: an image is the same alone or in a batch."""
    if methods.base_of(method) == "class_tokens":
        return transformer()
    return BackboneConfig(name="small_resnet", freeze_stages=0)


def model_of(method: str, n_classes: int = 3, config: TrainConfig | None = None, seed: int = 0) -> nn.Module:
    """With random weights, in training mode."""
    torch.manual_seed(seed)
    config = replace(config or TrainConfig(), method=method)
    return methods.get(method).build(build_backbone(backbone_for(method)), n_classes, config).train()


def learnt(model: nn.Module) -> nn.Module:
    """As after a training: all steps of erasing count for all classes, which otherwise have maps of 0; others as is."""
    if isinstance(model, ErasingClassifier):
        model.loss_weights += 1
    return model


def losses_of(method: str, config: TrainConfig | None = None) -> Any:
    config = replace(config or TrainConfig(), method=method)
    return methods.get(method).losses_of(config)


def batch(n_classes: int = 3, side: int = 64, tags: list[tuple[int, ...]] | None = None, seed: int = 1) -> Batch:
    """Noise with tags and without labels."""
    tags = [(0,), (1, 2)] if tags is None else tags
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (len(tags), 3, side, side), generator=generator, dtype=torch.uint8)
    vectors = torch.zeros(len(tags), n_classes)
    for vector, present in zip(vectors, tags, strict=True):
        vector[list(present)] = 1
    return Batch(images, vectors, None, [f"image-{i}" for i in range(len(tags))])


def with_method(recipe: Recipe, method: str, epochs: int = 2) -> Recipe:
    """A recipe of few, small steps of the method."""
    recipe = presets.with_method(recipe, method)
    optim = replace(recipe.train.optim, epochs=epochs, batch_size=4, crop_px=64, long_side_px=(64, 96), workers=0)
    return replace(recipe, backbone=backbone_for(method), train=replace(recipe.train, optim=optim))


def real_batch(recipe: Recipe, folder: Path, n: int = 4, dataset: Dataset | None = None) -> Batch:
    """The first images of a dataset, or of the recipe's training split, with the labels that its method makes."""
    dataset = read(recipe.data, recipe.data.train) if dataset is None else dataset
    method: Any = methods.get(recipe.train.method)
    labels = None
    if hasattr(method, "labels_of"):
        labels = method.labels_of(recipe, dataset, folder, Progress("silent"))
    images = TrainingImages(dataset, recipe.train.optim, (124, 116, 104), recipe.seed, labels)
    return collate([images[0, i] for i in range(n)])


def total(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum()


class GivenFeatures(nn.Module):
    """A backbone for "images" of two channels that are the features themselves; 0 is their mean colour."""

    channels, mean = (2,), torch.zeros(1, 2, 1, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images]


def animals() -> Batch:
    """64 images of 4 x 12 cells: half with head and body, apart, of the rest every fourth with a body."""
    tags, images = torch.zeros(64, 1), torch.zeros(64, 2, 4, 12)
    tags[:32] = 1
    images[:32, 0, :, HEAD] = 1
    images[:32, 1, :, BODY] = 1
    images[32::4, 1, :, BODY] = 1
    return Batch(images, tags, None, [str(i) for i in range(64)])
