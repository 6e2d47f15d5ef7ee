"""Plain classification: the baseline every other method is measured against."""

from __future__ import annotations

from torch import Tensor, nn

from training.data import Batch
from training.loop import Losses, Moment
from training.losses import multilabel_soft_margin
from training.models import CamClassifier
from training.models.backbone import Backbone
from weakseg.recipe import TrainConfig


def build(backbone: Backbone, n_classes: int, config: TrainConfig) -> nn.Module:
    return CamClassifier(backbone, n_classes, config.dropout)


def losses_of(config: TrainConfig) -> Losses:
    return losses


def losses(model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
    """Multi-label soft margin on the pooled maps."""
    return {"classification": multilabel_soft_margin(model(batch.images).logits, batch.tags)}
