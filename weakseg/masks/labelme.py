"""labelme's JSON: a file an image, with shapes. Masks are PNG crops in base64, so they hold holes and single pixels.

Source: wkentaro/labelme, labelme/label_file.py and labelme/utils/shape.py.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from weakseg.classes import BACKGROUND, ClassTable
from weakseg.errors import DataError
from weakseg.image import check_pixels, probe
from weakseg.masks.labelled import LabelledImage
from weakseg.masks.shapes import blank_labels, check_cost, labels_shown, paint_ring, ring_from_numbers, value_of_name

VERSION = "5.4.1"  # of labelme, whose format this is; it reads files of other versions, too


def json_from_labels(image: LabelledImage, classes: ClassTable) -> bytes:
    """One shape of type "mask" for each class, by mask value. IGNORE is background. The image itself is not inside.

    Raises:
        UnknownClassError: a mask value outside the table.
    """
    labels = labels_shown(image.labels, classes)
    content = {
        "version": VERSION,
        "flags": {},
        "shapes": list(_shapes(labels, classes)),
        "imagePath": image.name,
        "imageData": None,
        "imageHeight": labels.shape[0],
        "imageWidth": labels.shape[1],
    }
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()


def labels_from_json(data: bytes, classes: ClassTable) -> LabelledImage:
    """Masks and polygons; later shapes lie over earlier ones, what no shape covers is background.

    Raises:
        DataError: no labelme file, other kinds of shapes, a mask beyond the image, or a damaged one.
        UnknownClassError: a label that is no class.
    """
    content = _parsed(data)
    try:
        labels = blank_labels(int(content["imageWidth"]), int(content["imageHeight"]), classes)
        name, shapes = str(content["imagePath"]), list(content["shapes"])
        cost = 0
        for shape in shapes:
            value = value_of_name(str(shape["label"]), classes)
            cost += _paint(labels, value, shape)
            check_cost(cost, labels)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"expected a labelme file, got one whose fields are others: {error}") from error
    return LabelledImage(name, labels)


def _shapes(labels: NDArray[Any], classes: ClassTable) -> Iterator[dict[str, Any]]:
    for value in np.unique(labels):
        if value == BACKGROUND:
            continue
        mask = labels == value
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        top, left, bottom, right = (int(edge) for edge in (rows[0], columns[0], rows[-1], columns[-1]))
        buffer = io.BytesIO()
        Image.fromarray(mask[top : bottom + 1, left : right + 1]).save(buffer, "PNG")
        yield {
            "label": classes.names[int(value) - 1],
            "points": [[left, top], [right, bottom]],  # of the first and the last pixel
            "group_id": None,
            "description": "",
            "shape_type": "mask",
            "flags": {},
            "mask": base64.b64encode(buffer.getvalue()).decode("ascii"),
        }


def _paint(labels: NDArray[Any], value: int, shape: dict[str, Any]) -> int:
    """Returns the cost, in pixels."""
    kind = shape.get("shape_type")
    if kind == "polygon":
        return paint_ring(labels, value, ring_from_numbers([x for point in shape["points"] for x in point]))
    if kind != "mask":
        raise DataError(f"expected shapes of type mask or polygon, got {kind!r}: convert them in labelme first")
    mask = _mask(shape["mask"], labels.size)
    (x, y), _ = shape["points"]
    left, top = round(float(x)), round(float(y))
    box = labels[max(top, 0) : top + mask.shape[0], max(left, 0) : left + mask.shape[1]]
    if left < 0 or top < 0 or box.shape != mask.shape:
        size = f"{mask.shape[1]}x{mask.shape[0]}"
        raise DataError(f"expected masks inside the image, got one of {size} at {left}, {top}: is it another image's?")
    box[mask] = value
    return box.size


def _mask(text: str, max_pixels: int) -> NDArray[np.bool_]:
    try:
        data = base64.b64decode(text, validate=True)
        check_pixels(probe(data, formats=("PNG",)), max_pixels)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            pixels = np.array(image)
    except (binascii.Error, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"expected a mask as PNG in base64, got damaged data: {error}") from error
    if pixels.ndim != 2:
        raise DataError(f"expected a mask of one channel, got {pixels.shape}")
    return np.asarray(pixels > 0)


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"expected a labelme file, got no JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError("expected a labelme file, got other JSON")
    return content
