"""YOLO segmentation labels: a text file an image, a line a polygon: `class x1 y1 x2 y2 ...`.

Class numbers are class indices, from 0; coordinates are shares of the image's width and height. The format has no
holes: polygons with holes are written as one ring that reaches them over bridges (weakseg.masks.keyholes). An image
without objects has an empty file.
Source: docs.ultralytics.com/datasets/segment; ultralytics/data/utils.py `verify_image_label`, `check_det_dataset`.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weakseg.classes import ClassTable
from weakseg.errors import DataError
from weakseg.masks.keyholes import one_ring
from weakseg.masks.polygons import polygons_from_labels
from weakseg.masks.shapes import blank_labels, check_cost, labels_shown, paint_ring, ring_from_numbers

DIGITS = 7  # a hundredth of a pixel of the largest images
BEYOND = 0.01  # how far coordinates may lie outside of [0, 1]; Ultralytics leaves out images of which one lies further


def txt_from_labels(labels: NDArray[Any], classes: ClassTable, *, tolerance_px: float = 0.0) -> str:
    """A line for each 4-connected part, by class, then in reading order; empty where all is background.

    IGNORE is background. Filled at the centres of pixels, parts give the very label map.

    Args:
        labels: (H, W) mask values.
        tolerance_px: as of `polygons_from_labels`; 0 = along pixel edges, exactly.
    Raises:
        UnknownClassError: a mask value outside the table.
    """
    shown = labels_shown(labels, classes)
    size = np.array(shown.shape[::-1], dtype=np.float64)
    lines = []
    for polygon in polygons_from_labels(shown, tolerance_px):
        shares = (one_ring(polygon) / size).reshape(-1)
        lines.append(" ".join([str(polygon.value - 1), *(f"{share:.{DIGITS}g}" for share in shares)]))
    return "".join(f"{line}\n" for line in lines)


def labels_from_txt(text: str, height: int, width: int, classes: ClassTable) -> NDArray[Any]:
    """(height, width) mask values; later lines lie over earlier ones.

    Raises:
        DataError: a line that is no polygon, or a class number outside the table, with its line number.
    """
    labels, cost = blank_labels(width, height, classes), 0
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            index, *numbers = line.split()
            value = int(index) + 1
            ring = ring_from_numbers([float(one) for one in numbers])
        except (ValueError, DataError) as error:
            box = ", a box: boxes have no masks" if len(line.split()) == 5 else ""
            raise DataError(f"line {number}: expected `class x1 y1 x2 y2 x3 y3 …`, got {line[:60]!r}{box}") from error
        if not 1 <= value <= len(classes):
            raise DataError(f"line {number}: expected a class from 0 to {len(classes) - 1}, got {index:.20}")
        if not ((ring >= -BEYOND) & (ring <= 1 + BEYOND)).all():
            raise DataError(
                f"line {number}: expected shares of the image's size, from 0 to 1, got {ring.min():g} to "
                f"{ring.max():g}: are they pixels?"
            )
        cost += paint_ring(labels, value, ring * [width, height])
        check_cost(cost, labels)
    return labels


def dataset_yaml(classes: ClassTable, images: str = "images") -> str:
    """The description that training is started with.

    It lies beside the folder `images`, whose path ends in a folder "images" or has one in it: Ultralytics looks for
    labels where this one is called "labels". It names no `path`, for which Ultralytics then takes its own folder; "."
    would be that in which training is started.
    """
    names = "".join(f"  {i}: {_quoted(name)}\n" for i, name in enumerate(classes.names))
    return f"train: {_quoted(images)}\nval: {_quoted(images)}\nnames:\n{names}"


def _quoted(text: str) -> str:
    """In YAML, which has JSON's escapes but no pairs of surrogates, and wants all that is not printable escaped."""
    plain = json.dumps(text, ensure_ascii=False)
    return "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in plain)
