"""Losses as pure functions; each names its equation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weakseg.classes import BACKGROUND


def multilabel_soft_margin(logits: Tensor, tags: Tensor) -> Tensor:
    """-(1/C) sum_c [ y_c log s(l_c) + (1 - y_c) log s(-l_c) ], mean over the batch.

    Args:
        logits: (B, C). tags: (B, C) in [0, 1]; soft targets are allowed.
    """
    return F.binary_cross_entropy_with_logits(logits, tags.to(logits.dtype))


def segmentation_cross_entropy(logits: Tensor, labels: Tensor, ignore: int, balance: str = "none") -> Tensor:
    """Cross-entropy over labelled pixels.

    balance "none": the mean over pixels. "foreground": (mean over background pixels + mean over object pixels) / 2, so
    that background, two thirds of most photographs, cannot win by its size (the balanced form of DSRG's seeding loss,
    Huang et al., CVPR 2018).

    Args:
        logits: (B, K, H, W). labels: (B, H, W) integer mask values, `ignore` where unlabelled.
    Returns:
        A scalar; 0 (with a gradient of 0) when no pixel is labelled.
    """
    loss = F.cross_entropy(logits, labels.long(), ignore_index=ignore, reduction="none")
    if balance == "none":
        return loss.sum() / (labels != ignore).sum().clamp(min=1)
    background = labels == BACKGROUND
    objects = ~background & (labels != ignore)
    parts = [loss[mask].mean() for mask in (background, objects) if bool(mask.any())]
    return torch.stack(parts).mean() if parts else loss.sum()
