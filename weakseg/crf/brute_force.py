"""The exact dense CRF, O(N^2) in pixels: what faster backends are tested against. Up to 32 x 32 pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from weakseg.crf.unary import unary_from_probabilities
from weakseg.errors import DataError
from weakseg.recipe import CrfConfig
from weakseg.stopping import Check

MAX_PIXELS = 32 * 32


def marginals(
    image: NDArray[np.uint8], probabilities: NDArray[Any], config: CrfConfig, check: Check
) -> NDArray[np.float32]:
    """(S, K, H, W) from probabilities (S, K, H, W), with full kernel matrices, in float64; i = j is part of the sum."""
    height, width = image.shape[:2]
    if height * width > MAX_PIXELS:
        raise DataError(f"brute force takes at most {MAX_PIXELS} pixels, got {height} x {width}: use another backend")
    y, x = np.indices((height, width)).reshape(2, -1, 1)
    place = np.concatenate([x, y], axis=1).astype(np.float64)
    colour = image.reshape(-1, 3).astype(np.float64)
    bilateral = np.concatenate([place / config.bilateral_sxy, colour / config.bilateral_srgb], axis=1)
    pairwise = config.gaussian_weight * _kernel(place / config.gaussian_sxy)
    pairwise += config.bilateral_weight * _kernel(bilateral)
    logits = -unary_from_probabilities(probabilities).astype(np.float64)
    logits = logits.reshape(*logits.shape[:2], -1)  # (S, K, N)
    q = _softmax(logits)
    for _ in range(config.iterations):
        check()
        q = _softmax(logits + q @ pairwise)
    return q.reshape(probabilities.shape).astype(np.float32)


def _kernel(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, N) n_i exp(-|f_i - f_j|^2 / 2) n_j with n = 1 / sqrt(row sum), from features (N, D)."""
    squares = (features**2).sum(axis=1)
    distance = np.maximum(squares[:, None] + squares[None, :] - 2 * features @ features.T, 0)
    kernel = np.exp(-distance / 2)
    norm = 1 / np.sqrt(kernel.sum(axis=1) + 1e-20)
    scaled: NDArray[np.float64] = norm[:, None] * kernel * norm[None, :]
    return scaled


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    out: NDArray[np.float64] = e / e.sum(axis=1, keepdims=True)
    return out
