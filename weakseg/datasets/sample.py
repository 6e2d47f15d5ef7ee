"""The one type that every reader yields. It knows no mask: true masks are behind weakseg.datasets.truth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from weakseg.classes import ClassTable


@dataclass(frozen=True)
class Sample:
    """One image and its image-level labels.

    id: unique in its dataset, usable as a file name (may hold `/` for images in sub-folders).
    image: path of the image file.
    tags: sorted class indices; empty is legal (only background is in the image).
    """

    id: str
    image: Path
    tags: tuple[int, ...]

    def tag_vector(self, n_classes: int) -> NDArray[np.bool_]:
        """(C,) bool."""
        out = np.zeros(n_classes, dtype=bool)
        out[list(self.tags)] = True
        return out


@dataclass(frozen=True)
class Dataset:
    """The samples of one split, in a fixed order; slices of them are tuples."""

    classes: ClassTable
    samples: Sequence[Sample]
    split: str
    root: Path

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)
