"""Online prohibitive learning (PSL): a segmentation network also learns from labels of its own. Wei et al., CVPR 2017.

Pseudo-masks leave out parts of objects. The network's own labels fill them, and with time spread to classes that an
image does not have; a classifier over the same backbone, which learns from the tags, prohibits those.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data import UNLABELLED, Batch
from training.losses import multilabel_soft_margin, segmentation_cross_entropy
from training.step import Moment


class ProhibitiveOutput(NamedTuple):
    """scores (B, C + 1, h, w) of the segmentation network; logits (B, C) of the image's classes."""

    scores: Tensor
    logits: Tensor


class Prohibitive(nn.Module):
    """A segmentation network and, for its training alone, a linear classifier over the pooled last map of its backbone.

    forward: images (B, 3, H, W) RGB 0..255, sides multiples of 16 -> ProhibitiveOutput.
    """

    def __init__(self, network: nn.Module, n_classes: int) -> None:
        super().__init__()
        self.network = network
        self.classifier = nn.Linear(network.backbone.channels[-1], n_classes)  # type: ignore[index, union-attr]

    def forward(self, images: Tensor) -> ProhibitiveOutput:
        last: list[Tensor] = []
        hook = self.network.backbone.register_forward_hook(  # type: ignore[operator, union-attr]
            lambda _module, _images, maps: last.append(maps[-1])
        )
        try:
            scores = self.network(images)
        finally:
            hook.remove()
        return ProhibitiveOutput(scores, self.classifier(last[0].mean(dim=(2, 3))))


def prohibitive_losses(model: nn.Module, batch: Batch, moment: Moment, *, balance: str) -> dict[str, Tensor]:
    """CE(S, pseudo-mask) + CE(S, online label), both at the crop's full resolution, and soft margin on the tags."""
    assert batch.labels is not None
    scores, logits = model(batch.images)
    scores = F.interpolate(scores, size=batch.labels.shape[1:3], mode="bilinear", align_corners=False)
    online = online_labels(scores, logits)
    return {
        "segmentation": segmentation_cross_entropy(scores, batch.labels, UNLABELLED, balance),
        "online": segmentation_cross_entropy(scores, online, UNLABELLED, balance),
        "classification": multilabel_soft_margin(logits, batch.tags),
    }


def online_labels(scores: Tensor, logits: Tensor) -> Tensor:
    """(B, H, W) int64 argmax_k v_k softmax(S)_k, v = sigmoid(logits), 1 for background; no gradient.

    Args:
        scores: (B, C + 1, H, W), channel 0 background. logits: (B, C).
    Source: Wei et al. 2017, section 3.2.
    """
    allowed = F.pad(F.logsigmoid(logits.detach().float()), (1, 0))  # softmax and logarithm leave the order as it is
    return torch.argmax(scores.detach() + allowed[:, :, None, None], dim=1)
