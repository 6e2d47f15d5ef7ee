"""Plain classification: the baseline every other method is measured against."""

from __future__ import annotations

from torch import Tensor, nn

from training.data import Batch
from training.loop import Moment
from training.losses import multilabel_soft_margin
from training.models import CamClassifier
from training.models.backbone import Backbone


def build(backbone: Backbone, n_classes: int, dropout: float) -> nn.Module:
    return CamClassifier(backbone, n_classes, dropout)


def losses(model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
    """Multi-label soft margin on the pooled maps."""
    return {"classification": multilabel_soft_margin(model(batch.images).logits, batch.tags)}
