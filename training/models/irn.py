"""IRN: boundaries between objects, learnt from which cells belong together. Ahn, Cho & Kwak, CVPR 2019."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models.backbone import Backbone
from training.models.layers import freeze, wide
from weakseg.random_walk import pair_offsets

STRIDE = 4  # pixels of a cell
CHANNELS, GROUPS = 32, 4  # of each map's projection


class EdgeNet(nn.Module):
    """The edge branch of IRN over the five maps of a frozen backbone.

    forward: images (B, 3, H, W) RGB 0..255 -> boundaries (B, 1, ceil(H/4), ceil(W/4)) in [0, 1] float32.
    The backbone stays as it is: no gradient, no dropout, batch norm by its stored statistics, also in training mode.
    Left out: the displacement branch. It tells instances of a class apart, and shares no weight with this one.
    Source: jiwoon-ahn/irn net/resnet50_irn.py, over a ResNet-50 of output stride 16.
    """

    stride = STRIDE

    def __init__(self, backbone: Backbone, radius: int = 5) -> None:
        super().__init__()
        freeze(backbone)
        self.backbone, self.radius = backbone, radius
        self.options = {"radius": radius}  # what store.py builds it from
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(n, CHANNELS, 1, bias=False), nn.GroupNorm(GROUPS, CHANNELS))
            for n in backbone.channels
        )
        self.joined = nn.Conv2d(CHANNELS * len(backbone.channels), 1, 1)

    def train(self, mode: bool = True) -> EdgeNet:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            maps = self.backbone(images)
        size = [(side + STRIDE - 1) // STRIDE for side in images.shape[2:]]
        parts = [
            F.interpolate(projection(x), size, mode="bilinear", align_corners=False).relu()
            for projection, x in zip(self.projections, maps, strict=True)
        ]
        return wide(self.joined(torch.cat(parts, dim=1))).sigmoid()  # half precision knows nothing close to 1

    def affinities(self, edges: Tensor, radius: int) -> Tensor:
        """(B, S + 1, h, w): the S pairs of `path_affinities`, and 1 - boundary, which sets out on the walk."""
        return torch.cat([path_affinities(edges, radius), 1 - edges], dim=1)


def path_affinities(edges: Tensor, radius: int) -> Tensor:
    """W_ij = 1 - max_{k on the path from i to j} edges_k of every cell with the S neighbours of `pair_offsets(radius)`.

    Args:
        edges: (B, 1, h, w) in [0, 1].
    Returns:
        (B, S, h, w) in [0, 1]; 0 where the neighbour lies outside the map. The gradient goes to one largest cell.
    Source: Ahn, Cho & Kwak 2019, class boundary detection.
    """
    height, width = edges.shape[2:]
    reach = radius - 1
    around = F.pad(edges, (reach, reach, 0, reach), value=1.0)
    paths = [path(dy, dx) for dy, dx in pair_offsets(radius).tolist()]
    moved = {  # each cell once: it lies on many paths
        (y, x): around[:, :, y : y + height, reach + x : reach + x + width] for cells in paths for y, x in cells
    }
    # Not amax, whose backward pass needs all the values: radius 10 has 2,000 of them a cell.
    highest = [torch.cat([moved[cell] for cell in cells], dim=1).max(dim=1, keepdim=True).values for cells in paths]
    return 1 - torch.cat(highest, dim=1)


def path(dy: int, dx: int) -> list[tuple[int, int]]:
    """Cells (y, x) between (0, 0) and (dy, dx), both included: nearer than 1 to the straight line through them.

    Of the cells in the box that both span. (dy, dx) is not (0, 0).
    Source: jiwoon-ahn/irn misc/indexing.py `PathIndex`.
    """
    box = [(y, x) for y in range(min(0, dy), max(0, dy) + 1) for x in range(min(0, dx), max(0, dx) + 1)]
    return [(y, x) for y, x in box if (dy * x - dx * y) ** 2 < dy * dy + dx * dx]
