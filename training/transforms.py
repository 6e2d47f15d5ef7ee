"""Spatial transforms A that are applied alike to images and to maps: A(cam(x)) and cam(A(x)) then lie on one grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.models.layers import CANVAS


@dataclass(frozen=True)
class Transform:
    """An affine sampling of the plane, then a change of size.

    theta: (2, 3) from output to input, both in [-1, 1] over the picture; None = identity.
    scale: of the sides. align_corners: how grids of different sizes lie on each other.
    """

    theta: Tensor | None = None
    scale: float = 1.0
    align_corners: bool = False

    def image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float -> (B, 3, H', W'), whole cells of the network; in parity floor(scale H)."""
        height, width = (self.side(side) for side in images.shape[2:])
        return self.maps(images, (height, width))

    def maps(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, K, h, w) of the untransformed picture -> (B, K, *size), outside 0."""
        if self.theta is not None:
            grid = F.affine_grid(
                self.theta.to(maps)[None].expand(len(maps), -1, -1), list(maps.shape), align_corners=False
            )
            maps = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return resized(maps, size, self.align_corners)

    def valid(self, size: tuple[int, int], like: Tensor) -> Tensor:
        """(1, 1, *size) of 0 and 1: cells that show the picture; on the device of `like` (B, K, H, W)."""
        inside = torch.ones(1, 1, *size, device=like.device)
        return inside if self.theta is None else (self.maps(inside, size) > 0.999).to(inside.dtype)

    def side(self, side: int) -> int:
        """Of the transformed picture."""
        if self.align_corners:
            return math.floor(side * self.scale)
        return max(1, round(side * self.scale / CANVAS)) * CANVAS


def resized(maps: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Bilinear; the same tensor where the size is already right."""
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=align_corners)


def draw_transform(
    kinds: tuple[str, ...], rescale: float, translate: float, rotate_deg: float, align_corners: bool = False
) -> Transform:
    """One transform for a whole batch, drawn from torch's generator.

    Args:
        kinds: of "rescale", "flip", "translate", "rotate"; all those named are applied together.
        rescale: factor of both sides. translate: largest shift, as a share of the side. rotate_deg: largest turn.
    """
    turn, flip = 0.0, 1.0
    shift = torch.zeros(2)
    if "rotate" in kinds:
        turn = math.radians(rotate_deg) * (2 * float(torch.rand(())) - 1)
    if "flip" in kinds:
        flip = -1.0
    if "translate" in kinds:
        shift = 2 * translate * (2 * torch.rand(2) - 1)  # [-1, 1] is two units long
    theta = None
    if {"rotate", "flip", "translate"} & set(kinds):
        cos, sin = math.cos(turn), math.sin(turn)
        theta = torch.tensor([[flip * cos, -flip * sin, float(shift[0])], [sin, cos, float(shift[1])]])
    return Transform(theta, rescale if "rescale" in kinds else 1.0, align_corners)
