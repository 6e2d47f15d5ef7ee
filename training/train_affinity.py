"""Stage `affinity`: which neighbouring cells belong together, learnt from the pseudo-masks where these are sure."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import distributed
from training.data import UNLABELLED, Batch, TrainingImages
from training.device import pick_device
from training.loop import Moment, fit
from training.losses import affinity
from training.models import AFFINITY_NETWORKS, build_backbone, load_model, save_model
from training.pseudo_masks import LOWER_BAND, PseudoMasks, check_labelled
from training.randomness import seed_torch
from weakseg.datasets import read
from weakseg.errors import ConfigError
from weakseg.progress import Progress
from weakseg.random_walk import pair_offsets
from weakseg.recipe import HF_PREFIX, AffinityConfig, Recipe


def run(recipe: Recipe, folder: Path, *, stage: str, progress: Progress) -> dict[str, Any]:
    """Writes <folder>/<stage>/affinity.pt; resumes from its checkpoint."""
    config = recipe.affinity
    assert config is not None
    dataset = read(recipe.data, recipe.data.train)
    seed_torch(recipe.seed, 0)
    network = AFFINITY_NETWORKS[config.network]
    model = network(_backbone(recipe, config, folder), config.walk.radius).to(pick_device())
    radius = config.walk.radius if config.train_radius is None else config.train_radius
    _check_crop(config, model.stride, radius)
    labels = PseudoMasks(folder, recipe.data.train)
    check_labelled(labels, dataset, progress, advice=LOWER_BAND)
    images = TrainingImages(dataset, config.optim, model.backbone.mean_colour, recipe.seed, labels)
    summary = fit(model, partial(affinity_losses, radius=radius), images, folder / stage, progress=progress)
    if distributed.rank() == 0:
        path = folder / stage / "affinity.pt"
        save_model(path, model, kind="affinity", classes=dataset.classes.names, method=config.network)
    return summary


def affinity_losses(model: nn.Module, batch: Batch, moment: Moment, *, radius: int) -> dict[str, Tensor]:
    assert batch.labels is not None
    maps = model(batch.images).float()
    labels = most_frequent(batch.labels, maps.shape[2], maps.shape[3])
    offsets = [(int(dy), int(dx)) for dy, dx in pair_offsets(radius)]
    pairs = model.affinities(maps, radius)[:, : len(offsets)]  # type: ignore[operator]
    return {"affinity": affinity(pairs, labels, offsets, UNLABELLED)}


def most_frequent(labels: Tensor, height: int, width: int) -> Tensor:
    """(B, h, w) of (B, H, W): each cell's most frequent value, UNLABELLED among them; the lowest of equals."""
    values = labels.unique()
    shares = [F.adaptive_avg_pool2d((labels == value).float()[:, None], (height, width)) for value in values]
    return values[torch.cat(shares, dim=1).argmax(dim=1)]


def _backbone(recipe: Recipe, config: AffinityConfig, folder: Path) -> Any:
    """Raises ConfigError where a network that leaves its backbone as it is would learn from random features."""
    given = recipe.backbone.weights is not None or recipe.backbone.name.startswith(HF_PREFIX)
    if config.network == "irn" and config.start == "weights" and not given:
        raise ConfigError(
            "irn does not train its backbone, so it needs a trained one: expected backbone.weights, got none: "
            "set it, or --affinity.start classifier"
        )
    backbone = build_backbone(replace(recipe.backbone, output_stride=config.output_stride))
    if config.start == "classifier":
        classifier, _ = load_model(folder / "train" / "classifier.pt", kind="classifier")
        backbone.load_state_dict(classifier.backbone.state_dict())  # type: ignore[union-attr]
    return backbone


def _check_crop(config: AffinityConfig, stride: int, radius: int) -> None:
    """Raises ConfigError where no cell of a crop has all its neighbours."""
    crop, least = config.optim.crop_px, 2 * radius - 1
    setting = "walk.radius" if config.train_radius is None else "train_radius"
    if -(-crop // stride) < least:
        raise ConfigError(
            f"a crop of {crop} px is {-(-crop // stride)} cells of {stride} px wide, pairs of radius {radius} need "
            f"{least}: raise affinity.optim.crop_px to {least * stride} or lower affinity.{setting}"
        )
