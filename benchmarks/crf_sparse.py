"""The design that was not chosen: the same lattice as sparse products of SciPy instead of compiled kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, identity

from weakseg.crf.permutohedral import Filter, bilateral, gaussian
from weakseg.crf.unary import unary_from_probabilities
from weakseg.recipe import CrfConfig


def sparse_marginals(config: CrfConfig) -> Callable[[tuple[NDArray[np.uint8], NDArray[Any]]], NDArray[np.float32]]:
    """(1, K, H, W) of one image and its probabilities. The lattice is still built by our kernels, which flatters it."""

    def marginals(job: tuple[NDArray[np.uint8], NDArray[Any]]) -> NDArray[np.float32]:
        image, probabilities = job
        height, width = image.shape[:2]
        lattices = [
            products(gaussian(height, width, config.gaussian_sxy, config.gaussian_weight)),
            products(bilateral(image, config.bilateral_sxy, config.bilateral_srgb, config.bilateral_weight)),
        ]
        logits = -unary_from_probabilities(probabilities).reshape(probabilities.shape[1], -1).T.copy()  # (N, K)
        q = softmax(logits)
        for _ in range(config.iterations):
            messages = logits.copy()
            for splat, blurs, slices in lattices:
                vertices = splat @ q
                for blur in blurs:
                    vertices = blur @ vertices
                messages += slices @ vertices
            q = softmax(messages)
        return q.T.reshape(probabilities.shape)

    return marginals


def products(f: Filter) -> tuple[Any, list[Any], Any]:
    """Splat (M, N), blurs (M, M) and slice (N, M) as CSR matrices."""
    n_pixels, corners = f.offsets.shape
    rows = np.arange(0, n_pixels * corners + 1, corners, dtype=np.int32)
    slices = csr_matrix((f.weights.ravel(), f.offsets.ravel().astype(np.int32), rows), (n_pixels, f.n_vertices))
    blurs = []
    for along in f.neighbours:
        m, side = np.nonzero(along < f.n_vertices)
        half = np.full(len(m), 0.5, dtype=np.float32)
        to = csr_matrix((half, (m, along[m, side].astype(np.int32))), (f.n_vertices, f.n_vertices))
        blurs.append((to + identity(f.n_vertices, dtype=np.float32, format="csr")).tocsr())
    return slices.T.tocsr(), blurs, slices


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))
