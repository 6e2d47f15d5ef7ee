"""What formats that list shapes have in common: which values and names they hold, and how shapes become a label map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from weakseg.classes import BACKGROUND, ClassTable, ignore_value, mask_dtype
from weakseg.errors import DataError, UnknownClassError, UsageError
from weakseg.image import MAX_PIXELS
from weakseg.masks.polygons import Polygon, labels_from_polygons

BACKGROUND_NAME = "background"
# What a hostile file may cost. A layer is one shape over the whole image; the most crowded photographs have dozens.
MAX_LAYERS = 256
_FREE_PIXELS = 2**16  # that small images have more
_MAX_CROSSINGS = 4_000_000  # of rows by an outline: 50 bytes each in memory
_COST_OF_CROSSING = 16  # in pixels
_MAX_COORDINATE = 2.0**24


def labels_shown(labels: NDArray[Any], classes: ClassTable, ignore: str | None = None) -> NDArray[Any]:
    """A copy of a label map as lists of shapes have it: IGNORE is background, unless it has a name.

    Returns:
        Of the dtype of maps of these classes.
    Raises:
        UnknownClassError: a mask value outside the table.
    """
    unclear = labels == ignore_value(labels)
    shown = np.where(unclear, BACKGROUND, labels)
    if (highest := int(shown.max(initial=BACKGROUND))) > len(classes):
        raise UnknownClassError(
            f"expected mask values up to {len(classes)}, the number of classes, got {highest}: "
            "give the classes that the masks were made with"
        )
    shown = shown.astype(mask_dtype(len(classes)))
    if ignore is not None:
        shown[unclear] = ignore_value(shown)
    return shown


def value_of_ignore(classes: ClassTable, ignore: str | None) -> int:
    """The IGNORE value in label maps of these classes; raises UsageError where its name is that of a class."""
    if ignore is not None and ignore in (BACKGROUND_NAME, *classes.names):
        raise UsageError(f"expected a name for IGNORE that no class has, got {ignore!r}: choose another one")
    return ignore_value(np.empty(0, mask_dtype(len(classes))))


def value_of_name(name: str, classes: ClassTable, ignore: str | None = None) -> int:
    """The mask value of a class, of "background" or of `ignore`; raises UnknownClassError, which names the nearest."""
    if name == ignore:
        return value_of_ignore(classes, ignore)
    if name == BACKGROUND_NAME and name not in classes.names:
        return BACKGROUND
    return classes.mask_value(name)


def blank_labels(width: int, height: int, classes: ClassTable, order: Literal["C", "F"] = "C") -> NDArray[Any]:
    """(height, width) of background, by rows or by columns; raises DataError for a size that no image has."""
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise DataError(f"expected images of 1 to {MAX_PIXELS} pixels, got {width}x{height}")
    return np.full((height, width), BACKGROUND, dtype=mask_dtype(len(classes)), order=order)


def ring_from_numbers(numbers: Sequence[Any]) -> NDArray[np.float64]:
    """(n, 2) from x1, y1, x2, y2, …; raises DataError unless they are numbers of at least three points."""
    try:
        ring = np.array(numbers)
    except ValueError:  # lists in lists, of different lengths
        ring = np.zeros(0)
    if ring.dtype.kind not in "if" or ring.ndim != 1 or len(ring) < 6 or len(ring) % 2:
        raise DataError("expected a polygon as numbers x1, y1, x2, y2, x3, y3, …, got something else")
    points = ring.astype(np.float64).reshape(-1, 2)
    if not (np.abs(points) <= _MAX_COORDINATE).all():
        raise DataError(f"expected polygons in pixels, got coordinates beyond {_MAX_COORDINATE:.0f}")
    return points


def paint_ring(labels: NDArray[Any], value: int, ring: NDArray[np.float64]) -> int:
    """Give `value` to the inside of an (n, 2) outline, as `labels_from_polygons` does; returns its cost, in pixels.

    Raises:
        DataError: an outline that goes up and down more often than any object does.
    """
    size = (labels.shape[1], labels.shape[0])
    low = np.clip(np.floor(ring.min(axis=0)), 0, size).astype(np.int64)
    high = np.clip(np.ceil(ring.max(axis=0)), 0, size).astype(np.int64)
    rows = np.clip(ring[:, 1], low[1], high[1])
    n_crossings = int(np.abs(np.diff(rows, append=rows[:1])).sum())
    if n_crossings > _MAX_CROSSINGS:
        raise DataError(
            f"expected outlines that cross at most {_MAX_CROSSINGS} rows, got {n_crossings}: use run lengths"
        )
    box = labels[low[1] : high[1], low[0] : high[0]]
    inside = labels_from_polygons([Polygon(1, (ring - low).astype(np.float32))], *box.shape)
    box[inside > 0] = value
    return box.size + _COST_OF_CROSSING * n_crossings


def check_cost(cost: int, labels: NDArray[Any]) -> None:
    """Raises DataError where the shapes of an image have cost more than any image's."""
    if cost > MAX_LAYERS * (labels.size + _FREE_PIXELS):
        raise DataError(
            f"expected shapes that cover an image at most {MAX_LAYERS} times, got more: is the file damaged?"
        )
