"""Class tokens of a vision transformer learn to tell the classes, and so do its patches. Xu et al., CVPR 2022."""

from __future__ import annotations

from torch import Tensor, nn

from training.data import Batch
from training.loop import Losses, Moment
from training.losses import multilabel_soft_margin
from training.models import TokenClassifier
from training.models.backbone import Backbone
from weakseg.recipe import TrainConfig

NETWORK = TokenClassifier
TRANSFORMERS_ONLY = True


def build(backbone: Backbone, n_classes: int, config: TrainConfig) -> nn.Module:
    tokens = config.class_tokens
    return TokenClassifier(backbone, n_classes, config.dropout, tokens.per_class, tokens.layers, tokens.refine)


def losses_of(config: TrainConfig) -> Losses:
    return losses


def losses(model: nn.Module, batch: Batch, moment: Moment) -> dict[str, Tensor]:
    """Multi-label soft margin of the tokens' logits, and of the patches' pooled maps."""
    out = model(batch.images)
    return {
        "classification": multilabel_soft_margin(out.logits, batch.tags),
        "patches": multilabel_soft_margin(out.cam.mean(dim=(2, 3)), batch.tags),
    }
