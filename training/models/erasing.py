"""CAM classifiers one after the other, each shown what earlier ones have left of an image. Wei et al., CVPR 2017."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.gradients import evaluating
from training.models.backbone import Backbone
from training.models.classifier import CamClassifier
from training.models.layers import wide

EDGE = 0.05  # of a map's maximum, over which erasing fades in: with a hard edge a runtime's rounding would move pixels
LEAST = 1.0  # logits; a later step's map that stays below is not stretched to the first step's height
EPS = 1e-5
# Loss of a present class, -log p, that counts as the first step's where it has less: at stop 2 a class is not lost
# while p is above 0.6, however near to 1 the first step came. A network that sees nothing of it says 0.5 or less.
SURE = 0.25
FILL = 0.5  # levels; nearer to the mean colour than this is what pads an image: the mean, or the nearest whole levels


class ErasingOutput(NamedTuple):
    """logits (B, C) of the first step; cam (B, C, h, w) >= 0, the largest of steps (B, S, C, h, w) at each cell.

    erased: (B, S, 1, H, W) in [0, 1], how much of each pixel a step is not shown.
    """

    logits: Tensor
    cam: Tensor
    steps: Tensor
    erased: Tensor


class ErasingClassifier(nn.Module):
    """`steps` CAM classifiers, each over a backbone of its own, all with the same start weights.

    Step k is shown the image with the mean colour where steps before it have found a class: where, for a class that is
    present, ReLU(M_c) / max ReLU(M_c) is at least `hot`, brought to pixels. Steps that count for a class:

    cam_c = max_k s_kc,   s_1 = ReLU(M_1),   s_k = ReLU(M_k) max M_1 / max(max M_k, LEAST)

    so that maps of all steps are as high as the first one's, views of different strength add up as those of a plain
    CAM do, and a class that the first step does not find is found by none.

    A step counts for a class while no step up to it, itself included, has lost it: its mean loss of the class, late in
    its own training, is at least `stop` times the first step's (SURE where that is less).
    forward: images (B, 3, H, W) RGB 0..255, sides multiples of 16; tags (B, C) of 0 and 1, None = by the scores of the
        first step: min(1, 2 s_c) in place of the tag.
    """

    loss_sums: Tensor
    loss_weights: Tensor

    def __init__(
        self,
        backbone: Backbone,
        n_classes: int,
        dropout: float = 0.5,
        steps: int = 3,
        hot: float = 0.8,
        stop: float = 2.0,
    ) -> None:
        super().__init__()
        self.options = {"dropout": dropout, "steps": steps, "hot": hot, "stop": stop}  # store.py
        self.hot, self.stop = hot, stop
        first = CamClassifier(backbone, n_classes, dropout)
        self.members = nn.ModuleList([first, *(copy.deepcopy(first) for _ in range(steps - 1))])
        self.register_buffer("loss_sums", torch.zeros(steps, n_classes))  # of present classes, by step
        self.register_buffer("loss_weights", torch.zeros(steps, n_classes))

    @property
    def backbone(self) -> Backbone:
        """The first step's."""
        backbone: Backbone = self.members[0].backbone  # type: ignore[assignment]
        return backbone

    def forward(self, images: Tensor, tags: Tensor | None = None) -> ErasingOutput:
        kept = self.kept()
        images = images.to(self.backbone.mean.dtype)
        erased = [torch.zeros_like(images[:, :1])]
        first = self.members[0](images)
        present = (2 * wide(first.logits).sigmoid()).clamp(max=1) if tags is None else tags
        maps = wide(first.cam).relu()
        high, steps = _largest(maps), [maps]
        for k, member in enumerate(self.members[1:], 1):
            erased.append(torch.maximum(erased[-1], self._found(maps, present * kept[k - 1], images)))
            maps = wide(member(self._filled(images, erased[-1])).cam).relu()
            counts = kept[k] * self._some_left(images, erased[-1])[:, None]  # (B, C)
            steps.append(counts[:, :, None, None] * maps * (high / _largest(maps).clamp(min=LEAST)))
        stacked = torch.stack(steps, dim=1)
        return ErasingOutput(first.logits, stacked.amax(dim=1), stacked, torch.stack(erased, dim=1))

    def shown(self, step: int, images: Tensor, tags: Tensor) -> tuple[Tensor, Tensor]:
        """What a step is to learn from: images (B, 3, H, W), and (B,) 0 where all of an image is erased; no gradient.

        The steps before it look in evaluation mode.
        """
        images = images.to(self.backbone.mean.dtype)
        erased, kept = torch.zeros_like(images[:, :1]), self.kept()
        earlier = self.members[:step]
        with evaluating(earlier), torch.no_grad():
            for k, member in enumerate(earlier):
                maps = wide(member(self._filled(images, erased)).cam).relu()
                erased = torch.maximum(erased, self._found(maps, tags * kept[k], images))
        return self._filled(images, erased), self._some_left(images, erased)

    def note(self, step: int, losses: Tensor, weights: Tensor) -> None:
        """Add to what is known of a step: (C,) weighted sums of the losses of present classes, their weights."""
        self.loss_sums[step] += losses
        self.loss_weights[step] += weights

    def learning(self, step: int) -> Tensor:
        """(C,) 1 for the classes that no step before this one has lost, else 0."""
        return self._not_lost()[max(0, step - 1)]

    def kept(self) -> Tensor:
        """(S, C) 1 where a step counts for a class, else 0; the first always does, others once they have learnt."""
        learnt = (self.loss_weights[1:].sum(dim=1, keepdim=True) > 0).to(self.loss_sums.dtype)
        not_lost = self._not_lost()
        return torch.cat([not_lost[:1], not_lost[1:] * learnt])

    def _not_lost(self) -> Tensor:
        """(S, C) 1 while no step up to this one has lost the class; one whose loss is not known has not."""
        losses = self.loss_sums / self.loss_weights.clamp(min=1e-12)
        limit = self.stop * losses[0].clamp(min=SURE)
        rows = [torch.ones_like(limit)]
        for row in losses[1:]:
            rows.append(rows[-1] * (row < limit))
        return torch.stack(rows)

    def _found(self, maps: Tensor, present: Tensor, images: Tensor) -> Tensor:
        return found(maps, present, self.hot, images.shape[2], images.shape[3])

    def _filled(self, images: Tensor, erased: Tensor) -> Tensor:
        return images + (self.backbone.mean - images) * erased

    def _some_left(self, images: Tensor, erased: Tensor) -> Tensor:
        return some_left(images - self.backbone.mean, erased)


def found(maps: Tensor, present: Tensor, hot: float, height: int, width: int) -> Tensor:
    """(B, 1, height, width): 1 where a present class's map is at least `hot` of its maximum, 0 below hot - EDGE.

    Args:
        maps: (B, C, h, w) >= 0; one that is 0 finds nothing. present: (B, C) in [0, 1], a factor of the map's height.
    """
    relative = maps / _largest(maps).clamp(min=EPS) * present[:, :, None, None]
    # The strongest class at each cell first: pixels of all classes would take gigabytes of large images.
    strongest = F.interpolate(
        relative.amax(dim=1, keepdim=True), size=(height, width), mode="bilinear", align_corners=False
    )
    return ((strongest - hot) / EDGE + 1).clamp(0, 1)


def some_left(contrast: Tensor, erased: Tensor) -> Tensor:
    """(B,) 1 for images with a pixel that is neither fully erased nor padding, or of which nothing is erased; else 0.

    Args:
        contrast: (B, 3, H, W), images less the mean colour; padding is less than FILL, or that, in all channels.
        erased: (B, 1, H, W) in [0, 1].
    """
    padding = contrast.abs().amax(dim=1, keepdim=True) <= FILL
    left = erased.masked_fill(padding, 1).amin(dim=(1, 2, 3)) < 1
    return (left | (erased.amax(dim=(1, 2, 3)) == 0)).to(erased.dtype)


def _largest(maps: Tensor) -> Tensor:
    return maps.amax(dim=(2, 3), keepdim=True)
