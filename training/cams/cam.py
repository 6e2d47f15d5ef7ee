"""CAM: the 1x1 head applied before pooling. Zhou et al., CVPR 2016."""

from __future__ import annotations

from torch import Tensor, nn

EXPORTABLE = True


def maps(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """logits (B, C) and ReLU(cam) (B, C, h, w), raw."""
    logits, cam = model(images)
    return logits, cam.relu()
