"""Classes, mask values and colours. Class index c (0-based) is mask value c + 1 everywhere."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weakseg.errors import DatasetError, UnknownClassError

BACKGROUND = 0
IGNORE = 255  # in uint8 label maps
IGNORE_U16 = 65535  # in uint16 label maps, used above MAX_CLASSES_U8 classes
MAX_CLASSES_U8 = 254
MAX_CLASSES = 65534


def mask_dtype(n_classes: int) -> type[np.uint8] | type[np.uint16]:
    """The label map's dtype: uint8 up to 254 classes, uint16 above."""
    return np.uint8 if n_classes <= MAX_CLASSES_U8 else np.uint16


def ignore_value(labels: NDArray[np.integer]) -> int:
    """The IGNORE value of a label map of this dtype."""
    return IGNORE if labels.dtype == np.uint8 else IGNORE_U16


@dataclass(frozen=True)
class ClassTable:
    """The foreground classes in order; background is not one of them.

    Raises:
        DatasetError: no class, a repeated or empty name, or more than 65,534 classes.
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.names) <= MAX_CLASSES:
            raise DatasetError(f"expected 1 to {MAX_CLASSES} classes, got {len(self.names)}: name at least one class")
        blank = [i for i, name in enumerate(self.names) if not name.strip()]
        if blank:
            raise DatasetError(f"class names must not be empty, got an empty one at index {blank[0]}")
        repeated = (
            sorted({name for name in self.names if self.names.count(name) > 1})
            if len(set(self.names)) < len(self.names)
            else []
        )
        if repeated:
            raise DatasetError(f"class names must differ, got {', '.join(repeated)} more than once")

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str) -> int:
        """Class index of a name; raises UnknownClassError, which names the nearest class."""
        try:
            return self.names.index(name)
        except ValueError:
            near = difflib.get_close_matches(name, self.names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(self.names[:20])}"
            raise UnknownClassError(f"unknown class {name!r}: {hint}") from None

    def mask_value(self, name: str) -> int:
        return self.index(name) + 1

    def tags(self, names: Sequence[str]) -> NDArray[np.bool_]:
        """(C,) bool from class names."""
        out = np.zeros(len(self), dtype=bool)
        for name in names:
            out[self.index(name)] = True
        return out

    def palette(self) -> NDArray[np.uint8]:
        """(256, 3) uint8 RGB, row = mask value; the VOC colours, IGNORE is VOC's cream."""
        return voc_palette()


def voc_palette() -> NDArray[np.uint8]:
    """(256, 3) uint8: the colour map of the PASCAL VOC development kit (bit interleaving of the value)."""
    values = np.arange(256)
    palette = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= (((values >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return palette
