"""ACoL: adversarial complementary learning. Zhang et al., CVPR 2018.

One classifier finds the parts that tell a class best. A second one, over the same features, is not shown them and must
tell the class by the rest of the object.

As in the paper, tags say what is erased: the second classifier can read them off the hole (its loss then falls far
below the first's). With `by` "found" the hole is what the first classifier finds by itself, as it is at inference.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from training.data import Batch
from training.loop import Losses, Moment
from training.losses import multilabel_soft_margin
from training.models.acol import AcolClassifier
from training.models.backbone import Backbone
from weakseg.errors import ConfigError
from weakseg.recipe import AcolConfig, TrainConfig

NETWORK = AcolClassifier


def build(backbone: Backbone, n_classes: int, config: TrainConfig) -> nn.Module:
    acol = config.acol
    if not 0 < acol.erase <= 1:
        raise ConfigError(f"train.acol.erase must lie in (0, 1], got {acol.erase:g}: the authors have 0.6")
    if acol.width < 1:
        raise ConfigError(f"train.acol.width must be at least 1, got {acol.width}: the authors have 1024")
    return AcolClassifier(backbone, n_classes, config.dropout, acol.width, acol.erase)


def losses_of(config: TrainConfig) -> Losses:
    return partial(losses, config=config.acol)


def losses(model: nn.Module, batch: Batch, moment: Moment, config: AcolConfig) -> dict[str, Tensor]:
    """Multi-label soft margin of each classifier."""
    out = model(batch.images, batch.tags if config.by == "tags" else None)
    return {
        "classification": multilabel_soft_margin(out.first.mean(dim=(2, 3)), batch.tags),
        "erased": multilabel_soft_margin(out.second.mean(dim=(2, 3)), batch.tags),
    }
