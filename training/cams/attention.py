"""Where the class tokens of a ViT or DeiT look: roll-out of one token, or attention of each class's own.

Abnar and Zuidema, ACL 2020; MCTformer, Xu et al., CVPR 2022.
"""

from __future__ import annotations

from torch import Tensor, nn

from weakseg.errors import ConfigError

EXPORTABLE = True
CLASSIFIER = "class_tokens"
PER_CELL = True


def maps(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """logits (B, C) and maps (B, C, h, w) >= 0, for images of any size; see TokenClassifier."""
    out = model(images)
    if not hasattr(out, "attention"):
        raise ConfigError(
            "cam method attention needs a classifier of train method class_tokens: train one, or use cam method cam"
        )
    return out.logits, out.attention
