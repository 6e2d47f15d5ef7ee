"""Probabilities to the unary term of the CRF's energy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_PROBABILITY = 1e-5


def unary_from_probabilities(probabilities: NDArray[Any]) -> NDArray[np.float32]:
    """-log(clip(probabilities, 1e-5, 1)), C-contiguous float32 of the same shape."""
    unary: NDArray[np.float32] = np.clip(probabilities, MIN_PROBABILITY, 1, dtype=np.float32, order="C")
    np.log(unary, out=unary)
    np.negative(unary, out=unary)
    return unary
