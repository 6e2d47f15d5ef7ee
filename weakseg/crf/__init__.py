"""Dense CRF: sharpen class probabilities along the edges of the image.

Energy and mean-field updates of Krähenbühl & Koltun 2011, with U = -log P:

    Q <- softmax_c(-U + w_g (K_g Q) + w_b (K_b Q)),    started at softmax(-U), repeated `iterations` times

K_g and K_b are the gaussian kernel on (x, y) and the bilateral one on (x, y, r, g, b), symmetrically normalised.
Backends differ in how they multiply by K; each is a module with `marginals(image, unary, config)`.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weakseg.errors import ConfigError, DataError
from weakseg.recipe import CrfConfig

BACKENDS = {"pydensecrf": "weakseg.crf.pydensecrf", "brute_force": "weakseg.crf.brute_force"}
MIN_PROBABILITY = 1e-5


def refine(
    image: NDArray[np.uint8], probabilities: NDArray[Any], config: CrfConfig, backend: str = "pydensecrf"
) -> NDArray[np.float32]:
    """Marginals of the dense CRF whose unary term is -log(clip(probabilities, 1e-5, 1)).

    Args:
        image: (H, W, 3) uint8 RGB.
        probabilities: (K, H, W) >= 0, background among the K; they need not sum to 1.
        config: kernels; the spatial widths are scaled by long side / `reference_px` when that is set.
        backend: a name of `BACKENDS`.
    Returns:
        (K, H, W) float32, sums to 1 over K; ones when K = 1.
    Raises:
        DataError: shapes that do not fit, negative or non-finite probabilities.
        ConfigError: a width that is not positive, a negative weight or count, an unknown backend.
        WeaksegError: the backend is not installed.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"unknown CRF backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    _check_arrays(image, probabilities)
    _check_config(config)
    if len(probabilities) == 1:
        return np.ones(probabilities.shape, dtype=np.float32)
    unary = -np.log(np.clip(probabilities, MIN_PROBABILITY, 1, dtype=np.float32))
    module = import_module(BACKENDS[backend])
    marginals: NDArray[np.float32] = module.marginals(
        np.ascontiguousarray(image), np.ascontiguousarray(unary), scaled(config, image.shape[0], image.shape[1])
    )
    return marginals


def scaled(config: CrfConfig, height: int, width: int) -> CrfConfig:
    """The config with its spatial widths in pixels of an image of this size; `reference_px` becomes None."""
    if config.reference_px is None:
        return config
    factor = max(height, width) / config.reference_px
    return replace(
        config,
        gaussian_sxy=config.gaussian_sxy * factor,
        bilateral_sxy=config.bilateral_sxy * factor,
        reference_px=None,
    )


def _check_arrays(image: NDArray[np.uint8], probabilities: NDArray[Any]) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise DataError(f"image must be (H, W, 3) uint8, got {image.shape} {image.dtype}: convert it to RGB first")
    if probabilities.ndim != 3 or not len(probabilities) or probabilities.shape[1:] != image.shape[:2]:
        raise DataError(
            f"probabilities must be (K, {image.shape[0]}, {image.shape[1]}) with K >= 1, got {probabilities.shape}: "
            f"bring the maps to the size of the image"
        )
    if not np.isfinite(probabilities).all() or probabilities.min() < 0:
        raise DataError("probabilities must be finite and >= 0, got others: give probabilities, not logits")


def _check_config(config: CrfConfig) -> None:
    widths = (config.gaussian_sxy, config.bilateral_sxy, config.bilateral_srgb)
    if min(widths) <= 0 or (config.reference_px is not None and config.reference_px <= 0):
        raise ConfigError(f"widths and reference_px of the CRF must be positive, got {config}")
    if min(config.gaussian_weight, config.bilateral_weight, config.iterations) < 0:
        raise ConfigError(f"weights and iterations of the CRF must not be negative, got {config}")
