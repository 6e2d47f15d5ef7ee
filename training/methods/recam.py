"""ReCAM: class re-activation maps. Chen et al., CVPR 2022.

A multi-label loss asks of each class only whether it is there: several may grow strong in the same place. A second head
is shown the image by the map of one class at a time and must name that class and no other, by a softmax.

The authors' code (zhaozhengChen/ReCAM: net/resnet50_cam.py, step/train_recam.py) goes on from a trained classifier,
with both losses and slowly; here they are one training. Its masks are ReLU(cam) / max and let gradient through. Here
they do not: on the synthetic set, from scratch, the second loss all but vanished with it, and maps became worse.
Whatever the paper says beyond its code is not looked up but recalled.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from training.data import Batch
from training.loop import Losses, Moment
from training.losses import max_norm, multilabel_soft_margin
from training.models.backbone import Backbone
from training.models.layers import wide
from training.models.recam import RecamClassifier
from weakseg.errors import ConfigError
from weakseg.recipe import RecamConfig, TrainConfig

NETWORK = RecamClassifier


def build(backbone: Backbone, n_classes: int, config: TrainConfig) -> nn.Module:
    if config.recam.weight <= 0:
        raise ConfigError(
            f"train.recam.weight must be positive, got {config.recam.weight:g}: nothing would teach the second head, "
            "which makes the maps; for those of the first alone take train.method cam"
        )
    return RecamClassifier(backbone, n_classes, config.dropout, config.recam.maps)


def losses_of(config: TrainConfig) -> Losses:
    return partial(losses, config=config.recam)


def losses(model: nn.Module, batch: Batch, moment: Moment, config: RecamConfig) -> dict[str, Tensor]:
    """L_bce + weight L_sce, the second of features weighted by each class's first map in [0, 1), a constant there."""
    out = model(batch.images)
    scores = masked_scores(max_norm(out.first.detach()), out.second)
    return {
        "classification": multilabel_soft_margin(out.logits, batch.tags),
        "single_label": config.weight * single_label(scores, batch.tags),
    }


def masked_scores(masks: Tensor, maps: Tensor) -> Tensor:
    """(B, C, K): what a linear head says to features weighted by each mask and pooled, mean_p masks_cp maps_kp.

    Weighting and pooling features (C times K channels) and a head without bias commute, so maps of the head do.

    Args:
        masks: (B, C, h, w). maps: (B, K, h, w) of the head.
    """
    with torch.autocast(maps.device.type, enabled=False):  # a sum over all cells
        return torch.einsum("bchw,bkhw->bck", wide(masks), wide(maps)) / maps[0, 0].numel()


def single_label(scores: Tensor, tags: Tensor) -> Tensor:
    """L_sce: -log softmax(scores_c)_c, mean over the present classes c of each image, then over images.

    Args:
        scores: (B, C, C), row c of features that class c masks. tags: (B, C) in [0, 1], soft ones are weights; an image
            without any counts 0.
    """
    values = -scores.log_softmax(dim=2).diagonal(dim1=1, dim2=2)
    return ((values * tags).sum(dim=1) / tags.sum(dim=1).clamp(min=1)).mean()
