"""The C++ of the PyPI package pydensecrf2: the same lattice, one thread, built anew for every call. Our oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydensecrf import densecrf

from weakseg.crf.unary import unary_from_probabilities
from weakseg.recipe import CrfConfig
from weakseg.stopping import Check


def marginals(
    image: NDArray[np.uint8], probabilities: NDArray[Any], config: CrfConfig, check: Check
) -> NDArray[np.float32]:
    """(S, K, H, W) from C-contiguous image (H, W, 3) and probabilities (S, K, H, W)."""
    made = []
    for unary in unary_from_probabilities(probabilities):
        check()
        made.append(_marginals(image, unary, config))
    return np.stack(made)


def _marginals(image: NDArray[np.uint8], unary: NDArray[np.float32], config: CrfConfig) -> NDArray[np.float32]:
    n_labels, height, width = unary.shape
    crf = densecrf.DenseCRF2D(width, height, n_labels)
    crf.setUnaryEnergy(unary.reshape(n_labels, -1))
    if config.gaussian_weight > 0:
        crf.addPairwiseGaussian(sxy=config.gaussian_sxy, compat=config.gaussian_weight)
    if config.bilateral_weight > 0:
        writable = np.require(image, requirements=["C", "W"])  # its Cython signature refuses read-only memory
        crf.addPairwiseBilateral(
            sxy=config.bilateral_sxy, srgb=config.bilateral_srgb, rgbim=writable, compat=config.bilateral_weight
        )
    return np.array(crf.inference(config.iterations), dtype=np.float32).reshape(unary.shape)
