"""EPS: explicit pseudo-pixel supervision. Lee et al., CVPR 2021.

Tags say which classes are there, saliency says where anything is. The maps of the classes add up to the salient, and
the map of background to the rest: so they end at the outlines of things.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from training.data import UNLABELLED, Batch, LabelSource
from training.loop import Losses, Moment
from training.losses import multilabel_soft_margin
from training.models.backbone import Backbone
from training.models.pixel_classifier import PixelClassifier
from training.saliency import SaliencyMaps, saliency_of
from weakseg.classes import BACKGROUND, IGNORE
from weakseg.datasets import Dataset, Sample
from weakseg.errors import ConfigError
from weakseg.image import probe
from weakseg.progress import Progress
from weakseg.recipe import EpsConfig, Recipe, TrainConfig

NETWORK = PixelClassifier
SALIENT = 254  # in label maps, of which 255 is beyond the image


def build(backbone: Backbone, n_classes: int, config: TrainConfig) -> nn.Module:
    check(config.eps)
    return PixelClassifier(backbone, n_classes, config.dropout, pooling="mean")


def labels_of(recipe: Recipe, dataset: Dataset, folder: Path, progress: Progress) -> LabelSource:
    return SaliencyLabels(saliency_of(recipe.train.eps.saliency, dataset, folder, progress))


def losses_of(config: TrainConfig) -> Losses:
    return partial(losses, config=config.eps)


def losses(model: nn.Module, batch: Batch, moment: Moment, config: EpsConfig) -> dict[str, Tensor]:
    """Multi-label soft margin of the mean scores, and w times the saliency loss."""
    assert batch.labels is not None
    out = model(batch.images)
    saliency, known = on_cells(batch.labels, (out.scores.shape[2], out.scores.shape[3]))
    found = estimated(out.scores.softmax(dim=1), batch.tags, saliency, known, config.tau, config.balance)
    return {
        "classification": multilabel_soft_margin(out.logits, batch.tags),
        "saliency": config.weight * ((found - saliency) ** 2 * known).sum() / known.sum().clamp(min=1),
    }


def check(config: EpsConfig) -> None:
    """Raises ConfigError when a setting is none that the loss can be made with."""
    if not (0 <= config.tau < 1 and 0 <= config.balance <= 1 and config.weight >= 0):
        raise ConfigError(
            f"train.eps: expected tau in [0, 1), balance in [0, 1] and weight >= 0, got {config.tau:g}, "
            f"{config.balance:g} and {config.weight:g}: the authors have 0.4, 0.5 and 1"
        )


@dataclass(frozen=True)
class SaliencyLabels:
    """(H, W) uint8 of an image: its saliency times SALIENT, or IGNORE everywhere where it has none."""

    maps: SaliencyMaps

    def __call__(self, sample: Sample) -> NDArray[np.integer]:
        saliency = self.maps(sample)
        if saliency is None:
            return np.full(probe(sample.image.read_bytes()).oriented_size, IGNORE, dtype=np.uint8)
        return np.round(saliency * SALIENT).astype(np.uint8)


def on_cells(labels: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Mean saliency of the pixels of each cell, in [0, 1], and which cells have any.

    Args:
        labels: (B, H, W) int64 of `SaliencyLabels`, UNLABELLED where there is none. size: (h, w) of the cells.
    Returns:
        (B, h, w) float32 and bool; 0 where there is none.
    """
    known = (labels != UNLABELLED).float()
    share = F.adaptive_avg_pool2d(known, size)
    saliency = F.adaptive_avg_pool2d(labels.float() / SALIENT * known, size) / share.clamp(min=1e-6)
    return saliency, share > 0


def estimated(p: Tensor, tags: Tensor, saliency: Tensor, known: Tensor, tau: float, balance: float) -> Tensor:
    """b sum_valid p_c + (1 - b) (1 - p_0 - sum_others p_c): what the maps say of saliency.

    A present class is valid if more than tau of its cells are salient: others, such as grass or a sofa, belong to what
    the saliency map takes for background. A class that has no cell is not valid, as in the authors' code.

    Args:
        p: (B, C + 1, h, w) probabilities. tags: (B, C) of 0 and 1. saliency: (B, h, w) in [0, 1].
        known: (B, h, w) bool, the cells that count. b: balance.
    Returns:
        (B, h, w) in [0, 1].
    Source: EPS, equations 2 to 5; halbielee/EPS eps.py.
    """
    objects = p[:, 1:]
    cells = (objects > 0.5) & known[:, None]
    salient = (cells & (saliency > 0.5)[:, None]).sum(dim=(2, 3))
    valid = salient > tau * cells.sum(dim=(2, 3))
    one = (tags > 0) & valid
    found = (objects * one[:, :, None, None]).sum(dim=1)
    rest = (objects * ((tags > 0) & ~valid)[:, :, None, None]).sum(dim=1)
    return balance * found + (1 - balance) * (1 - p[:, BACKGROUND] - rest)
