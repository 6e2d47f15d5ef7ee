"""The maps that SEAM's pixel correlation module refines. Wang et al., CVPR 2020."""

from __future__ import annotations

from torch import Tensor, nn

from weakseg.errors import ConfigError

EXPORTABLE = True
CLASSIFIER = "seam"


def maps(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """logits (B, C) and refined maps (B, C, h, w) in [0, 1], each class by itself."""
    out = model(images)
    if not hasattr(out, "refined"):
        raise ConfigError("cam method pcm needs a classifier of train method seam: train one, or use cam method cam")
    return out.logits, out.refined[:, 1:]
