"""A classifier by the class tokens of a ViT or DeiT, and maps of where they look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models.backbone import Backbone
from training.models.vit import VitNetwork
from weakseg.errors import ConfigError

LAST = 4  # index of a backbone's last map
SPREAD = 0.02  # of class tokens around the network's own, so that they are not all alike


class TokenOutput(NamedTuple):
    """logits (B, C) of the class tokens; cam (B, C, h, w) of the patches, signed; attention (B, C, h, w) >= 0.

    attention: the positive part of cam, weighted by where the class tokens look; no gradient flows from it. It shrinks
    as patches become more, among which attention is shared out.
    """

    logits: Tensor
    cam: Tensor
    attention: Tensor


class TokenClassifier(nn.Module):
    """Class tokens and a CAM head over the patches of one transformer.

    per_class: one token for each class, whose logit is the mean of its channels; maps are A * ReLU(cam), A where the
        class's token looks in the last `layers` layers. refine: P (A * ReLU(cam)), P where patches look in all layers;
        of use in networks with good start weights, where attention is all but uniform it blurs everything.
    Otherwise: one token, the network's own, and a linear layer behind it, as ViT and DeiT are trained; maps are
        R * ReLU(cam), R the token's roll-out.
    forward: images (B, 3, H, W) RGB 0..255 of any size; padded to whole patches with the mean colour.
    Source: MCTformer-V2, Xu et al., CVPR 2022; xulianuwa/MCTformer models.py. One token's attention times the patches'
        CAM: TS-CAM, Gao et al., ICCV 2021.
    """

    def __init__(
        self,
        backbone: Backbone,
        n_classes: int,
        dropout: float = 0.5,
        per_class: bool = True,
        layers: int = 3,
        refine: bool = False,
    ) -> None:
        super().__init__()
        network = getattr(backbone, "network", None)
        if not isinstance(network, VitNetwork):
            raise ConfigError(
                f"class tokens need a ViT or DeiT of Hugging Face, got the backbone {backbone.config.name}: set "
                "--backbone.name hf:<id or folder>, such as hf:facebook/deit-small-patch16-224"
            )
        if layers < 1:
            raise ConfigError(f"train.class_tokens.layers must be at least 1, got {layers}: MCTformer has 3")
        self.backbone = backbone
        if refine and not per_class:
            raise ConfigError(
                "train.class_tokens.refine is for maps of a token for each class: set per_class True, too"
            )
        self.options = {"dropout": dropout, "per_class": per_class, "layers": layers, "refine": refine}  # store.py
        self.per_class, self.layers, self.refine = per_class, layers, refine
        network.keep_attention()
        own = network.class_token()
        tokens = own + SPREAD * torch.randn(n_classes, len(own)) if per_class else own[None]
        self.tokens = nn.Parameter(tokens)
        self.linear = None if per_class else nn.Linear(len(own), n_classes)
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(len(own), n_classes, 1, bias=False)
        nn.init.xavier_uniform_(self.head.weight)

    def forward(self, images: Tensor) -> TokenOutput:
        backbone: Any = self.backbone
        x = backbone.normalise(images)
        out = backbone.network(backbone.padded(x), self.tokens)
        tokens = out.tokens
        logits = tokens.mean(dim=2) if self.linear is None else self.linear(backbone.network.norm(tokens[:, 0]))
        cam = self.head(self.dropout(out.feature_maps[-1]))  # on the network's grid, padding included
        positive = cam.detach().relu().flatten(2)
        layers = [weights.detach() for weights in out.attention]
        n = self.tokens.shape[0]
        looked = class_to_patch(layers, n, self.layers) if self.per_class else rollout(layers, n)[:, :, n:]
        maps = looked * positive
        if self.refine:
            maps = maps @ patch_to_patch(layers, n).transpose(1, 2)
        maps = maps.unflatten(2, cam.shape[2:])
        cam, maps = (backbone.on_grid(m, LAST, x) for m in (cam, maps))
        return TokenOutput(logits, cam, maps)


def rollout(attention: Sequence[Tensor], n: int) -> Tensor:
    """(B, n, T): of what the first n tokens after the last layer are made, among the tokens before the first.

    Rows of R = prod_l (A_l + I) / 2, the last layer first: half of what a token is passes by the attention.

    Args:
        attention: (B, T, T) of each layer, in order; rows add up to 1, and so do those of R.
    Source: Abnar and Zuidema, ACL 2020.
    """
    first = attention[0]
    rows = F.pad(torch.eye(n, dtype=first.dtype, device=first.device), (0, first.shape[2] - n))
    rows = rows.expand(first.shape[0], -1, -1)
    for weights in reversed(attention):
        rows = (rows + rows @ weights) / 2
    return rows


def class_to_patch(attention: Sequence[Tensor], n: int, layers: int) -> Tensor:
    """(B, n, T - n): how much the first n tokens look at each of the others, the mean over the last layers."""
    return torch.stack([weights[:, :n, n:] for weights in attention[-layers:]]).mean(dim=0)


def patch_to_patch(attention: Sequence[Tensor], n: int) -> Tensor:
    """(B, T - n, T - n): row i, how much patch i looks at each patch, the mean over all layers."""
    return torch.stack([weights[:, n:, n:] for weights in attention]).mean(dim=0)
