"""Grad-CAM++: gradients weighted so that every instance of a class counts. Chattopadhay et al., WACV 2018."""

from __future__ import annotations

from torch import Tensor, nn

from training.gradients import class_maps

EXPORTABLE = False
WHY_NOT = "needs gradients, which an exported graph does not have"


def maps(model: nn.Module, images: Tensor, layer: str | None = None) -> tuple[Tensor, Tensor]:
    """logits (B, C) and ReLU(sum_k w_ck A_k) (B, C, h, w); see `weighted`, and `class_maps`.

    At the last layer before pooling and a linear head v: w_ck = ReLU(v_ck) / (2 + v_ck mean_ij A_kij).
    """
    return class_maps(model, images, layer, weighted)


def weighted(activation: Tensor, gradient: Tensor) -> Tensor:
    """(B, h, w) from A and G = dS/dA, both (B, K, h, w).

    w_k = sum_ij a_kij ReLU(G_kij),   a_kij = G^2 / (2 G^2 + G^3 sum_pq A_kpq) = 1 / (2 + G sum_pq A_kpq)

    Divided through by G^2, a needs no epsilon, which would decide where gradients are small. A sum of activations below
    0 counts as 0: the equation is for what a ReLU gives, and its denominator could vanish. The factor exp(S) of the
    paper, one number for an image and a class, is left out.
    Source: equations 7 and 19; jacobgil/pytorch-grad-cam grad_cam_plusplus.py has an epsilon of 1e-6.
    """
    total = activation.sum(dim=(2, 3), keepdim=True).clamp(min=0)
    positive = gradient.relu()
    weight = (positive / (2 + positive * total)).sum(dim=(2, 3), keepdim=True)
    return (weight * activation).sum(dim=1)
