"""SEAM's network: a CAM classifier whose maps a pixel correlation module refines. Wang et al., CVPR 2020."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from training.models.backbone import Backbone
from training.models.layers import wide
from weakseg.classes import BACKGROUND

EPS = 1e-5
SLOW = 0.1  # learning rate of a PCM that starts from the backbone's features, beside the backbone's (docs/results.md)
LOW, HIGH, EMBEDDING = 64, 128, 192  # channels of the two projected taps, and of what pixels are compared by


class SeamOutput(NamedTuple):
    """logits (B, C); cam (B, C, h, w) of the head, signed and unnormalised; refined (B, C + 1, h, w) of the PCM.

    refined is in [0, 1], channel 0 the background.
    """

    logits: Tensor
    cam: Tensor
    refined: Tensor


class SeamClassifier(nn.Module):
    """CAM head and PCM over one backbone.

    The backbone's last map carries the CAMs; the two before it, and the image, are what the PCM compares pixels by.
    No gradient flows from `refined` into the backbone or the head.

    parity: as the authors' code has it: a head with a background channel that nothing supervises, classes that are not
        in the image compete in the PCM, maps are brought to a size with aligned corners, the PCM starts from random
        weights. Default: the classes given as present compete alone, half-pixel alignment, and see PixelCorrelation.
    sharpness: exponent of the correlations; 1 in parity.
    pcm_mib: what the PCM's correlation matrix may take; beyond that it is computed in columns.
    """

    def __init__(
        self,
        backbone: Backbone,
        n_classes: int,
        dropout: float = 0.5,
        parity: bool = False,
        sharpness: float = 2.0,
        pcm_mib: int = 256,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.options = {"dropout": dropout, "parity": parity, "sharpness": sharpness, "pcm_mib": pcm_mib}  # store.py
        self.n_classes, self.parity = n_classes, parity
        if parity:
            backbone.symmetric_padding()
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(backbone.channels[-1], n_classes + parity, 1, bias=False)
        nn.init.xavier_uniform_(self.head.weight)
        self.pcm = PixelCorrelation(
            backbone.channels[-3], backbone.channels[-2], parity, 1.0 if parity else sharpness, pcm_mib << 20
        )

    def forward(self, images: Tensor, tags: Tensor | None = None) -> SeamOutput:
        """images (B, 3, H, W) RGB 0..255; tags (B, C) of 0 and 1, the classes that compete; None = each by itself."""
        normalised = self.backbone.normalise(images)
        maps = self.backbone.features(normalised)
        cam = self.head(self.dropout(maps[-1]))[:, -self.n_classes :]
        scores = pcm_input(cam, torch.ones_like(cam[:, :, 0, 0]) if self.parity else tags)
        refined = self.pcm(scores, normalised, maps[-3], maps[-2])
        return SeamOutput(cam.mean(dim=(2, 3)), cam, refined)


class PixelCorrelation(nn.Module):
    """PCM: each map becomes its own average over pixels that look alike.

    In parity, pixels are at first compared by random projections of the taps with a ReLU behind them, which makes them
    all look alike; the module must be trained for long before it betters the maps that it is given. By default the
    projections start as isometries without a ReLU and every channel counts alike: pixels are at first compared by the
    cosine of what the backbone itself says of them (docs/results.md has what that is worth).
    """

    def __init__(self, low_channels: int, high_channels: int, parity: bool, sharpness: float, limit_bytes: int) -> None:
        super().__init__()
        self.parity, self.sharpness, self.limit_bytes = parity, sharpness, limit_bytes
        self.lr_scale = None if parity else SLOW  # it starts from what the backbone knows and would soon unlearn it
        self.low = nn.Conv2d(low_channels, LOW, 1, bias=False)
        self.high = nn.Conv2d(high_channels, HIGH, 1, bias=False)
        self.embed = nn.Conv2d(3 + LOW + HIGH, EMBEDDING, 1, bias=False)
        if parity:
            nn.init.kaiming_normal_(self.low.weight)
            nn.init.kaiming_normal_(self.high.weight)
            nn.init.xavier_uniform_(self.embed.weight, gain=4)
        else:
            for conv in (self.low, self.high, self.embed):
                nn.init.orthogonal_(conv.weight)

    def forward(self, scores: Tensor, images: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """scores (B, K, h, w) -> (B, K, h, w).

        Args:
            images: (B, 3, H, W) normalised. low, high: taps of the backbone; no gradient flows into any of them.
        """
        size = scores.shape[2:]
        low, high = self.low(low.detach()), self.high(high.detach())
        if self.parity:
            parts = [self._at(part, size) for part in (images, low.relu(), high.relu())]
        else:
            parts = [of_unit_power(self._at(part, size)) for part in (images, low, high)]
        features = self.embed(torch.cat(parts, dim=1))
        refined = pixel_correlation(scores.flatten(2), features.flatten(2), self.sharpness, self.limit_bytes)
        return refined.reshape(scores.shape)

    def _at(self, maps: Tensor, size: torch.Size) -> Tensor:
        if maps.shape[2:] == size:
            return maps
        return F.interpolate(maps, size, mode="bilinear", align_corners=self.parity)


def of_unit_power(maps: Tensor) -> Tensor:
    """Each image's maps (B, K, h, w) divided by their root mean square."""
    maps = wide(maps)
    return maps / (maps.square().mean(dim=(1, 2, 3), keepdim=True) + EPS).sqrt()


def pcm_input(cam: Tensor, tags: Tensor | None) -> Tensor:
    """Maps (B, C + 1, h, w) in [0, 1] that the PCM averages; no gradient.

    d_c = ReLU(ReLU(cam_c) - eps) / (max cam_c + eps); d_0 = 1 - max_c d_c; then d_c is 0 where another competing class
    is stronger.

    Args:
        cam: (B, C, h, w). tags: (B, C) of 0 and 1, the competing classes, others become 0; None = every class is kept
            and none competes (at inference the tags may not be known, and a class must not depend on others).
    Source: Wang et al. 2020, section 3.3; the suppression is in YudeWang/SEAM network/resnet38_SEAM.py only.
    """
    d = wide(cam.detach()).relu()
    d = (d - EPS).relu() / (d.amax(dim=(2, 3), keepdim=True) + EPS)
    if tags is not None:
        d = d * tags[:, :, None, None].to(d.dtype)
    strongest = d.amax(dim=1, keepdim=True)
    if tags is not None:
        d = d * (d >= strongest)
    return torch.cat([1 - strongest, d], dim=1)


def pixel_correlation(maps: Tensor, features: Tensor, sharpness: float = 1.0, limit_bytes: int | None = None) -> Tensor:
    """Average each map over pixels with similar features.

    out[k, j] = sum_i maps[k, i] a_ij / (sum_i a_ij + eps),   a_ij = ReLU(cos(f_i, f_j))^sharpness

    Args:
        maps: (B, K, N), any scale, N = h * w. features: (B, D, N).
        sharpness: at least 1; the paper's equation has 1.
        limit_bytes: bound of the correlations that exist at a time; None = all N x N.
    Returns:
        (B, K, N); stays within each map's own minimum and maximum, up to eps.
    Source: SEAM, Wang et al., CVPR 2020, equation 6.
    """
    # In full precision under autocast, too: columns are divided by sums of thousands of small numbers.
    with torch.autocast(maps.device.type, enabled=False):
        return _correlated(wide(maps), wide(features), sharpness, limit_bytes)


def _correlated(maps: Tensor, features: Tensor, sharpness: float, limit_bytes: int | None) -> Tensor:
    f = features / (features.norm(dim=1, keepdim=True) + EPS)
    n_batch, n = maps.shape[0], maps.shape[2]
    if limit_bytes is None or torch.compiler.is_exporting():
        return _columns(maps, f, f, sharpness)
    width = max(1, limit_bytes // max(1, n_batch * n * f.element_size()))
    if width >= n:
        return _columns(maps, f, f, sharpness)
    # Checkpoints: with gradients, the matrix would otherwise be kept whole for the way back.
    parts = [checkpoint(_columns, maps, f, some, sharpness, use_reentrant=False) for some in f.split(width, dim=2)]
    return torch.cat(parts, dim=2)


def _columns(maps: Tensor, f: Tensor, some: Tensor, sharpness: float) -> Tensor:
    """The columns j of `some` (B, D, n), a part of f (B, D, N)."""
    affinity = (f.transpose(1, 2) @ some).relu()  # (B, N, n)
    if sharpness != 1:
        affinity = affinity**sharpness
    return (maps @ affinity) / (affinity.sum(dim=1, keepdim=True) + EPS)


def strongest_only(maps: Tensor) -> Tensor:
    """(B, C + 1, h, w) with every class but the strongest set to 0 at each pixel; the background is left alone."""
    classes = maps[:, BACKGROUND + 1 :]
    return torch.cat([maps[:, :1], classes * (classes >= classes.amax(dim=1, keepdim=True))], dim=1)


def with_background(cam: Tensor) -> Tensor:
    """(B, C + 1, h, w): 1 - max_c in front of maps (B, C, h, w) in [0, 1]."""
    return torch.cat([1 - cam.amax(dim=1, keepdim=True), cam], dim=1)
