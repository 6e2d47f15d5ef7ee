"""LayerCAM: every cell of a channel weighted by its own gradient; sharp at shallow layers. Jiang et al., TIP 2021."""

from __future__ import annotations

from torch import Tensor, nn

from training.gradients import class_maps

EXPORTABLE = False
WHY_NOT = "needs gradients, which an exported graph does not have"
PER_CELL = True


def maps(model: nn.Module, images: Tensor, layer: str | None = None) -> tuple[Tensor, Tensor]:
    """logits (B, C) and ReLU(sum_k ReLU(dS_c / dA_kij) A_kij) (B, C, h, w); see `class_maps`.

    At the last layer before pooling and a linear head it is the CAM of the head's positive weights, / (h w).
    """
    return class_maps(model, images, layer, weighted)


def weighted(activation: Tensor, gradient: Tensor) -> Tensor:
    """(B, h, w) from A and dS/dA, both (B, K, h, w)."""
    return (gradient.relu() * activation).sum(dim=1)
