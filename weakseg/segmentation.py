"""Logits of the segmentation network to a label map. Channel = mask value, so channel 0 is background."""

from __future__ import annotations

from functools import partial
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from weakseg import crf
from weakseg.cam import check_cells, upsample, upsample_one
from weakseg.classes import mask_dtype
from weakseg.errors import DataError
from weakseg.recipe import CrfConfig
from weakseg.upsampled_argmax import argmax_into, upsampled_argmax

LEAST_PROBABILITY = 0.01


def labels_from_logits(
    logits: NDArray[Any], height: int, width: int, in_height: int | None = None, in_width: int | None = None
) -> NDArray[Any]:
    """Argmax of the bilinearly upsampled logits; of equal channels the lowest wins.

    Args:
        logits: (C + 1, ceil(in_height / 4), ceil(in_width / 4)) float.
        height, width, in_height, in_width: as in `weakseg.cam.upsample`.
    Returns:
        (height, width) in `mask_dtype(C)`.
    Raises:
        DataError: another shape, or logits that are not finite.
    """
    logits = _logits(logits)
    in_height, in_width = in_height or height, in_width or width
    check_cells(logits, in_height, in_width)
    if (height, width) != (in_height, in_width):
        return upsampled_argmax(logits, height, width, in_height, in_width)
    labels = np.empty((height, width), dtype=mask_dtype(len(logits) - 1))
    whole = partial(upsample_one, height=height, width=width, in_height=in_height, in_width=in_width)
    argmax_into(labels, logits, _contenders(logits), whole)
    return labels


def crf_labels(image: NDArray[np.uint8], logits: NDArray[Any], config: CrfConfig) -> NDArray[Any]:
    """Argmax of a dense CRF over the network's probabilities, brought bilinearly to the pixels of the image.

    A class that wins no cell and is nowhere as likely as LEAST_PROBABILITY is left out: classes cost a CRF its time.

    Args:
        image: (H, W, 3) uint8 RGB. logits: (C + 1, ceil(H / 4), ceil(W / 4)) float.
    Returns:
        (H, W) in `mask_dtype(C)`.
    Raises:
        DataError: another shape, or logits that are not finite; ConfigError, WeaksegError as `weakseg.crf.refine`.
    Source: DeepLab-v2, Chen et al., TPAMI 2018, section 3.3.
    """
    likely = probabilities_from_logits(logits)
    channels = np.union1d(np.flatnonzero(likely.max(axis=(1, 2)) >= LEAST_PROBABILITY), likely.argmax(axis=0))
    refined = crf.refine(image, upsample(likely[channels], *image.shape[:2]), config)
    labels: NDArray[Any] = channels.astype(mask_dtype(len(logits) - 1))[refined.argmax(axis=0)]
    return labels


def probabilities_from_logits(logits: NDArray[Any]) -> NDArray[np.float32]:
    """Softmax over the channels of each cell, (C + 1, h, w) float32; DataError as `labels_from_logits`."""
    logits = _logits(logits)
    likely: NDArray[np.float32] = np.exp(logits - logits.max(axis=0))
    likely /= likely.sum(axis=0)
    return likely


def confidence(logits: NDArray[Any]) -> float:
    """Mean softmax probability of each cell's winning channel, from logits (C + 1, h, w); in (0, 1]."""
    logits = _logits(logits)
    # exp(l - max) is 1 for the winner, so its probability is one over the sum.
    return float((1 / np.exp(logits - logits.max(axis=0)).sum(axis=0)).mean())


def _contenders(logits: NDArray[np.float32]) -> list[int]:
    """Channels that may win somewhere; most of many classes cannot, and are not worth upsampling.

    An upsampled value mixes cells of one 3 x 3 neighbourhood: it is at most the channel's maximum there, and the
    winner's is at least the largest of all channels' minima there.
    """
    window = np.ones((3, 3), dtype=np.uint8)
    floor = np.full(logits.shape[1:], -np.inf, dtype=np.float32)
    for plane in logits:
        np.maximum(floor, cv2.erode(plane, window), out=floor)
    return [c for c, plane in enumerate(logits) if (cv2.dilate(plane, window) >= floor).any()]


def _logits(logits: NDArray[Any]) -> NDArray[np.float32]:
    if logits.ndim != 3 or len(logits) < 2 or 0 in logits.shape:
        raise DataError(f"logits must be (C + 1, h, w) with background first, got {logits.shape}: drop the batch axis")
    logits = np.ascontiguousarray(logits, dtype=np.float32)
    if not np.isfinite(logits).all():
        raise DataError("logits must be finite, got NaN or infinity: the network or its input is damaged")
    return logits
