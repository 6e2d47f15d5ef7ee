"""How sure a mask is of itself: pixels per class, mean confidence, mean entropy.

A pixel has the probabilities of the cell that its centre lies in: one of the segmentation network's output, at a
quarter of its input, or one pixel of the maps that a pseudo-mask is made of. Its confidence is the probability of the
class that the mask shows there. Its entropy is -sum p log p / log n over the n classes that compete, background among
them: 0 is sure of one, 1 takes all for alike.

None of this says how right a mask is: networks are surer than they should be (Guo et al., ICML 2017), and pseudo-masks
have shares of scores for probabilities (`weakseg.pseudo_mask.PseudoMask`). Figures of one model, output and refinement
can be compared with each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weakseg.classes import BACKGROUND, ignore_value
from weakseg.errors import DataError

_BLOCK_PX = 2**20  # pixels that are looked up at a time: a large image must not take 8 bytes for each of its pixels


@dataclass(frozen=True)
class ClassQuality:
    """One class of a mask, or "background", value 0.

    value: of its pixels in the mask. area_px: how many these are, at least 1. confidence: their mean, in [0, 1]; None
        where `MaskQuality.entropy` is.
    """

    value: int
    name: str
    area_px: int
    confidence: float | None = None


@dataclass(frozen=True)
class MaskQuality:
    """Figures of one mask; areas add up to its pixels.

    classes: those in the mask, by value.
    undecided_px: pixels of a pseudo-mask without a class, IGNORE.
    confidence: mean over the pixels with a class, in [0, 1]; None where there is none.
    entropy: mean over all pixels, in [0, 1].
        Both are None of pseudo-masks of images without a present class: nothing competes with the background.
    """

    classes: tuple[ClassQuality, ...]
    undecided_px: int = 0
    confidence: float | None = None
    entropy: float | None = None


def mask_quality(
    labels: NDArray[Any],
    names: Sequence[str],
    likely: NDArray[np.float32] | None,
    values: NDArray[Any] | None = None,
    in_size: tuple[int, int] | None = None,
    stride: int = 1,
) -> MaskQuality:
    """Figures of a label map, made from probabilities that may be coarser.

    Args:
        labels: (H, W) mask values.
        names: of the classes, background left out.
        likely: (n, ceil(in_height / stride), ceil(in_width / stride)), sums to 1; None = areas alone.
        values: (n,) mask values of its channels, every one of `labels` among them, IGNORE aside; None = 0 ... n - 1.
        in_size: (in_height, in_width) of what the network saw; None = (H, W).
    Raises:
        DataError: `likely` has another shape.
    """
    height, width = labels.shape
    in_height, in_width = in_size or (height, width)
    cells = (-(-in_height // stride), -(-in_width // stride))
    if likely is not None and likely.shape[1:] != cells:
        raise DataError(
            f"likely must be (n, {cells[0]}, {cells[1]}) for an input of {in_height} x {in_width}, got {likely.shape}: "
            "give the size that the network saw and its stride"
        )
    rows, columns = _cell_of(height, in_height, stride), _cell_of(width, in_width, stride)
    ignore = ignore_value(labels)
    area = np.zeros(ignore + 1, dtype=np.int64)  # by mask value
    sure = np.zeros(ignore + 1)
    channel = np.zeros(ignore + 1, dtype=np.intp)  # that of IGNORE is looked up and not counted
    if likely is not None:
        known = np.arange(len(likely)) if values is None else values
        channel[known] = np.arange(len(likely))
    for part in np.array_split(np.arange(height), -(-labels.size // _BLOCK_PX)):
        shown = labels[part]
        area += np.bincount(shown.ravel(), minlength=ignore + 1)
        if likely is not None:
            confidence = likely[channel[shown], rows[part, None], columns]
            sure += np.bincount(shown.ravel(), confidence.ravel(), minlength=ignore + 1)
    decided = np.flatnonzero(area[:ignore])
    classes = tuple(
        ClassQuality(
            value,
            "background" if value == BACKGROUND else names[value - 1],
            int(area[value]),
            None if likely is None else float(sure[value] / area[value]),
        )
        for value in map(int, decided)
    )
    undecided_px = int(area[ignore])
    if likely is None:
        return MaskQuality(classes, undecided_px)
    mean = float(sure[decided].sum() / area[decided].sum()) if len(decided) else None
    return MaskQuality(classes, undecided_px, mean, _mean_entropy(likely, rows, columns))


def entropy(likely: NDArray[np.float32]) -> NDArray[np.float32]:
    """-sum_c p_c log p_c / log n of each cell, in [0, 1], with 0 log 0 = 0; from (n, h, w) that sums to 1, n >= 2."""
    plane = np.zeros(likely.shape[1:], dtype=np.float32)
    for p in likely:
        plane -= p * np.log(p, out=np.zeros_like(p), where=p > 0)
    return np.asarray((plane / np.float32(np.log(len(likely)))).clip(0, 1))


def _mean_entropy(likely: NDArray[np.float32], rows: NDArray[np.intp], columns: NDArray[np.intp]) -> float:
    """Over pixels: each cell counts as often as one lies in it."""
    n_rows, n_columns = (np.bincount(at, minlength=n) for at, n in zip((rows, columns), likely.shape[1:], strict=True))
    return float(n_rows @ entropy(likely).astype(np.float64) @ n_columns / (len(rows) * len(columns)))


def _cell_of(size: int, in_size: int, stride: int) -> NDArray[np.intp]:
    """The cell, of `stride` pixels of the network's input, that the centre of each pixel of an image lies in."""
    return (2 * np.arange(size) + 1) * in_size // (2 * size * stride)
