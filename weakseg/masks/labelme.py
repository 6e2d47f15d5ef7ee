"""labelme's JSON: a file an image, with shapes. Masks are PNG crops in base64, so they hold holes and single pixels.

Pixel i covers [i, i + 1), for labelme's window, too. Source: wkentaro/labelme, labelme/label_file.py and
labelme/utils/shape.py.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from weakseg.classes import BACKGROUND, ClassTable
from weakseg.errors import DataError
from weakseg.image import check_pixels, probe
from weakseg.masks.keyholes import one_ring
from weakseg.masks.labelled import LabelledImage
from weakseg.masks.polygons import polygons_from_labels
from weakseg.masks.shapes import blank_labels, check_cost, labels_shown, paint_ring, ring_from_numbers, value_of_name

VERSION = "5.4.1"  # of labelme, whose format this is; it reads files of other versions, too


def json_from_labels(
    image: LabelledImage, classes: ClassTable, *, kind: Literal["mask", "polygon"] = "mask", tolerance_px: float = 0.0
) -> bytes:
    """Shapes by mask value, with the class's confidence as "score", which labelme keeps. IGNORE is background. The
    image itself is not inside.

    Args:
        kind: "mask" is one shape for each class. "polygon" is one for each 4-connected part; holes, which labelme's
            polygons lack, are reached over bridges (weakseg.masks.keyholes). `labels_from_json` reads both exactly;
            labelme's own `shapes_to_label` also fills the pixels that begin on an outline, so that parts grow by up to
            a pixel to the right and downwards.
        tolerance_px: of polygons, see `polygons_from_labels`.
    Raises:
        UnknownClassError: a mask value outside the table.
        UsageError: tolerance_px is out of range.
    """
    labels = labels_shown(image.labels, classes)
    shapes = [
        {"label": classes.names[value - 1], "group_id": None, "description": "", "flags": {}, "mask": None}
        | geometry
        | ({"score": float(image.confidence[value])} if value in image.confidence else {})
        for value, geometry in (_masks(labels) if kind == "mask" else _polygons(labels, tolerance_px))
    ]
    content = {
        "version": VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": image.name,
        "imageData": None,
        "imageHeight": labels.shape[0],
        "imageWidth": labels.shape[1],
    }
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()


def labels_from_json(data: bytes, classes: ClassTable) -> LabelledImage:
    """Masks, polygons and rectangles; later shapes lie over earlier ones, what no shape covers is background.

    The highest "score" of a class is its confidence.

    Raises:
        DataError: no labelme file, other kinds of shapes, a mask beyond the image, or a damaged one.
        UnknownClassError: a label that is no class.
    """
    content = _parsed(data)
    try:
        labels = blank_labels(int(content["imageWidth"]), int(content["imageHeight"]), classes)
        name, shapes = str(content["imagePath"]).replace("\\", "/"), list(content["shapes"])
        confidence: dict[int, float] = {}
        cost = 0
        for shape in shapes:
            value = value_of_name(str(shape["label"]), classes)
            cost += _paint(labels, value, shape)
            check_cost(cost, labels)
            if shape.get("score") is not None:
                confidence[value] = max(_score(shape["score"]), confidence.get(value, 0.0))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"expected a labelme file, got one whose fields are others: {error}") from error
    return LabelledImage(name, labels, confidence)


def _masks(labels: NDArray[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    for value in np.unique(labels[labels != BACKGROUND]).tolist():
        mask = labels == value
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        top, left, bottom, right = (int(edge) for edge in (rows[0], columns[0], rows[-1], columns[-1]))
        buffer = io.BytesIO()
        Image.fromarray(mask[top : bottom + 1, left : right + 1]).save(buffer, "PNG")
        corners = [[left, top], [right, bottom]]  # the first and the last pixel
        png = base64.b64encode(buffer.getvalue()).decode("ascii")
        yield value, {"points": corners, "shape_type": "mask", "mask": png}


def _polygons(labels: NDArray[Any], tolerance_px: float) -> Iterator[tuple[int, dict[str, Any]]]:
    for polygon in polygons_from_labels(labels, tolerance_px):
        yield polygon.value, {"points": one_ring(polygon).tolist(), "shape_type": "polygon"}


def _paint(labels: NDArray[Any], value: int, shape: Mapping[str, Any]) -> int:
    """Returns the cost, in pixels."""
    kind, points = shape.get("shape_type") or "polygon", shape["points"]
    if kind == "polygon":
        return paint_ring(labels, value, ring_from_numbers([x for point in points for x in point]))
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points
        return paint_ring(labels, value, ring_from_numbers([x0, y0, x1, y0, x1, y1, x0, y1]))
    if kind != "mask":
        raise DataError(f"expected shapes of type mask, polygon or rectangle, got {kind!r}: draw them as polygons")
    mask = _mask(shape["mask"], labels.size)
    (x, y), _ = points
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
    except binascii.Error as error:
        raise DataError(f"expected a mask as PNG in base64, got damaged data: {error}") from error
    check_pixels(probe(data, formats=("PNG",)), max_pixels)
    try:
        with PngImageFile(io.BytesIO(data)) as image:
            pixels = np.array(image)
    except Exception as error:  # Pillow raises whatever its parser met: OSError, SyntaxError, ValueError, struct.error
        raise DataError(f"expected a mask as PNG in base64, got damaged data: {error}") from error
    if pixels.ndim != 2:
        raise DataError(f"expected a mask of one channel, got {pixels.shape}")
    return np.asarray(pixels > 0)


def _score(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise DataError(f"expected scores from 0 to 1, got {value!r:.40}")
    return float(value)


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"expected a labelme file, got no JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError("expected a labelme file, got other JSON")
    return content
