"""CAM: the 1x1 head applied before pooling. Zhou et al., CVPR 2016."""

from __future__ import annotations

from torch import Tensor, nn

EXPORTABLE = True


def maps(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """logits (B, C) and ReLU(cam) (B, C, h, w), raw."""
    out = model(images)
    return out.logits, out.cam.relu()
