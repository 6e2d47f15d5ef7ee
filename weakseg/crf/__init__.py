"""Dense CRF: sharpen class probabilities along the edges of the image.

Energy and mean-field updates of Krähenbühl & Koltun 2011, with U = -log P:

    Q <- softmax_c(-U + w_g (K_g Q) + w_b (K_b Q)),    started at softmax(-U), repeated `iterations` times

K_g and K_b are the gaussian kernel on (x, y) and the bilateral one on (x, y, r, g, b), symmetrically normalised.
Backends differ in how they multiply by K; each is a module with `marginals(image, probabilities, config, check)`.
`lattice` computes without the GIL: several images in threads of one process take several cores.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from weakseg.errors import ConfigError, DataError, WeaksegError
from weakseg.recipe import CrfConfig
from weakseg.stopping import Check, go_on

# What each backend needs that weakseg itself does not: import name, and how to get it.
BACKENDS = {
    "lattice": ("numba", "pip install 'weakseg[refine]'"),
    "pydensecrf": ("pydensecrf", "pip install 'weakseg[crf]' (needs a C++ compiler)"),
    "brute_force": (None, ""),
}


def refine(
    image: NDArray[np.uint8], probabilities: NDArray[Any], config: CrfConfig, check: Check = go_on
) -> NDArray[np.float32]:
    """Marginals of the dense CRF whose unary term is -log(clip(probabilities, 1e-5, 1)).

    Args:
        image: (H, W, 3) uint8 RGB.
        probabilities: (K, H, W) >= 0, background among the K; they need not sum to 1. (S, K, H, W) refines S of them,
            each by itself, at less than S times the cost: what depends on the image alone is made once.
        config: kernels; the spatial widths are scaled by long side / `reference_px` when that is set. With resolution
            "half", image and probabilities are averaged to half the side and the marginals brought back bilinearly.
        check: called before each iteration; what it raises ends the work. Of `pydensecrf`, before each of the S.
    Returns:
        float32 like probabilities, sums to 1 over K; ones when K = 1.
    Raises:
        DataError: shapes that do not fit, negative or non-finite probabilities, an image too large for the memory that
            the lattice may take (`permutohedral.MEMORY_LIMIT`).
        ConfigError: a width that is not positive, a negative weight or count, an unknown backend or resolution.
        WeaksegError: the backend is not installed.
    """
    check_config(config)
    _check_arrays(image, probabilities)
    sets = probabilities if probabilities.ndim == 4 else probabilities[None]
    if sets.shape[1] == 1:
        return np.ones(probabilities.shape, dtype=np.float32)
    config = scaled(config, *image.shape[:2])
    if config.resolution == "half" and max(image.shape[:2]) > 1:
        return _at_half_resolution(image, sets, config, check).reshape(probabilities.shape)
    return _marginals(image, sets, config, check).reshape(probabilities.shape)


def scaled(config: CrfConfig, height: int, width: int) -> CrfConfig:
    """The config with its spatial widths in pixels of an image of this size; `reference_px` becomes None."""
    if config.reference_px is None:
        return config
    return replace(_with_widths(config, max(height, width) / config.reference_px), reference_px=None)


def check_config(config: CrfConfig) -> None:
    """Raises ConfigError when the config cannot be used."""
    if config.backend not in BACKENDS:
        raise ConfigError(f"unknown CRF backend {config.backend!r}: expected one of {', '.join(BACKENDS)}")
    if config.resolution not in ("full", "half"):
        raise ConfigError(f"unknown resolution {config.resolution!r} of the CRF: expected full or half")
    widths = (config.gaussian_sxy, config.bilateral_sxy, config.bilateral_srgb)
    if min(widths) <= 0 or (config.reference_px is not None and config.reference_px <= 0):
        raise ConfigError(f"widths and reference_px of the CRF must be positive, got {config}")
    if min(config.gaussian_weight, config.bilateral_weight, config.iterations) < 0:
        raise ConfigError(f"weights and iterations of the CRF must not be negative, got {config}")


def is_installed(backend: str) -> bool:
    """Whether what the backend needs is there; nothing of it is imported."""
    package, _ = BACKENDS[backend]
    return package is None or find_spec(package) is not None


def check_available(backend: str = "lattice") -> None:
    """Raises WeaksegError when what the backend needs is not installed."""
    package, advice = BACKENDS[backend]
    if package is None:
        return
    try:
        import_module(package)
    except ImportError as error:
        raise WeaksegError(
            f"the CRF backend {backend} needs {package}, which is not installed: {advice}, or switch the CRF off"
        ) from error


def warm_up() -> bool:
    """Load or compile every kernel of the backend `lattice` once, so that no caller waits; False: not installed.

    A third of a second where compiled kernels are kept on disk (beside the package, or in NUMBA_CACHE_DIR), about five
    where they are not.
    """
    try:
        check_available()
    except WeaksegError:
        return False
    image = np.zeros((1, 2, 3), dtype=np.uint8)
    for n_labels in (2, 3, 5, 9):  # blocks of 1, 2, 4 and 8 values
        refine(image, np.ones((n_labels, 1, 2), dtype=np.float32), CrfConfig(iterations=1))
    return True


def _marginals(image: NDArray[np.uint8], sets: NDArray[Any], config: CrfConfig, check: Check) -> NDArray[np.float32]:
    """(S, K, H, W) by the config's backend, at the size of the image."""
    check_available(config.backend)
    module = import_module(f"weakseg.crf.{config.backend}")
    marginals: NDArray[np.float32] = module.marginals(np.ascontiguousarray(image), sets, config, check)
    return marginals


def _at_half_resolution(
    image: NDArray[np.uint8], sets: NDArray[Any], config: CrfConfig, check: Check
) -> NDArray[np.float32]:
    height, width = image.shape[:2]
    half = (width + 1) // 2, (height + 1) // 2
    small = _resized(sets.astype(np.float32), half, cv2.INTER_AREA)
    small_image = np.asarray(cv2.resize(image, half, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    marginals = _marginals(small_image, small, _with_widths(config, 0.5), check)
    whole = _resized(marginals, (width, height), cv2.INTER_LINEAR)
    return np.asarray(whole / whole.sum(axis=1, keepdims=True), dtype=np.float32)


def _resized(sets: NDArray[Any], size: tuple[int, int], how: int) -> NDArray[np.float32]:
    """(S, K, H, W) to size (width, height)."""
    planes = [np.asarray(cv2.resize(plane, size, interpolation=how)) for one in sets for plane in one]
    return np.array(planes, dtype=np.float32).reshape(*sets.shape[:2], size[1], size[0])


def _with_widths(config: CrfConfig, factor: float) -> CrfConfig:
    return replace(config, gaussian_sxy=config.gaussian_sxy * factor, bilateral_sxy=config.bilateral_sxy * factor)


def _check_arrays(image: NDArray[np.uint8], probabilities: NDArray[Any]) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise DataError(f"image must be (H, W, 3) uint8, got {image.shape} {image.dtype}: convert it to RGB first")
    shape = probabilities.shape
    if probabilities.ndim not in (3, 4) or 0 in shape or shape[-2:] != image.shape[:2]:
        raise DataError(
            f"probabilities must be (K, {image.shape[0]}, {image.shape[1]}) with K >= 1, got {shape}: "
            "bring the maps to the size of the image"
        )
    if not np.isfinite(probabilities).all() or probabilities.min() < 0:
        raise DataError("probabilities must be finite and >= 0, got others: give probabilities, not logits")
