"""Grad-CAM: channels weighted by the mean of a class's gradient. Selvaraju et al., ICCV 2017.

For any classifier, one with flattened maps and fully connected layers too, and at any layer.
"""

from __future__ import annotations

from torch import Tensor, nn

from training.gradients import class_maps

EXPORTABLE = False
WHY_NOT = "needs gradients, which an exported graph does not have"
PER_CELL = True


def maps(model: nn.Module, images: Tensor, layer: str | None = None) -> tuple[Tensor, Tensor]:
    """logits (B, C) and ReLU(sum_k a_ck A_k) (B, C, h, w), a_ck = mean_ij dS_c / dA_kij; see `class_maps`.

    At the last layer before pooling and a linear head it is CAM / (h w).
    """
    return class_maps(model, images, layer, weighted)


def weighted(activation: Tensor, gradient: Tensor) -> Tensor:
    """(B, h, w) from A and dS/dA, both (B, K, h, w)."""
    return (gradient.mean(dim=(2, 3), keepdim=True) * activation).sum(dim=1)
