"""Trained models as graphs over uint8 images: what the offline stages run is what is exported, so they cannot differ.

Every graph takes images (B, H, W, 3) uint8 RGB of any size, normalises and pads inside, and returns maps at stride 4 of
the image, cropped to ceil(H/4) x ceil(W/4). Sizes are computed with integers only, so that they export as symbols.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.cams import CamMethod
from training.models.layers import CANVAS
from weakseg.errors import ConfigError

MAP_STRIDE = 4
Outputs = dict[str, Tensor]


def canvas_images(images: Tensor, mean: Tensor, multiple: int) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H', W') float RGB 0..255, padded at the bottom and right with the mean colour."""
    x = images.float().permute(0, 3, 1, 2) - mean  # in this order: TensorRT casts uint8 and does nothing else with it
    height, width = images.shape[1:3]
    rows, cols = whole(height, multiple), whole(width, multiple)
    return F.pad(x, (0, cols - width, 0, rows - height)) + mean


def whole(size: int, multiple: int) -> int:
    """The next multiple, size itself included; without a remainder, of which TensorRT cannot tell that it is >= 0."""
    return (size + multiple - 1) // multiple * multiple


def view_side(size: int, eighths: int) -> int:
    """Pixels of a view's side: eighths / 8 of the canvas's, rounded half up to whole cells, of scales < 0.5 up.

    A canvas padded until all of its views are whole cells would cost 5 % more pixels on photographs of 320 x 240. The
    two sides' scales differ a little instead, as they do in training.
    """
    return (size * eighths // 8 + (CANVAS // 2 if eighths >= 4 else CANVAS - 1)) // CANVAS * CANVAS


def crop_maps(maps: Tensor, height: int, width: int, stride: int = MAP_STRIDE) -> Tensor:
    """The part of stride-s maps that covers the image: ceil(H/s) x ceil(W/s)."""
    return maps[:, :, : (height + stride - 1) // stride, : (width + stride - 1) // stride]


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, half-pixel, no antialias: the one resize of views and maps."""
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)


class ClassifierGraph(nn.Module):
    """scores (B, C) in [0, 1] and raw cam (B, C, ceil(H/4), ceil(W/4)) >= 0, summed over scales and flips.

    With scales (1.0,) and no flip this is the plain CAM. Every view is the whole canvas at the size of its scale in
    whole cells, so that maps of different views line up without sub-cell shifts. Mirror images are views of their own:
    in a batch with their originals they take half as much memory again, and 4 % more time on a CPU. Scores come from
    the view nearest to scale 1, averaged over flips.
    """

    def __init__(
        self, model: nn.Module, method: CamMethod, scales: tuple[float, ...] = (1.0,), flip: bool = False
    ) -> None:
        super().__init__()
        self.model, self.method, self.flip = model, method, flip
        self.eighths = _eighths(scales)
        self.n_views = len(scales) * (2 if flip else 1)

    def forward(self, images: Tensor) -> Outputs:
        x = canvas_images(images, self.model.backbone.mean, CANVAS)
        rows, cols = x.shape[2], x.shape[3]
        nearest_to_one = min(self.eighths, key=lambda e: abs(e - 8))
        cams = []
        per_cell = getattr(self.method, "PER_CELL", False)
        for e in self.eighths:
            view = x if e == 8 else resize(x, view_side(rows, e), view_side(cols, e))
            view_logits, cam = self.method.maps(self.model, view)
            if self.flip:
                mirror_logits, mirror_cam = self.method.maps(self.model, view.flip(3))
                view_logits, cam = (view_logits + mirror_logits) / 2, cam + mirror_cam.flip(3)
            if per_cell:  # in units of the logit, also because float16 could not hold less
                cam = cam * (cam.shape[2] * cam.shape[3])
            cams.append(resize(cam, rows // MAP_STRIDE, cols // MAP_STRIDE))
            if e == nearest_to_one:
                logits = view_logits
        return {
            "scores": logits.sigmoid(),
            "cam": crop_maps(torch.stack(cams).sum(dim=0), images.shape[1], images.shape[2]),
        }


class SegmentationGraph(nn.Module):
    """logits (B, C + 1, ceil(H/4), ceil(W/4)); with several scales or flip, the mean over the views."""

    def __init__(self, model: nn.Module, scales: tuple[float, ...] = (1.0,), flip: bool = False) -> None:
        super().__init__()
        self.model, self.flip = model, flip
        self.eighths = _eighths(scales)

    def forward(self, images: Tensor) -> Outputs:
        x = canvas_images(images, self.model.backbone.mean, CANVAS)
        rows, cols = x.shape[2], x.shape[3]
        total = []
        for e in self.eighths:
            view = x if e == 8 else resize(x, view_side(rows, e), view_side(cols, e))
            logits = self.model(view)
            if self.flip:
                logits = (logits + self.model(view.flip(3)).flip(3)) / 2
            total.append(resize(logits, rows // MAP_STRIDE, cols // MAP_STRIDE))
        logits = total[0] if len(total) == 1 else torch.stack(total).mean(dim=0)
        return {"logits": crop_maps(logits, images.shape[1], images.shape[2])}


class AffinityGraph(nn.Module):
    """affinities (B, S or S + 1, ceil(H/stride), ceil(W/stride)) of cells with neighbours, see weakseg.random_walk."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.stride = model, int(model.stride)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Outputs:
        x = canvas_images(images, self.model.backbone.mean, CANVAS)
        maps = crop_maps(self.model(x), images.shape[1], images.shape[2], self.stride)
        return {"affinities": self.model.affinities(maps, self.model.radius)}


def _eighths(scales: tuple[float, ...]) -> list[int]:
    """Scales as whole eighths, so that view sizes are integer arithmetic on symbols."""
    eighths = [round(8 * scale) for scale in scales]
    if not eighths or min(eighths) < 1 or any(abs(e / 8 - s) > 1e-6 for e, s in zip(eighths, scales, strict=True)):
        raise ConfigError(f"scales must be positive multiples of 1/8 (0.5, 0.75, 1, 1.25, …), got {scales}")
    return eighths
