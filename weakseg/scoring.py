"""Scores against true masks: IoU from one summed confusion matrix, the threshold sweep, the boundary F-score.

Accumulators take one image at a time (`add(truth, ...)`). Truth pixels that are IGNORE take no part anywhere. What a
classifier's scores are worth, Calibration, is told by tags alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from weakseg.cam import mask_values
from weakseg.classes import BACKGROUND, IGNORE, IGNORE_U16, ClassTable, ignore_value
from weakseg.errors import ConfigError, DataError, UnknownClassError

# In float32, as `cam.labels_from_cam` compares: a score of exactly k / 100 falls on the same side in both.
SWEEP_THRESHOLDS: NDArray[np.float32] = (np.arange(60) / 100).astype(np.float32)
CALIBRATION_BINS = 15


def confusion(truth: NDArray[Any], prediction: NDArray[Any], n_classes: int) -> NDArray[np.int64]:
    """Pixel counts (C + 1, C + 2): row = truth, column = prediction, the last column = prediction IGNORE.

    Args:
        truth, prediction: (H, W) label maps, uint8 or uint16, each with the IGNORE of its own dtype.
    Raises:
        DataError: sizes differ, or another dtype.
        UnknownClassError: a mask value above C that is not IGNORE.
    """
    if truth.shape != prediction.shape:
        raise DataError(
            f"truth and prediction must have one size, got {truth.shape} and {prediction.shape}: "
            "predictions are scored at the image's full size"
        )
    n = n_classes + 2
    rows = _indices(truth, n_classes, "truth")
    pairs = rows * n + _indices(prediction, n_classes, "prediction")
    return np.bincount(pairs.ravel(), minlength=n * n).reshape(n, n)[:-1].astype(np.int64)


class Confusion:
    """A summed confusion matrix; `matrix` is as in `confusion`. Parts may be added up: `a.matrix += b.matrix`."""

    def __init__(self, n_classes: int) -> None:
        self.n_classes = n_classes
        self.n_images = 0
        self.matrix: NDArray[np.int64] = np.zeros((n_classes + 1, n_classes + 2), dtype=np.int64)

    def add(self, truth: NDArray[Any], prediction: NDArray[Any]) -> None:
        self.matrix += confusion(truth, prediction, self.n_classes)
        self.n_images += 1

    def scores(self, scored: Sequence[int] | None = None) -> Scores:
        return scores(self.matrix, scored)


@dataclass(frozen=True)
class Scores:
    """Fractions in [0, 1] per mask value, (C + 1,) float64; NaN for classes that are not scored or never seen.

    With TP, T (truth) and P (predicted) pixels of a class and union = T + P - TP:
    iou = TP / union, fp = (P - TP) / union, fn = (T - TP) / union, so the three sum to 1;
    precision = TP / P, recall = TP / T. A class that is predicted but never true has iou 0 and counts.
    miou: mean of iou over the scored classes that are seen, background included; NaN when there are none.
    coverage: share of the scored truth pixels whose prediction is not IGNORE; the others enter no other figure, so
    a score with coverage below 1 is not comparable with one at 1.
    """

    iou: NDArray[np.float64]
    fp: NDArray[np.float64]
    fn: NDArray[np.float64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    miou: float
    coverage: float
    scored: tuple[int, ...]  # class indices

    def to_dict(self, classes: ClassTable) -> dict[str, Any]:
        """JSON form: per class {name: value or None}, background first, only the scored ones; NaN becomes None."""
        return {
            "miou": none_if_nan(self.miou),
            "coverage": none_if_nan(self.coverage),
            "iou": by_name(self.iou, classes, self.scored),
            "fp": by_name(self.fp, classes, self.scored),
            "fn": by_name(self.fn, classes, self.scored),
            "precision": by_name(self.precision, classes, self.scored),
            "recall": by_name(self.recall, classes, self.scored),
            "scored_classes": [classes.names[c] for c in self.scored],
        }


def scores(matrix: NDArray[np.int64], scored: Sequence[int] | None = None) -> Scores:
    """Scores of a summed confusion (C + 1, C + 2).

    Args:
        scored: class indices of the headline, None = all. Truth of every other class is void; predicting another
            class counts as wrong; the mean runs over background and the scored classes.
    """
    n_classes = len(matrix) - 1
    chosen = tuple(range(n_classes)) if scored is None else tuple(sorted(set(scored)))
    rows = np.concatenate([[BACKGROUND], mask_values(np.array(chosen), n_classes)]).astype(np.intp)
    kept = np.zeros_like(matrix)
    kept[rows] = matrix[rows]
    n_pixels = int(kept.sum())
    decided = kept[:, :-1]
    hit, true, predicted = np.diag(decided), decided.sum(axis=1), decided.sum(axis=0)
    union = true + predicted - hit
    iou = _over(hit, union, rows)
    return Scores(
        iou=iou,
        fp=_over(predicted - hit, union, rows),
        fn=_over(true - hit, union, rows),
        precision=_over(hit, predicted, rows),
        recall=_over(hit, true, rows),
        miou=nan_mean(iou),
        coverage=int(decided.sum()) / n_pixels if n_pixels else float("nan"),
        scored=chosen,
    )


class Sweep:
    """Scores of thresholds 0.00, 0.01 … 0.59 from one pass over the images, equal to 60 separate passes.

    Keeps `histogram[truth, class, n]`: pixels whose strongest class has a score above exactly the first n thresholds.
    They are background from threshold n on. Memory 61 (C + 1) C integers: 0.2 MB for 20 classes, 32 MB for 254.
    """

    def __init__(self, n_classes: int) -> None:
        self.n_classes = n_classes
        self.n_images = 0
        self.histogram: NDArray[np.int64] = np.zeros(
            (n_classes + 1, n_classes, len(SWEEP_THRESHOLDS) + 1), dtype=np.int64
        )

    def add(self, truth: NDArray[Any], cam01: NDArray[np.float32], classes: NDArray[Any]) -> None:
        """Count one image.

        Args:
            truth: (H, W) label map.
            cam01: (K, H, W) float32; K = 0 counts as background at every threshold.
            classes: (K,) class indices.
        """
        if cam01.shape[1:] != truth.shape or len(cam01) != len(classes):
            raise DataError(
                f"cam01 must be ({len(classes)}, {truth.shape[0]}, {truth.shape[1]}) as tags and truth, "
                f"got {cam01.shape}"
            )
        classes = mask_values(classes, self.n_classes).astype(np.intp) - 1
        rows = _indices(truth, self.n_classes, "truth")
        n_bins = self.histogram.shape[2]
        if len(classes):
            bins, winner = _bins(cam01.max(axis=0)), cam01.argmax(axis=0)
        else:
            # Bin 0 is background everywhere, so any class may hold these pixels.
            classes, bins, winner = np.zeros(1, dtype=np.intp), np.zeros_like(rows), np.zeros_like(rows)
        at = (rows * len(classes) + winner) * n_bins + bins
        n_rows = self.n_classes + 2
        counts = np.bincount(at.ravel(), minlength=n_rows * len(classes) * n_bins)
        for k, c in enumerate(classes):  # one at a time: a class named twice must lose nothing
            self.histogram[:, c] += counts.reshape(n_rows, len(classes), n_bins)[:-1, k]
        self.n_images += 1

    def confusion(self, index: int) -> NDArray[np.int64]:
        """(C + 1, C + 2) confusion at SWEEP_THRESHOLDS[index]; nothing is predicted IGNORE."""
        matrix = np.zeros((self.n_classes + 1, self.n_classes + 2), dtype=np.int64)
        matrix[:, 0] = self.histogram[:, :, : index + 1].sum(axis=(1, 2))
        matrix[:, 1:-1] = self.histogram[:, :, index + 1 :].sum(axis=2)
        return matrix

    def miou(self, scored: Sequence[int] | None = None) -> NDArray[np.float64]:
        """(60,) mIoU of each threshold; `scored` as in `scores`."""
        return np.array([scores(self.confusion(i), scored).miou for i in range(len(SWEEP_THRESHOLDS))])

    def best(self, scored: Sequence[int] | None = None) -> tuple[float, float]:
        """(t, mIoU) of the best threshold above 0, the lowest of equals.

        0 is left out because it has no alpha; DataError when nothing was scored.
        """
        miou = self.miou(scored)[1:]
        if np.isnan(miou).all():
            raise DataError("no threshold can be chosen: no scored pixel was counted; check the masks and their ids")
        index = int(np.nanargmax(miou))
        return (index + 1) / 100, float(miou[index])

    def curve(self, scored: Sequence[int] | None = None) -> dict[str, list[Any]]:
        """JSON form {"t": [...], "miou": [...]}, None where nothing was scored."""
        return {
            "t": [k / 100 for k in range(len(SWEEP_THRESHOLDS))],
            "miou": [none_if_nan(float(m)) for m in self.miou(scored)],
        }


class Boundary:
    """Boundary F-score: do predicted outlines run within `tolerance_px` of the true ones?

    A class's outline is its pixels that touch another label (4-neighbours; the edge of the image is none). Counts
    are summed over the images; F = 2 P R / (P + R) per class, with P the share of predicted outline pixels near a true
    one, R the share of true ones near a predicted one. Classes without any outline are NaN.

    Void: a band up to 2 `tolerance_px` wide (VOC's borders) is filled with the nearest true label, so the outline runs
    in its middle. Around a wider one nothing within `tolerance_px` is counted. IGNORE in the prediction is a label of
    its own: its edge is an outline of the classes beside it.

    Source: Csurka et al., BMVC 2013; distance matching as in DAVIS, Perazzi et al., CVPR 2016.
    """

    def __init__(self, n_classes: int, tolerance_px: float, scored: Sequence[int] | None = None) -> None:
        if tolerance_px < 0:
            raise ConfigError(f"tolerance_px must not be negative, got {tolerance_px}: 3 is usual for images of 320 px")
        self.n_classes = n_classes
        self.tolerance_px = tolerance_px
        classes = range(n_classes) if scored is None else sorted(set(scored))
        self.rows = (BACKGROUND, *(int(v) for v in mask_values(np.array(classes), n_classes)))
        # per mask value: predicted outline pixels, those matched, true outline pixels, those matched
        self.counts: NDArray[np.int64] = np.zeros((n_classes + 1, 4), dtype=np.int64)

    def add(self, truth: NDArray[Any], prediction: NDArray[Any]) -> None:
        if truth.shape != prediction.shape:
            raise DataError(f"truth and prediction must have one size, got {truth.shape} and {prediction.shape}")
        rows = _indices(truth, self.n_classes, "truth")
        columns = _indices(prediction, self.n_classes, "prediction")
        void = ~np.isin(rows, self.rows)
        if void.all():
            return
        rows, counted = _fill_void(rows, void, self.tolerance_px)
        seen = np.bincount(rows.ravel(), minlength=self.n_classes + 2) + np.bincount(
            columns.ravel(), minlength=len(self.counts) + 1
        )
        for value in (v for v in self.rows if seen[v]):
            true = _outline(rows == value)
            predicted = _outline(columns == value)
            near_true = _within(true, self.tolerance_px)
            near_predicted = _within(predicted, self.tolerance_px)
            true, predicted = true & counted, predicted & counted
            self.counts[value] += (
                np.count_nonzero(predicted),
                np.count_nonzero(predicted & near_true),
                np.count_nonzero(true),
                np.count_nonzero(true & near_predicted),
            )

    def per_class(self) -> NDArray[np.float64]:
        """(C + 1,) F per mask value, NaN where not scored or no outline was met."""
        every = np.arange(self.n_classes + 1)
        predicted, predicted_hit, true, true_hit = self.counts.T
        precision = np.nan_to_num(_over(predicted_hit, predicted, every))
        recall = np.nan_to_num(_over(true_hit, true, every))
        f = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
        return np.asarray(np.where(predicted + true > 0, f, np.nan))

    def mean(self) -> float:
        """Mean over background and the scored classes, as mIoU; NaN when no outline was met."""
        return nan_mean(self.per_class()[list(self.rows)])


class Calibration:
    """Is a class there as often as its score says? Counted over all pairs of an image and a class.

    Pairs lie in 15 bins of equal width over [0, 1], a score of 1 in the last. `counts` of parts may be added up.

    ece = sum_b n_b / N |mean score of b - share of b that is present|,   brier = mean of (score - present)^2

    Both are NaN where no image has a tag: nothing says what these images show.
    Source: Guo et al., ICML 2017, equation 3, here of yes or no for every class; Brier, 1950.
    """

    def __init__(self) -> None:
        # per bin: pairs, the sum of their scores, those present, the sum of squared differences
        self.counts: NDArray[np.float64] = np.zeros((CALIBRATION_BINS, 4))

    def add(self, scores: NDArray[np.float32], tags: Sequence[int]) -> None:
        """Count one image.

        Args:
            scores: (C,) in [0, 1]. tags: class indices of what the image shows.
        """
        if not ((scores >= 0) & (scores <= 1)).all():
            raise DataError(f"scores must lie in [0, 1], got {scores.min():g} to {scores.max():g}: apply the sigmoid")
        present = np.zeros(len(scores))
        present[mask_values(np.array(tags, dtype=np.intp), len(scores)).astype(np.intp) - 1] = 1
        exact = scores.astype(np.float64)
        bins = np.minimum((exact * CALIBRATION_BINS).astype(np.intp), CALIBRATION_BINS - 1)
        for column, values in enumerate((np.ones(len(exact)), exact, present, (exact - present) ** 2)):
            self.counts[:, column] += np.bincount(bins, values, CALIBRATION_BINS)

    def ece(self) -> float:
        pairs, scored, present, _ = self.counts.T
        return float(np.abs(scored - present).sum() / pairs.sum()) if present.any() else float("nan")

    def brier(self) -> float:
        pairs, _, present, squared = self.counts.T
        return float(squared.sum() / pairs.sum()) if present.any() else float("nan")


def by_name(values: NDArray[np.float64], classes: ClassTable, scored: Sequence[int]) -> dict[str, float | None]:
    """{name: value or None} of background and the scored classes, from (C + 1,) by mask value."""
    named = {"background": none_if_nan(float(values[BACKGROUND]))}
    return named | {classes.names[c]: none_if_nan(float(values[c + 1])) for c in scored}


def none_if_nan(value: float) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(value) else value


def nan_mean(values: NDArray[np.float64]) -> float:
    """Mean of the numbers among the values, NaN without a warning when there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _indices(labels: NDArray[Any], n_classes: int, name: str) -> NDArray[np.intp]:
    """Mask values as 0..C, IGNORE as C + 1."""
    if labels.dtype not in (np.uint8, np.uint16) or labels.ndim != 2:
        raise DataError(f"{name} must be (H, W) uint8 or uint16, got {labels.shape} {labels.dtype}")
    # A table look-up is several times faster than masking and converting.
    table = np.full(np.iinfo(labels.dtype).max + 1, -1, dtype=np.intp)
    table[: min(n_classes + 1, len(table))] = np.arange(min(n_classes + 1, len(table)))
    table[ignore_value(labels)] = n_classes + 1
    indices: NDArray[np.intp] = table[labels]
    if indices.size and indices.min() < 0:
        bad = labels[indices < 0].flat[0]
        ignored = IGNORE if labels.dtype == np.uint8 else IGNORE_U16
        raise UnknownClassError(
            f"{name} must hold mask values 0..{n_classes} or {ignored} (ignore), got {bad}: check the class list"
        )
    return indices


def _bins(score: NDArray[np.float32]) -> NDArray[np.intp]:
    """How many SWEEP_THRESHOLDS lie strictly below each score: searchsorted, in a fraction of the time.

    Threshold k is within half a float of k / 100, so a score above it is at least half a float above k / 100 and the
    rounded 100 * score is >= k: the guess is never too low by more than the one comparison that follows, nor too high.
    """
    if np.isnan(score).any():
        raise DataError("cam01 must be finite, got NaN: the network or its input is damaged")
    guess = np.clip(score * np.float32(100), 0, len(SWEEP_THRESHOLDS) - 1).astype(np.intp)
    return np.asarray(guess + (score > SWEEP_THRESHOLDS[guess]))


def _over(part: NDArray[np.int64], whole: NDArray[np.int64], rows: NDArray[np.intp]) -> NDArray[np.float64]:
    """part / whole at the given rows, NaN elsewhere and where whole is 0."""
    out = np.full(len(whole), np.nan)
    rows = rows[whole[rows] > 0]
    out[rows] = part[rows] / whole[rows]
    return out


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of a mask with a 4-neighbour outside it; what lies beyond the image counts as inside."""
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    inner = cv2.erode(mask.astype(np.uint8), cross, borderType=cv2.BORDER_CONSTANT, borderValue=1)
    return np.asarray(mask & (inner == 0))


def _within(mask: NDArray[np.bool_], distance_px: float) -> NDArray[np.bool_]:
    """Pixels at most that far (Euclid, centre to centre) from a pixel of the mask."""
    if not mask.any():
        return mask
    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.asarray(np.asarray(distance) <= distance_px + 1e-4)


def _fill_void(
    rows: NDArray[np.intp], void: NDArray[np.bool_], tolerance_px: float
) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """The labels with void replaced by the nearest label, and the pixels that may be counted."""
    if not void.any():
        return rows, ~void
    # The only mask that also labels; its distances are within 2 % of exact.
    distance, nearest = cv2.distanceTransformWithLabels(
        void.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    label_of = np.zeros(int(nearest.max()) + 1, dtype=np.intp)
    label_of[nearest[~void]] = rows[~void]
    core = np.asarray(distance) > tolerance_px + 1e-4
    # From the core to the rim it is tolerance_px, and the margin beyond the rim is another.
    return label_of[nearest], ~_within(core, 2 * tolerance_px + 1)
