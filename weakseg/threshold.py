"""How the background threshold t is chosen. One function per rule; a result always says which rule made it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from weakseg.errors import ConfigError, DataError
from weakseg.recipe import ThresholdConfig, WalkConfig
from weakseg.scoring import Sweep

N_BINS = 256
MAX_IMAGES = 200  # enough for the rules that look at maps alone

T = TypeVar("T")


@dataclass(frozen=True)
class Histogram:
    """counts: (n,) int64 of n equal bins over [0, 1]. n_images: that were pooled."""

    counts: NDArray[np.int64]
    n_images: int


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
        maxima: for `otsu` and `area`: max over present classes of cam01, an array per image that has tags.
        sweep: for `validation_split`: the sweep over the images that may be tuned on.
        scored: class indices that `validation_split` maximises the mIoU of; None = all.
    Raises:
        ConfigError: the rule is unknown, or what it needs was not passed.
        DataError: what it got holds nothing to choose from.
    """
    if config.rule == "fixed":
        return fixed(config.value)
    if config.rule in ("otsu", "area"):
        if maxima is None:
            raise ConfigError(
                f"the threshold rule {config.rule} needs CAMs: run the stage cam first, or use rule fixed"
            )
        pooled = histogram(maxima())
        return otsu(pooled) if config.rule == "otsu" else area(pooled, config.area)
    if config.rule == "validation_split":
        if sweep is None:
            raise ConfigError(
                "the threshold rule validation_split needs true masks of a tune split: set data.tune, "
                "or use a label-free rule (fixed, otsu, area)"
            )
        return validation_split(sweep(), scored)
    raise ConfigError(f"unknown threshold rule {config.rule!r}: expected fixed, otsu, area or validation_split")


def after_walk(chosen: Threshold, walk: WalkConfig | None) -> Threshold:
    """What decides about the background of label maps: the chosen t, or the constant of a walk that has one."""
    if walk is None or walk.background is None:
        return chosen
    return Threshold(walk.background, "fixed", "the background that the classes meet after the random walk")


def fixed(value: float) -> Threshold:
    """A value that was chosen beforehand."""
    if not 0 < value < 1:
        raise ConfigError(f"the fixed threshold must lie in (0, 1), got {value}: 0.2 to 0.4 are usual")
    return Threshold(value, "fixed", "set in the recipe")


def otsu(pooled: Histogram) -> Threshold:
    """The edge between bins that splits a histogram over [0, 1] with the largest variance between its two sides.

    Of equal edges (bins between the sides are empty) the middle. It follows how sharp the maps are, not where they are
    right: on squared or square-rooted maps, whose ranking is the same, it splits elsewhere.

    Raises:
        DataError: fewer than two bins are filled.
    Source: Otsu, IEEE Trans. SMC 1979.
    """
    counts = _differing(pooled, "otsu")
    # Whole numbers up to the division: near the ends a rounded share of 1 would divide noise by nothing.
    n, total = int(counts.sum()), int(counts @ np.arange(len(counts)))
    below, sum_below = np.cumsum(counts)[:-1], np.cumsum(counts * np.arange(len(counts)))[:-1]
    above = n - below
    gap = sum_below / np.maximum(below, 1) - (total - sum_below) / np.maximum(above, 1)
    variance = (below / n) * (above / n) * gap**2
    best = np.flatnonzero(variance >= variance.max() * (1 - 1e-9))
    t = float(best.mean() + 1) / len(counts)
    return Threshold(t, "otsu", f"Otsu's method on the strongest CAM of {_seen(pooled)}")


def area(pooled: Histogram, share: float) -> Threshold:
    """The threshold that leaves `share` of the pixels above it, linear within a bin: a prior on the size of objects.

    Only the ranking of scores matters: any increasing function of the maps gives the same label maps without a CRF. The
    share is knowledge about the photographs, not about the network: where objects are far smaller or larger, set it.

    Raises:
        ConfigError: share is not in (0, 1).
        DataError: fewer than two bins are filled.
    """
    if not 0 < share < 1:
        raise ConfigError(f"the area of objects must lie in (0, 1), got {share}: 0.3 suits photographs of objects")
    counts = _differing(pooled, "area")
    above = 1 - np.concatenate([[0], np.cumsum(counts)]) / counts.sum()  # (n + 1,) share above each edge, from 1 to 0
    edge = int(np.argmax(above <= share))
    within = (above[edge - 1] - share) / (above[edge - 1] - above[edge])
    t = float(edge - 1 + within) / len(counts)
    return Threshold(t, "area", f"the strongest CAM is above t on {share:.0%} of the pixels of {_seen(pooled)}")


def validation_split(sweep: Sweep, scored: Sequence[int] | None = None) -> Threshold:
    """The threshold of best mIoU on images whose masks may be used for tuning."""
    t, miou = sweep.best(scored)
    return Threshold(
        t, "validation_split", f"best of 0.01 to 0.59 on {sweep.n_images} images with masks, mIoU {miou:.4f}"
    )


def histogram(maxima: Iterable[NDArray[np.float32]], n_bins: int = N_BINS) -> Histogram:
    """Counts over [0, 1], pooled over arrays of any shape, one an image; values beyond fall into the outer bins."""
    counts, n_images = np.zeros(n_bins, dtype=np.int64), 0
    for values in maxima:
        if np.isnan(values).any():
            raise DataError("scores must be finite, got NaN: the network or its input is damaged")
        bins = np.clip(values * np.float32(n_bins), 0, n_bins - 1).astype(np.intp)
        counts += np.bincount(bins.ravel(), minlength=n_bins)
        n_images += 1
    return Histogram(counts, n_images)


def drawn(items: Sequence[T]) -> list[T]:
    """At most MAX_IMAGES of the items, in their order, drawn with seed 0."""
    if len(items) <= MAX_IMAGES:
        return list(items)
    return [items[i] for i in np.sort(np.random.default_rng(0).choice(len(items), MAX_IMAGES, replace=False))]


def _differing(pooled: Histogram, rule: str) -> NDArray[np.int64]:
    if np.count_nonzero(pooled.counts) < 2:
        raise DataError(
            f"{rule} needs scores that differ, got {int(pooled.counts.sum())} in at most one bin: use the rule fixed"
        )
    return pooled.counts


def _seen(pooled: Histogram) -> str:
    return f"{pooled.n_images} training images (at most {MAX_IMAGES}, drawn with seed 0), no mask seen"
