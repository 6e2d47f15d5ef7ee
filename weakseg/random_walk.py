"""Random walk over learnt affinities: scores flow between neighbouring cells that belong together.

The transition matrix has 1 + 2 S entries in each of its h w columns; it is applied step by step to the K rows of scores
and never multiplied by itself: memory grows with h w, not with its square. AffinityNet, Ahn & Kwak, CVPR 2018; IRN,
Ahn, Cho & Kwak, CVPR 2019.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from weakseg.errors import ConfigError, DataError, WeaksegError
from weakseg.stopping import Check, go_on


def pair_offsets(radius: int) -> NDArray[np.int64]:
    """(S, 2) rows (dy, dx): every neighbour nearer than `radius`, one of each two opposite ones.

    (0, x) for 1 <= x < r; (y, x) for 1 <= y < r and |x| < r with x^2 + y^2 < r^2. S = 12, 34, 152 for r = 3, 5, 10.
    """
    if radius < 2:
        raise ConfigError(f"radius of pairs must be at least 2, got {radius}: 5 is usual")
    right = [(0, x) for x in range(1, radius)]
    below = [(y, x) for y in range(1, radius) for x in range(1 - radius, radius) if x * x + y * y < radius * radius]
    return np.array(right + below, dtype=np.int64)


def random_walk(
    scores: NDArray[Any], affinities: NDArray[Any], *, radius: int, beta: float, steps: int, check: Check = go_on
) -> NDArray[np.float32]:
    """scores T^steps with T = A^beta (element by element), its columns divided by their sums.

    A_ij = A_ji is the affinity of a pair of cells, 1 for a cell with itself, 0 beyond the radius.

    Args:
        scores: (K, h, w) >= 0, the background among the K where it walks.
        affinities: (S, h, w) or (S + 1, h, w) in [0, 1]: entry s at (y, x) belongs to (y, x) and
            (y, x) + pair_offsets(radius)[s]; what reaches outside the map is not looked at. A last row S + 1 is how
            much of each cell's scores sets out, all of it without: IRN's 1 - boundary.
        beta: exponent, larger = only through strong affinities. steps: psa and IRN have 2^8, SEAM 2^6.
        check: called before each step; what it raises ends the walk.
    Returns:
        (K, h, w) float32; its values stay within the minimum and maximum of each row of what sets out.
    Raises:
        DataError: shapes that do not fit, scores below 0, affinities outside [0, 1], not finite.
        ConfigError: beta not positive, steps below 0.
        WeaksegError: SciPy is not installed.
    """
    if beta <= 0 or steps < 0:
        raise ConfigError(f"beta of the random walk must be positive and steps not negative, got {beta} and {steps}")
    _check(scores, affinities, radius)
    n_classes, height, width = scores.shape
    n_pairs = len(pair_offsets(radius))
    for share in affinities[n_pairs:]:
        scores = scores * share
    step = transition(affinities[:n_pairs], radius, beta)
    rows = np.ascontiguousarray(scores.reshape(n_classes, -1).T, dtype=np.float32)
    for _ in range(steps):
        check()
        rows = step @ rows
    return np.ascontiguousarray(rows.T).reshape(n_classes, height, width)


def refine(
    probabilities: NDArray[Any],
    affinities: NDArray[Any],
    *,
    stride: int,
    radius: int,
    beta: float,
    steps: int,
    check: Check = go_on,
) -> NDArray[np.float32]:
    """Scores of pixels after a walk over the cells of the affinities: averaged over each cell, walked, brought back.

    Args:
        probabilities: (..., K, H, W) >= 0; leading axes are sets, each walked by itself.
        affinities: (S or S + 1, ceil(H / stride), ceil(W / stride)), cells of `stride` pixels; as in `random_walk`.
    Returns:
        float32 like probabilities, bilinear between the cells' centres.
    Raises:
        as `random_walk`.
    """
    *_, height, width = probabilities.shape
    rows, columns = -(-height // stride), -(-width // stride)
    if affinities.shape[1:] != (rows, columns):
        raise DataError(
            f"an image of {height} x {width} has {rows} x {columns} cells of {stride} pixels, "
            f"got affinities {affinities.shape}"
        )
    flat = probabilities.reshape(-1, height, width)
    whole = np.zeros((len(flat), rows * stride, columns * stride), dtype=np.float32)  # beyond the image nothing scores
    whole[:, :height, :width] = flat
    cells = whole.reshape(len(flat), rows, stride, columns, stride).mean(axis=(2, 4))
    walked = random_walk(cells, affinities, radius=radius, beta=beta, steps=steps, check=check)
    pixels = [cv2.resize(one, whole.shape[:0:-1], interpolation=cv2.INTER_LINEAR) for one in walked]
    return np.ascontiguousarray(np.stack(pixels)[:, :height, :width]).reshape(probabilities.shape)


def around(affinities: NDArray[Any], radius: int, row: int, column: int) -> NDArray[np.float32]:
    """(2 radius - 1, 2 radius - 1): affinities of one cell, in the middle, with those around it.

    1 with itself, 0 beyond the radius and outside the map. affinities: as in `random_walk`.
    """
    found = np.zeros((2 * radius - 1, 2 * radius - 1), dtype=np.float32)
    middle = radius - 1
    found[middle, middle] = 1
    height, width = affinities.shape[1:]
    for s, (dy, dx) in enumerate(pair_offsets(radius)):
        if row + dy < height and 0 <= column + dx < width:
            found[middle + dy, middle + dx] = affinities[s, row, column]
        if row - dy >= 0 and 0 <= column - dx < width:
            found[middle - dy, middle - dx] = affinities[s, row - dy, column - dx]
    return found


def transition(affinities: NDArray[Any], radius: int, beta: float) -> Any:
    """T transposed, a SciPy CSR array (h w, h w) float32: row j is what cell j receives, and sums to 1."""
    try:
        from scipy import sparse
    except ImportError as error:
        raise WeaksegError("the random walk needs SciPy: pip install 'weakseg[refine]'") from error
    height, width = affinities.shape[1:]
    cells = np.arange(height * width, dtype=np.int32).reshape(height, width)
    ones, others, weights = [], [], []
    for (dy, dx), affinity in zip(pair_offsets(radius), affinities, strict=True):
        here = (slice(0, height - dy), slice(max(0, -dx), width - max(0, dx)))
        there = (slice(dy, height), slice(max(0, dx), width - max(0, -dx)))
        if dy >= height or abs(dx) >= width:
            continue
        ones.append(cells[here].ravel())
        others.append(cells[there].ravel())
        weights.append(affinity[here].ravel())
    one, other = (np.concatenate([cells.ravel(), *part]) for part in (ones, others))
    weight = np.concatenate([np.ones(cells.size, np.float32), *weights]).astype(np.float32) ** np.float32(beta)
    half = sparse.csr_array((weight, (one, other)), shape=(cells.size, cells.size))
    half.setdiag(half.diagonal() / 2)
    whole = (half + half.T).tocsr()
    return sparse.diags_array(1 / whole.sum(axis=1)).astype(np.float32) @ whole


def _check(scores: NDArray[Any], affinities: NDArray[Any], radius: int) -> None:
    n_pairs = len(pair_offsets(radius))
    allowed = [(n, *scores.shape[1:]) for n in (n_pairs, n_pairs + 1)]
    if scores.ndim != 3 or affinities.shape not in allowed or 0 in scores.shape[1:]:
        raise DataError(
            f"a random walk of radius {radius} takes scores (K, h, w) and affinities "
            f"({n_pairs} or {n_pairs + 1}, h, w), "
            f"got {scores.shape} and {affinities.shape}: are these affinities of this radius and image?"
        )
    if not (np.isfinite(scores).all() and (scores >= 0).all()):
        raise DataError("scores of a random walk must be finite and not negative")
    if not ((affinities >= 0) & (affinities <= 1)).all():
        raise DataError("affinities must lie in [0, 1]: is this the output of an affinity network?")
