"""What a refiner changed: the label maps before and after it, counted over images, and a warning when it did harm.

A refiner makes one label map of an image from another. Counting needs no true mask; where there are some, they decide
whether the change was for the better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weakseg.classes import BACKGROUND, ClassTable
from weakseg.errors import DataError
from weakseg.scoring import confusion

MIN_FALL = 0.0005  # of mIoU; a report would not show less
# Signs of harm without a true mask: a refiner that works trims and mends objects, one that fails wipes them out.
# `python -m benchmarks.refiner_signs` says how often the first three are right; the others name what nobody can want.
MAX_LOST = 0.15  # share of the images in which a class had pixels before, and has none after
MIN_AREA_KEPT = 0.8  # of the foreground
MIN_CLASS_KEPT, MIN_CLASS_IMAGES = 0.5, 10  # of a class; in fewer images it may be chance
MAX_AREA_GROWN = 2.0  # times the foreground; a refiner that fills in bodies from heads grows it, too
MIN_AGREEMENT = 0.7  # share of the pixels that keep their label


@dataclass(frozen=True)
class Refiner:
    """name: in evaluate/refiner-<name>-<split>.json. before, after: `what` of its label maps. advice: if it harms."""

    name: str
    before: str
    after: str
    advice: str


REFINERS = (
    Refiner(
        "crf",
        before="cam",
        after="cam_crf",
        advice="leave it out with --pseudo_label.crf none, or make it milder with a smaller "
        "--pseudo_label.crf.bilateral_sxy or fewer --pseudo_label.crf.iterations",
    ),
    Refiner(
        "random_walk",
        before="cam",
        after="random_walk",
        advice="leave it out with --affinity none, or make it milder with a larger --affinity.walk.beta or fewer "
        "--affinity.walk.steps",
    ),
    Refiner(
        "seg_crf",
        before="segmentation",
        after="segmentation_crf",
        advice="leave it out with --evaluate.seg_crf none, or make it milder with a smaller "
        "--evaluate.seg_crf.bilateral_weight",
    ),
)


@dataclass
class Change:
    """Summed counts over images. Images without tags are left out: there is nothing in them to refine.

    matrix: (C + 1, C + 2) pixels, row = label before, column = label after, last column IGNORE.
    had, lost: (C,) images in which a tagged class has pixels before; in which it has none after.
    n_had, n_lost: images in which that is so of any class.
    """

    n_classes: int
    n_images: int = 0
    n_had: int = 0
    n_lost: int = 0
    matrix: NDArray[np.int64] = field(init=False)
    had: NDArray[np.int64] = field(init=False)
    lost: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.matrix = np.zeros((self.n_classes + 1, self.n_classes + 2), dtype=np.int64)
        self.had, self.lost = np.zeros((2, self.n_classes), dtype=np.int64)

    def add(self, before: NDArray[Any], after: NDArray[Any], tags: Sequence[int]) -> None:
        """Count one image: label maps (H, W), and the class indices of its tags."""
        if before.shape != after.shape:
            raise DataError(f"a refiner must keep the size of a label map, got {before.shape} and {after.shape}")
        if not tags:
            return
        had = [c for c in tags if (before == c + 1).any()]
        lost = [c for c in had if not (after == c + 1).any()]
        self.matrix += confusion(before, after, self.n_classes)
        self.had[had] += 1
        self.lost[lost] += 1
        self.n_images += 1
        self.n_had += bool(had)
        self.n_lost += bool(lost)

    def merge(self, other: Change) -> None:
        for name in ("n_images", "n_had", "n_lost", "matrix", "had", "lost"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def to_dict(self, classes: ClassTable) -> dict[str, Any]:
        """JSON form, see docs/architecture.md. Shares are of the pixels that have a label on both sides."""
        decided = self.matrix[:, :-1]
        before, after = decided.sum(axis=1), decided.sum(axis=0)
        pixels = int(decided.sum())
        seen = [c for c in range(self.n_classes) if before[c + 1] or after[c + 1]]
        return {
            "n_images": self.n_images,
            "agreement": _share(np.trace(decided), pixels),
            "foreground": {
                "before": _share(pixels - before[BACKGROUND], pixels),
                "after": _share(pixels - after[BACKGROUND], pixels),
            },
            "images": {"had": self.n_had, "lost": self.n_lost},
            "classes": {
                classes.names[c]: {
                    "before": _share(before[c + 1], pixels),
                    "after": _share(after[c + 1], pixels),
                    "had": int(self.had[c]),
                    "lost": int(self.lost[c]),
                }
                for c in seen
            },
        }


def refiner_record(
    refiner: Refiner, split: str, change: Change, classes: ClassTable, miou: Mapping[str, float | None]
) -> dict[str, Any]:
    """The record of evaluate/refiner-<name>-<split>.json. miou: of label maps by `what`, as far as it is known."""
    before, after = miou.get(refiner.before), miou.get(refiner.after)
    record = {
        "what": "refiner",
        "refiner": refiner.name,
        "before": refiner.before,
        "after": refiner.after,
        "split": split,
        "miou": None if before is None or after is None else {"before": before, "after": after},
        **change.to_dict(classes),
    }
    return record | {"warning": warning(refiner, record)}


def warning(refiner: Refiner, record: dict[str, Any]) -> str | None:
    """What was seen and what to try when label maps got worse: by mIoU where it is known, else by the signs above."""
    if record["miou"] is not None:
        before, after = record["miou"]["before"], record["miou"]["after"]
        if before - after < MIN_FALL:
            return None
        fall = f"from {100 * before:.1f} to {100 * after:.1f}, by {100 * (before - after):.1f} points"
        said = f"lowers mIoU on {record['split']} {fall}"
    else:
        seen = signs(record)
        if not seen:
            return None
        said = f"seems to harm the label maps of {record['split']} (a guess, without true masks): {'; '.join(seen)}"
    return f"the refiner {refiner.name} {said}. Try: {refiner.advice}"


def signs(record: dict[str, Any]) -> list[str]:
    """The label-free signs of harm in a record, in words; none where nothing was counted."""
    if record["agreement"] is None:
        return []
    had, lost = record["images"]["had"], record["images"]["lost"]
    before, after = record["foreground"]["before"], record["foreground"]["after"]
    halved = [
        name
        for name, one in record["classes"].items()
        if one["had"] >= MIN_CLASS_IMAGES and one["after"] < MIN_CLASS_KEPT * one["before"]
    ]
    area = f"from {before:.1%} to {after:.1%} of the pixels"
    found = {
        f"a class of the tags vanishes from {lost} of {had} images": lost > MAX_LOST * had,
        f"the foreground shrinks {area}": after < MIN_AREA_KEPT * before,
        f"less than half is left of {', '.join(halved)}": bool(halved),
        f"the foreground grows {area}": after > MAX_AREA_GROWN * before,
        f"only {record['agreement']:.1%} of the pixels keep their label": record["agreement"] < MIN_AGREEMENT,
    }
    return [text for text, is_so in found.items() if is_so]


def _share(part: Any, whole: int) -> float | None:
    return float(part / whole) if whole else None
