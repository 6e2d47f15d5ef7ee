"""Losses as pure functions; each names its equation."""

from __future__ import annotations

from collections.abc import Sequence

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
        logits: (B, K, H, W). labels: (B, H, W) integer mask values, `ignore` where unlabelled. Or (B, H, W, 3): two
            values and the probability of the first in 255ths, the rest is the second's; balance goes by the first.
    Returns:
        A scalar; 0 (with a gradient of 0) when no pixel is labelled.
    """
    soft, labels = (labels, labels[..., 0]) if labels.ndim == 4 else (None, labels)
    loss = F.cross_entropy(logits, labels.long(), ignore_index=ignore, reduction="none")
    if soft is not None:
        second = F.cross_entropy(logits, soft[..., 1].long(), ignore_index=ignore, reduction="none")
        loss = torch.lerp(second, loss, soft[..., 2].to(loss.dtype) / 255)
    if balance == "none":
        return loss.sum() / (labels != ignore).sum().clamp(min=1)
    background = labels == BACKGROUND
    objects = ~background & (labels != ignore)
    parts = [loss[mask].mean() for mask in (background, objects) if bool(mask.any())]
    return torch.stack(parts).mean() if parts else loss.sum()


def max_norm(maps: Tensor, floor: float = 0.0, eps: float = 1e-5) -> Tensor:
    """ReLU(p - min p - eps) / max(max p - min p, floor) of p = ReLU(maps), each by its own extremes; differentiable.

    Args:
        maps: (B, K, h, w).
        floor: a map whose values lie closer together is not stretched further. The gradient is the stretch: without a
            floor, a map that barely answers is noise of full size with a gradient of up to 1 / eps.
    Returns:
        The same shape, in [0, 1); a constant map becomes 0.
    Source: YudeWang/SEAM tool/visualization.py `max_norm`, with floor 0.
    """
    p = maps.float().relu()  # half precision knows no eps this small beside 1
    low, high = p.amin(dim=(2, 3), keepdim=True), p.amax(dim=(2, 3), keepdim=True)
    return (p - low - eps).relu() / (high - low + eps).clamp(min=floor)


def equivariance(first: Tensor, second: Tensor, tags: Tensor | None = None) -> Tensor:
    """L_ER = mean |A(cam(x)) - cam(A(x))|, over images, classes and pixels; both sides carry gradient.

    Args:
        first, second: (B, C, h, w) normalised maps on the same grid, absent classes 0.
        tags: (B, C) of 0 and 1: the mean is over each image's present classes, so that the loss does not fade with the
            number of classes that a data set has; None = over all, as in the paper.
    Source: SEAM, Wang et al. 2020, equation 2.
    """
    apart = (first - second).abs().mean(dim=(2, 3))
    if tags is None:
        return apart.mean()
    return (apart.sum(dim=1) / tags.sum(dim=1).clamp(min=1)).mean()


def cross_regularisation(target: Tensor, refined: Tensor, tops: Tensor) -> Tensor:
    """One half of L_ECR: mean of the largest tops_i values of |target - refined| of each image, mean over images.

    The selection of hard pixels is called online hard example mining (OHEM) in the paper.

    Args:
        target: (B, K, h, w), gets no gradient. refined: (B, K, h, w) of the PCM on the same grid.
        tops: (B,) int64 in 1..K h w, how many values count.
    Source: SEAM, Wang et al. 2020, equation 5.
    """
    values = (target.detach() - refined).abs().flatten(1)
    largest = values.topk(int(tops.max()), dim=1).values
    counts = torch.arange(largest.shape[1], device=tops.device) < tops[:, None]
    return ((largest * counts).sum(dim=1) / tops).mean()


def adaptive_min_pooling(maps: Tensor, tags: Tensor, share: float = 0.25) -> Tensor:
    """Mean of the smallest `share` of each image's strongest present map: some of every image is background.

    Args:
        maps: (B, C, h, w), the PCM's, before `max_norm`. tags: (B, C) of 0 and 1.
        share: k = floor(share h w) pixels an image, at least one.
    Source: YudeWang/SEAM train_SEAM.py `adaptive_min_pooling_loss`; not in the paper.
    """
    strongest = (maps * tags[:, :, None, None].to(maps.dtype)).amax(dim=1).flatten(1)
    k = max(1, int(share * strongest.shape[1]))
    return strongest.topk(k, dim=1, largest=False).values.relu().mean()


def affinity(affinities: Tensor, labels: Tensor, offsets: Sequence[tuple[int, int]], ignore: int) -> Tensor:
    """Cells of one class belong together, cells of two do not; three kinds of pairs, each by its own mean.

    1/4 mean_bg(-log(W + e)) + 1/4 mean_fg(-log(W + e)) + 1/2 mean_unequal(-log(1 + e - W)),   e = 1e-5

    bg: both are background; fg: both are one object class; unequal: two classes. Pairs start at cells that have all
    their neighbours inside the map: 84,864 at 56 x 56 and radius 5. Those with an ignored cell are left out; a kind
    without pairs counts 0.

    Args:
        affinities: (B, S, h, w) W in [0, 1]. labels: (B, h, w) integer mask values.
        offsets: (dy, dx) of the S neighbours, dy >= 0.
    Source: Ahn & Kwak 2018, equations 3 to 6.
    """
    eps = 1e-5
    reach = max(abs(dx) for _, dx in offsets)
    rows, columns = labels.shape[1] - max(dy for dy, _ in offsets), labels.shape[2] - 2 * reach
    here = labels[:, None, :rows, reach : reach + columns]
    there = torch.stack([labels[:, dy : dy + rows, reach + dx : reach + dx + columns] for dy, dx in offsets], dim=1)
    w = affinities[:, :, :rows, reach : reach + columns]
    known = (here != ignore) & (there != ignore)
    equal = known & (here == there)

    def mean(values: Tensor, pairs: Tensor) -> Tensor:
        return (values * pairs).sum() / (pairs.sum() + eps)

    background = mean(-torch.log(w + eps), equal & (here == BACKGROUND))
    objects = mean(-torch.log(w + eps), equal & (here != BACKGROUND))
    return background / 4 + objects / 4 + mean(-torch.log(1 + eps - w), known & ~equal) / 2
