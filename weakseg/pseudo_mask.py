"""CAMs to label maps that a segmentation network can learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weakseg import crf, random_walk
from weakseg.cam import alpha_from_threshold, background_from_alpha, labels_from_cam, mask_values
from weakseg.classes import BACKGROUND, IGNORE, IGNORE_U16, mask_dtype
from weakseg.errors import ConfigError, DataError
from weakseg.recipe import CrfConfig, PseudoLabelConfig, WalkConfig
from weakseg.stopping import Check, go_on

MAX_THRESHOLD = 0.99  # an upper edge of the band beyond this would have no background left to compare


@dataclass(frozen=True, eq=False)
class Walk:
    """A random walk over one image; affinities: (S or S + 1, ceil(H / stride), ceil(W / stride)), see random_walk."""

    affinities: NDArray[Any]
    stride: int
    config: WalkConfig


@dataclass(frozen=True)
class PseudoMask:
    """labels: (H, W) label map with IGNORE; band: the two thresholds whose label maps were compared.

    shares: (1 + K, H, W), background and classes as they competed for each pixel, summing to 1; averaged over the two
        thresholds. After a CRF its marginals. Without one the scores over their sum: of the background
        (1 - max)^alpha(t), which the maximum exceeds where it exceeds t, and the maps; or what a walk makes of these.
        None where they were not asked for, and without classes: nothing competes then.
    """

    labels: NDArray[Any]
    band: tuple[float, float]
    shares: NDArray[np.float32] | None = None


def pseudo_mask(
    image: NDArray[np.uint8],
    cam01: NDArray[np.float32],
    classes: NDArray[Any],
    n_classes: int,
    t: float,
    config: PseudoLabelConfig,
    walk: Walk | None = None,
    *,
    with_shares: bool = False,
    check: Check = go_on,
) -> PseudoMask:
    """Label map that is IGNORE where it depends on the threshold.

    Two label maps, of thresholds t (1 - band) and t (1 + band); IGNORE where they disagree. Without CRF and walk these
    are constant thresholds, with one each is the alpha of equal effect (`refined_labels`).

    Args:
        image: (H, W, 3) uint8 RGB.
        cam01: (K, H, W) in [0, 1], maps of the image's tags.
        classes: (K,) class indices; K = 0 gives a map that is all background.
        t: threshold in (0, 1), `weakseg.threshold.after_walk` of the one that was chosen.
        walk: a random walk instead of `config.crf`; it may have a CRF of its own.
        check: of walk and CRF, called between their steps; what it raises ends the work.
    Source: the two alphas of AffinityNet, Ahn & Kwak 2018, section 3.2.
    """
    band = band_around(t, config.band, config.band_above) if walk is None else band_around(t, walk.config.band)
    thresholds = sorted({*band})
    if not with_shares or not len(cam01):
        maps = refined_labels(image, cam01, classes, n_classes, thresholds, config.crf, walk, check)
        return PseudoMask(agreed(maps), band)
    _check_size(cam01, image)
    likely = refined_probabilities(image, cam01, thresholds, config.crf, walk, check)
    if config.crf is None and walk is None:
        maps = [labels_from_cam(cam01, classes, t, n_classes) for t in thresholds]
    else:
        maps = _likeliest(likely, classes, n_classes)
    return PseudoMask(agreed(maps), band, _shares(likely))


def band_around(t: float, share: float, above: float | None = None) -> tuple[float, float]:
    """The two thresholds that a label must be the same for: t (1 - share) and t (1 + above), above None = share."""
    if not 0 <= share < 1 or (above is not None and above < 0):
        raise ConfigError(
            f"band must lie in [0, 1), band_above not be negative, got {share} and {above}: 0.3 is usual, 0 = no band"
        )
    return t * (1 - share), min(t * (1 + (share if above is None else above)), max(t, MAX_THRESHOLD))


def agreed(maps: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """(H, W) the first of the label maps, IGNORE where another differs."""
    labels = maps[0].copy()
    for other in maps[1:]:
        labels[labels != other] = IGNORE if labels.dtype == np.uint8 else IGNORE_U16
    return labels


def refinement_settings(config: PseudoLabelConfig, walk: WalkConfig | None = None) -> dict[str, Any]:
    """What beside the threshold made a pseudo-mask, as its file says it: band, crf (None = none), maybe random_walk."""
    crf = config.crf if walk is None else walk.crf
    if walk is None:
        band = {"band": config.band} if config.band_above is None else {"band": [config.band, config.band_above]}
        return {**band, "crf": None if crf is None else asdict(crf)}
    settings = {name: value for name, value in asdict(walk).items() if name not in ("band", "crf")}
    return {"band": walk.band, "crf": None if crf is None else asdict(crf), "random_walk": settings}


def refined_labels(
    image: NDArray[np.uint8],
    cam01: NDArray[np.float32],
    classes: NDArray[Any],
    n_classes: int,
    thresholds: Sequence[float],
    config: CrfConfig | None,
    walk: Walk | None = None,
    check: Check = go_on,
) -> list[NDArray[Any]]:
    """For each threshold t the label map (H, W) of the CRF over background (1 - max)^alpha(t) and the present classes.

    No IGNORE. `config` None: no CRF, constant thresholds. Several thresholds share the CRF's work on the image.
    With `walk`, a random walk instead, and its own CRF after it if it has one. Where it has a background, the
    thresholds are constants that the walked classes meet (`_walked`). Arguments as in `pseudo_mask`.
    """
    _check_size(cam01, image)
    if (config is None and walk is None) or not len(cam01):
        return [labels_from_cam(cam01, classes, t, n_classes) for t in thresholds]
    return _likeliest(refined_probabilities(image, cam01, thresholds, config, walk, check), classes, n_classes)


def soft_labels(
    image: NDArray[np.uint8],
    cam01: NDArray[np.float32],
    classes: NDArray[Any],
    n_classes: int,
    t: float,
    config: CrfConfig | None,
    walk: Walk | None = None,
) -> NDArray[Any]:
    """The two likeliest mask values of each pixel after refinement, and how likely the first is beside the second.

    Arguments as in `refined_labels`; without CRF and walk the probabilities are (1 - max)^alpha(t) and the maps.

    Returns:
        (H, W, 3) in `mask_dtype(n_classes)`: first value, second value, round(255 p1 / (p1 + p2)) from 128 to 255.
        Without a present class all is background, (0, 0, 255).
    """
    _check_size(cam01, image)
    dtype = mask_dtype(n_classes)
    if not len(cam01):
        return np.broadcast_to(np.array([BACKGROUND, BACKGROUND, 255], dtype), (*image.shape[:2], 3)).copy()
    values = competing_values(classes, n_classes)
    likely = refined_probabilities(image, cam01, [t], config, walk)[0]
    order = np.argpartition(likely, len(likely) - 2, axis=0)[-2:]  # the second, then the first
    second, first = np.take_along_axis(likely, order, axis=0)
    share = np.rint(255 * first / np.maximum(first + second, 1e-5)).clip(128)
    return np.stack([values[order[1]], values[order[0]], share.astype(dtype)], axis=-1)


def refined_probabilities(
    image: NDArray[np.uint8],
    cam01: NDArray[np.float32],
    thresholds: Sequence[float],
    config: CrfConfig | None,
    walk: Walk | None,
    check: Check = go_on,
) -> NDArray[np.float32]:
    """(S, 1 + K, H, W) float32: for each threshold background and classes, after walk or CRF; as `refined_labels`."""
    if walk is None:
        probabilities = _joined(_backgrounds(cam01, thresholds), cam01)
    else:
        config, probabilities = walk.config.crf, _walked(cam01, thresholds, walk, check)
    return probabilities if config is None else crf.refine(image, probabilities, config, check)


def competing_values(classes: NDArray[Any], n_classes: int) -> NDArray[Any]:
    """(1 + K,) mask values of background and classes, in the order of shares and probabilities."""
    return np.concatenate([[BACKGROUND], mask_values(classes, n_classes)]).astype(mask_dtype(n_classes))


def _likeliest(likely: NDArray[np.float32], classes: NDArray[Any], n_classes: int) -> list[NDArray[Any]]:
    values = competing_values(classes, n_classes)
    return [values[one.argmax(axis=0)] for one in likely]


def _shares(likely: NDArray[np.float32]) -> NDArray[np.float32]:
    """(1 + K, H, W) mean over the first axis, each summing to 1; where nothing scores all are alike."""
    total = likely.sum(axis=1, keepdims=True)
    alike = np.full_like(likely, 1 / likely.shape[1])
    return np.asarray(np.divide(likely, total, out=alike, where=total > 0).mean(axis=0))


def _check_size(cam01: NDArray[np.float32], image: NDArray[np.uint8]) -> None:
    if cam01.shape[1:] != image.shape[:2]:
        raise DataError(f"cam01 must be (K, {image.shape[0]}, {image.shape[1]}) as the image, got {cam01.shape}")


def _walked(cam01: NDArray[np.float32], thresholds: Sequence[float], walk: Walk, check: Check) -> NDArray[np.float32]:
    """(S, 1 + K, H, W) that sum to 1: for each threshold background and classes after the walk.

    Without `walk.config.background` a background (1 - max)^alpha(t) walks with the classes. With it the classes walk
    alone, once for all thresholds, are divided by the largest value of the image, and each t is a constant background.
    Source: Ahn & Kwak 2018, section 3.3; with it IRN, Ahn, Cho & Kwak 2019, jiwoon-ahn/irn step/make_sem_seg_labels.py.
    """
    settings = walk.config

    def walked(scores: NDArray[np.float32]) -> NDArray[np.float32]:
        return random_walk.refine(
            scores,
            walk.affinities,
            stride=walk.stride,
            radius=settings.radius,
            beta=settings.beta,
            steps=settings.steps,
            check=check,
        )

    if settings.background is None:
        scores = walked(_joined(_backgrounds(cam01, thresholds), cam01))
    else:
        classes = walked(cam01)
        scores = _joined(thresholds, classes / max(float(classes.max()), 1e-5))
    scores /= np.maximum(scores.sum(axis=1, keepdims=True), 1e-5)
    return scores


def _backgrounds(cam01: NDArray[np.float32], thresholds: Sequence[float]) -> list[NDArray[np.float32]]:
    """For each threshold t (H, W) (1 - max)^alpha(t)."""
    return [background_from_alpha(cam01, alpha_from_threshold(t)) for t in thresholds]


def _joined(backgrounds: Sequence[NDArray[np.float32] | float], maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """(S, 1 + K, H, W): each of the backgrounds, (H, W) or a constant, in front of the maps."""
    scores = np.empty((len(backgrounds), 1 + len(maps), *maps.shape[1:]), dtype=np.float32)
    for one, background in zip(scores, backgrounds, strict=True):
        one[0], one[1:] = background, maps
    return scores
