"""How the background threshold t is chosen. One function per rule; a result always says which rule made it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weakseg.errors import ConfigError, DataError
from weakseg.recipe import ThresholdConfig
from weakseg.scoring import Sweep

N_BINS = 256


@dataclass(frozen=True)
class Threshold:
    """t: in (0, 1). rule: name of the rule. provenance: in words, what the rule looked at."""

    t: float
    rule: str
    provenance: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Threshold:
        """Raises DataError when a field is missing, unknown or of another type."""
        try:
            threshold = cls(**fields)
        except TypeError as error:
            raise DataError(f"a threshold must have t, rule and provenance, got {sorted(fields)}: {error}") from error
        if not isinstance(threshold.rule, str) or not isinstance(threshold.provenance, str):
            raise DataError(f"a threshold's rule and provenance must be texts, got {fields}: choose it again")
        if isinstance(threshold.t, bool) or not isinstance(threshold.t, (int, float)) or not 0 < threshold.t < 1:
            raise DataError(f"a threshold's t must be a number in (0, 1), got {threshold.t!r}: choose it again")
        return threshold


def choose(
    config: ThresholdConfig,
    maxima: Callable[[], Iterable[NDArray[np.float32]]] | None = None,
    sweep: Callable[[], Sweep] | None = None,
    scored: Sequence[int] | None = None,
) -> Threshold:
    """The threshold of the rule that the config names.

    What a rule needs is passed as a function, so that it is read only by the rule that uses it: true masks stay sealed
    unless the rule is `validation_split`.

    Args:
        maxima: for `otsu`: max over present classes of cam01, an array per image that has tags.
        sweep: for `validation_split`: the sweep over the images that may be tuned on.
        scored: class indices that `validation_split` maximises the mIoU of; None = all.
    Raises:
        ConfigError: the rule is unknown, or what it needs was not passed.
        DataError: what it got holds nothing to choose from.
    """
    if config.rule == "fixed":
        return fixed(config.value)
    if config.rule == "otsu":
        if maxima is None:
            raise ConfigError("the threshold rule otsu needs CAMs: run the stage cam first, or use rule fixed")
        return otsu(histogram(maxima()))
    if config.rule == "validation_split":
        if sweep is None:
            raise ConfigError(
                "the threshold rule validation_split needs true masks of a tune split: set data.tune, "
                "or use a label-free rule (fixed, otsu)"
            )
        return validation_split(sweep(), scored)
    raise ConfigError(f"unknown threshold rule {config.rule!r}: expected fixed, otsu or validation_split")


def fixed(value: float) -> Threshold:
    """A value that was chosen beforehand."""
    if not 0 < value < 1:
        raise ConfigError(f"the fixed threshold must lie in (0, 1), got {value}: 0.2 to 0.4 are usual")
    return Threshold(value, "fixed", "set in the recipe")


def otsu(counts: NDArray[np.int64]) -> Threshold:
    """The edge between bins that splits a histogram over [0, 1] with the largest variance between its two sides.

    Of equal edges (bins between the sides are empty) the middle. Label-free: it sees scores only.

    Args:
        counts: (n,) counts of n equal bins.
    Raises:
        DataError: fewer than two bins are filled.
    Source: Otsu, IEEE Trans. SMC 1979.
    """
    if np.count_nonzero(counts) < 2:
        raise DataError(
            f"otsu needs scores that differ, got {int(counts.sum())} in at most one bin: use the rule fixed"
        )
    # Whole numbers up to the division: near the ends a rounded share of 1 would divide noise by nothing.
    n, total = int(counts.sum()), int(counts @ np.arange(len(counts)))
    below, sum_below = np.cumsum(counts)[:-1], np.cumsum(counts * np.arange(len(counts)))[:-1]
    above = n - below
    gap = sum_below / np.maximum(below, 1) - (total - sum_below) / np.maximum(above, 1)
    variance = (below / n) * (above / n) * gap**2
    best = np.flatnonzero(variance >= variance.max() * (1 - 1e-9))
    t = float(best.mean() + 1) / len(counts)
    return Threshold(t, "otsu", f"Otsu's method on the strongest CAM of {n} pixels, no mask seen")


def validation_split(sweep: Sweep, scored: Sequence[int] | None = None) -> Threshold:
    """The threshold of best mIoU on images whose masks may be used for tuning."""
    t, miou = sweep.best(scored)
    return Threshold(
        t, "validation_split", f"best of 0.01 to 0.59 on {sweep.n_images} images with masks, mIoU {miou:.4f}"
    )


def histogram(maxima: Iterable[NDArray[np.float32]], n_bins: int = N_BINS) -> NDArray[np.int64]:
    """(n_bins,) counts over [0, 1], pooled over arrays of any shape; values beyond fall into the outer bins."""
    counts = np.zeros(n_bins, dtype=np.int64)
    for values in maxima:
        if np.isnan(values).any():
            raise DataError("scores must be finite, got NaN: the network or its input is damaged")
        bins = np.clip(values * np.float32(n_bins), 0, n_bins - 1).astype(np.intp)
        counts += np.bincount(bins.ravel(), minlength=n_bins)
    return counts
