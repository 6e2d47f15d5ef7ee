"""Dense CRF of whole batches in torch, for GPUs: the energy and the updates of `weakseg.crf`, on CPU tensors too.

    Q <- softmax_k(-U + w_g (K_g Q) + w_b (K_b Q)),    started at softmax(-U), repeated `iterations` times

K_g and K_b are symmetrically normalised gaussians of (x, y) and (x, y, r, g, b), Krähenbühl & Koltun 2011. They
multiply through the permutohedral lattice of Adams, Baek & Davis 2010: splat pixels onto the vertices of the simplex
around them, blur with [1/2, 1, 1/2] along each of the lattice's d + 1 directions, slice back. One lattice holds the
whole batch: the image is the most significant digit of a vertex's key, so no two images share a vertex.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt

import numpy as np
import torch
from torch import Tensor

from weakseg.crf import check_config, scaled
from weakseg.crf.unary import MIN_PROBABILITY
from weakseg.errors import ConfigError, DataError
from weakseg.recipe import CrfConfig

MAX_COORDINATE = 2**20  # of lattice points: float32 still tells eighths apart there
MAX_KEYS = 2**63


@torch.no_grad()
def refine(images: Tensor, probabilities: Tensor, config: CrfConfig, mask: Tensor | None = None) -> Tensor:
    """Marginals of the dense CRF whose unary term is -log(clip(probabilities, 1e-5, 1)), for a batch of images.

    Equal to pydensecrf on each image alone up to the order of sums in float32 (marginals differ by 1e-8 on average). On
    CUDA the splat adds in no fixed order, so two runs are equal up to rounding, too. No gradient flows.

    Memory, per real pixel: 600 bytes while the lattices are built, about 100 once they are finished; per iteration 24
    bytes for each of the S * K planes and 12 for each plane of a vertex (0.1 to 3 vertices a pixel and kernel; most for
    small widths and textured images). A 321 x 321 photograph with 21 classes needs about 0.1 GB.

    Args:
        images: (B, H, W, 3) uint8 RGB.
        probabilities: (B, K, H, W) or (B, S, K, H, W), any floating type, >= 0, background among the K; they need not
            sum to 1. S sets of one image (a low and a high background, say) share its lattice.
        config: kernels and iterations; the spatial widths of each image are scaled by its long side / `reference_px`
            when that is set. Backend and early stop are the CPU's and not looked at; resolution must be full.
        mask: (B, H, W) bool, the real pixels where images of several sizes are padded, at the bottom and right, to one
            batch; None = all are real. The size of an image is the number of its rows and columns with a real pixel.
            Padding takes no part in any filter; its marginals are the softmax of the unary term.
    Returns:
        Like `probabilities`, float32 and on its device, sums to 1 over K; ones when K = 1.
    Raises:
        DataError: shapes, types or devices that do not fit, negative or non-finite probabilities (padding included), an
            image without a real pixel, widths so small that float32 or a key of 63 bits cannot hold the lattice.
        ConfigError: a width that is not positive, a negative weight or count.
    """
    check_config(config)
    if config.resolution != "full":
        raise ConfigError(f"batches are refined at full resolution, got {config.resolution!r}: shrink them first")
    _check_tensors(images, probabilities, mask)
    if mask is None:
        mask = torch.ones(images.shape[:3], dtype=torch.bool, device=images.device)
    sets = probabilities if probabilities.ndim == 5 else probabilities[:, None]
    logits = sets.float().clamp(MIN_PROBABILITY, 1).log().permute(0, 3, 4, 1, 2)  # -U, (B, H, W, S, K)
    scores = logits[mask]  # (N, S, K), N real pixels of all images
    lattices = _lattices(images, mask, config)
    q = scores.softmax(dim=-1)
    for _ in range(config.iterations):
        message = torch.zeros_like(q)
        for lattice in lattices:
            message += _filter(lattice, q.flatten(1)).view_as(q)
        q = (scores + message).softmax(dim=-1)
    marginals = logits.softmax(dim=-1)
    marginals[mask] = q
    return marginals.permute(0, 3, 4, 1, 2).reshape(probabilities.shape).contiguous()


@dataclass(frozen=True)
class _Lattice:
    """Where N points of d features lie among M vertices.

    corners: (d + 1, N) int32, the vertices of the simplex around each point.
    weights: (d + 1, N) float32, its barycentric coordinates, times what the filter multiplies by before and after.
    neighbours: (d + 1, 2, M) int32, the vertices one step back and forth in each direction; M = there is none.
    """

    corners: Tensor
    weights: Tensor
    neighbours: Tensor


def _lattices(images: Tensor, mask: Tensor, config: CrfConfig) -> list[_Lattice]:
    """The gaussian and the bilateral kernel over the real pixels, without those of weight 0."""
    image, y, x = mask.nonzero(as_tuple=True)  # (N,) each, image by image
    place = torch.stack([x, y]).float()
    gaussian_sxy, bilateral_sxy = _spatial_widths(mask, config)[:, image]
    lattices = []
    if config.gaussian_weight > 0:
        lattices.append(_normalised(_lattice(place / gaussian_sxy, image), config.gaussian_weight))
    if config.bilateral_weight > 0:
        # By a tensor: CUDA would multiply by the reciprocal of a number, which rounds differently.
        srgb = torch.full_like(bilateral_sxy, config.bilateral_srgb)
        features = torch.cat([place / bilateral_sxy, images[mask].T.float() / srgb])
        lattices.append(_normalised(_lattice(features, image), config.bilateral_weight))
    return lattices


def _spatial_widths(mask: Tensor, config: CrfConfig) -> Tensor:
    """(2, B) float32: gaussian and bilateral width of each image in its own pixels."""
    heights, widths = mask.any(dim=2).sum(dim=1).tolist(), mask.any(dim=1).sum(dim=1).tolist()
    configs = [scaled(config, height, width) for height, width in zip(heights, widths, strict=True)]
    pairs = [(c.gaussian_sxy, c.bilateral_sxy) for c in configs]
    return torch.tensor(pairs, dtype=torch.float32, device=mask.device).T


def _normalised(lattice: _Lattice, weight: float) -> _Lattice:
    """Fold diag(n) K diag(n), n_i = 1 / sqrt(sum_j K_ij + 1e-20), and the kernel's weight into the lattice.

    The paper's factor 1 / (1 + 2^-d) of the slice cancels here.
    """
    ones = lattice.weights.new_ones(lattice.weights.shape[1], 1)
    norm = (_filter(lattice, ones)[:, 0] + 1e-20).rsqrt()
    return _Lattice(lattice.corners, lattice.weights * (norm * sqrt(weight)), lattice.neighbours)


def _filter(lattice: _Lattice, points: Tensor) -> Tensor:
    """Splat, blur and slice: (N, V) float32 -> (N, V)."""
    n_vertices = lattice.neighbours.shape[2]
    values = points.new_zeros(n_vertices + 1, points.shape[1])  # the last row stays 0: the neighbour that is missing
    for corner, weight in zip(lattice.corners, lattice.weights, strict=True):
        values.index_add_(0, corner, points * weight[:, None])
    for back, forth in lattice.neighbours:
        both = values.index_select(0, back)
        both += values.index_select(0, forth)
        values[:-1].add_(both, alpha=0.5)
    out = torch.zeros_like(points)
    for corner, weight in zip(lattice.corners, lattice.weights, strict=True):
        out.addcmul_(values.index_select(0, corner), weight[:, None])
    return out


def _lattice(features: Tensor, image: Tensor) -> _Lattice:
    """The lattice, not normalised, of features (d, N) float32 in kernel widths and image (N,) int64, ascending.

    A vertex has d + 1 coordinates that sum to 0; its key is the first d of them in a mixed radix, below the image.
    """
    d = len(features)
    base, rank, weights = _simplex(features)
    image_stride, *strides = _strides(base[:d], n_images=int(image[-1]) + 1)
    radix = torch.tensor(strides, device=features.device)[:, None]
    base = (base - base.amin(dim=1, keepdim=True)).long()[:d]
    origin = image * image_stride + (base * radix).sum(dim=0)
    # The corner of remainder r: r in each coordinate, less d + 1 in those of the r highest ranks.
    shifts = (((r - (d + 1) * (rank[:d] > d - r)) * radix).sum(dim=0) for r in range(d + 1))
    vertices, corners = torch.unique(torch.stack([origin + shift for shift in shifts]), return_inverse=True)
    # A step in direction j: -1 in each coordinate, but d in the j-th; the last direction's is not in the key.
    steps = [(d + 1) * stride - sum(strides) for stride in [*strides, 0]]
    neighbours = [torch.stack([_find(vertices, vertices - step), _find(vertices, vertices + step)]) for step in steps]
    return _Lattice(corners.int(), weights, torch.stack(neighbours))


def _simplex(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The simplex around each point, features (d, N) float32.

    Returns:
        (d + 1, N) each: the corner of remainder 0 (float32, whole numbers); the rank of each coordinate by how far the
        point lies above that corner (int64, 0 = farthest); barycentric coordinates by remainder (float32).
    Source: Adams, Baek & Davis 2010. In float32 and in the operations of Krähenbühl's code: many points lie on the face
    of a simplex, and on which side they are rounded decides what vertices there are to blur through.
    """
    d = len(features)
    elevated = _elevate(features)
    extent = float(elevated.abs().max())
    if not extent <= MAX_COORDINATE:  # not `>`: it may be NaN
        raise DataError(f"features span {extent:.1e} steps of the lattice, expected at most 2^20: give larger widths")
    multiple = (elevated * (1 / (d + 1))).round()
    rank = (elevated - multiple * (d + 1)).argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    # Rounding may leave the plane where coordinates sum to 0; the ones that were rounded farthest are rounded back.
    rank += multiple.sum(dim=0).long()
    back = (rank < 0).long() - (rank > d).long()
    multiple += back
    rank += back * (d + 1)
    base = multiple * (d + 1)
    distance = torch.empty_like(elevated).scatter_(0, rank, (elevated - base) * (1 / (d + 1))).flip(0)  # ascending
    weights = distance - distance.roll(1, dims=0)
    weights[0] += 1
    return base, rank, weights


def _elevate(features: Tensor) -> Tensor:
    """Onto the plane of d + 1 coordinates that sum to 0, where the blur's standard deviation is 1: (d + 1, N)."""
    d = len(features)
    deviation = float(np.float32(sqrt(2 / 3) * (d + 1)))  # rounded first, as in Krähenbühl's code: see `_simplex`
    rows, total = [], torch.zeros_like(features[0])
    for j in range(d, 0, -1):
        coordinate = features[j - 1] * (deviation / sqrt(j * (j + 1)))
        rows.append(total - j * coordinate)
        total = total + coordinate
    return torch.stack([total, *reversed(rows)])


def _strides(base: Tensor, n_images: int) -> list[int]:
    """What one image, then one unit of each coordinate adds to a key; base (d, N), the corners of remainder 0.

    Corners lie within d of the base and their neighbours within another d, on both sides. With room for these 4 d
    values in each digit a neighbour's key is the vertex's plus a constant, and is no other place's key.
    """
    d = len(base)
    sizes = [int(extent) + 4 * d + 1 for extent in (base.amax(dim=1) - base.amin(dim=1)).tolist()]
    n_keys = prod(sizes) * n_images
    if n_keys >= MAX_KEYS:
        raise DataError(
            f"the lattice of {n_images} images has {n_keys:.1e} places, expected fewer than 2^63: "
            f"give larger widths or smaller batches"
        )
    return [prod(sizes[i:]) for i in range(d + 1)]


def _find(vertices: Tensor, keys: Tensor) -> Tensor:
    """int32 places of keys among the sorted vertices, their number where a key is none of them."""
    place = torch.searchsorted(vertices, keys).clamp_(max=len(vertices) - 1)
    return torch.where(vertices[place] == keys, place, len(vertices)).int()


def _check_tensors(images: Tensor, probabilities: Tensor, mask: Tensor | None) -> None:
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != torch.uint8 or 0 in images.shape:
        raise DataError(f"images must be (B, H, W, 3) uint8, got {tuple(images.shape)} {images.dtype}: convert to RGB")
    n_images, height, width = images.shape[:3]
    shape = tuple(probabilities.shape)
    if len(shape) not in (4, 5) or 0 in shape or (shape[0], *shape[-2:]) != (n_images, height, width):
        raise DataError(
            f"probabilities must be ({n_images}, K, {height}, {width}) or ({n_images}, S, K, {height}, {width}) with "
            f"K, S >= 1, got {shape}: bring the maps to the size of the images"
        )
    if mask is not None and (mask.shape != images.shape[:3] or mask.dtype != torch.bool):
        raise DataError(
            f"mask must be ({n_images}, {height}, {width}) bool, got {tuple(mask.shape)} {mask.dtype}: "
            f"mark the real pixels with True"
        )
    devices = {str(t.device) for t in (images, probabilities, mask) if t is not None}
    if len(devices) > 1:
        raise DataError(f"expected all tensors on one device, got {', '.join(sorted(devices))}: move them with .to()")
    if not bool(torch.isfinite(probabilities).all()) or bool((probabilities < 0).any()):
        raise DataError("probabilities must be finite and >= 0, got others: give probabilities, not logits")
    if mask is not None and not bool(mask.flatten(1).any(dim=1).all()):
        raise DataError("every image needs a real pixel, got one whose mask is all False: leave it out of the batch")
