"""How far images have moved from those of training, as population stability indices (PSI).

    PSI = sum_i (p_i - q_i) ln(p_i / q_i)        p_i, q_i: shares of bin i, then and now

0 = the same; by custom below 0.1 nothing has changed, from 0.25 on much has. Also known as Jeffreys divergence, the sum
of both Kullback-Leibler divergences; of two normal distributions it has a closed form, so that mean and deviation do
where no bins were kept.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

LEAST_STD = 0.02  # of brightness: 5 grey levels; less is no measure of distance
N_TENTHS = 10
_GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def brightness(rgb: NDArray[np.uint8]) -> float:
    """Mean grey value of an image (H, W, 3), in [0, 1]."""
    return float(np.dot(cv2.mean(rgb)[:3], _GREY)) / 255


def tenths(values: NDArray[Any]) -> NDArray[np.intp]:
    """The tenth of [0, 1], 0 to 9, that each value lies in; 1 is in the last."""
    return np.clip((np.asarray(values) * N_TENTHS).astype(np.intp), 0, N_TENTHS - 1)


def psi(p: NDArray[Any], n_p: int, q: NDArray[Any], n_q: int) -> NDArray[np.float64]:
    """PSI of shares over the last axis (..., K) of n_p and n_q images -> (...).

    Half an image is added to each bin, so that empty ones give a finite value. What chance alone gives is
    about (K - 1) (1 / n_p + 1 / n_q).
    """
    p, q = (
        (shares * n + 0.5) / (n + shares.shape[-1] / 2) for shares, n in ((np.asarray(p), n_p), (np.asarray(q), n_q))
    )
    return np.asarray(((p - q) * np.log(p / q)).sum(axis=-1))


def psi_of_frequencies(p: NDArray[Any], n_p: int, q: NDArray[Any], n_q: int) -> NDArray[np.float64]:
    """PSI of each class, over the bins "is there" and "is not": (C,) frequencies -> (C,)."""
    p, q = (np.stack([frequency, 1 - frequency], axis=-1) for frequency in (np.asarray(p), np.asarray(q)))
    return psi(p, n_p, q, n_q)


def psi_of_normals(mean_p: float, std_p: float, mean_q: float, std_q: float) -> float:
    """PSI of two normal distributions; of equal deviations, the distance of the means in deviations, squared.

    Source: Jeffreys divergence; the sum of the Kullback-Leibler divergences of two univariate normals, both ways.
    """
    p, q = (max(std, LEAST_STD) ** 2 for std in (std_p, std_q))
    return 0.5 * (p / q + q / p - 2 + (mean_p - mean_q) ** 2 * (1 / p + 1 / q))
