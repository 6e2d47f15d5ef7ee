"""CVAT: masks as its SDK sends them, "CVAT for images 1.1" files, and the label map of "Segmentation mask 1.1".

CVAT's run lengths go row by row through the mask's own box and begin with zeros: the first is 0 where a mask has the
upper left pixel of its box.
Source: cvat-ai/cvat cvat_sdk/masks.py; cvat/apps/dataset_manager/formats/cvat.py, what it writes and what it reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal, TypeAlias
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

import cv2
import numpy as np
from numpy.typing import NDArray

from weakseg.classes import BACKGROUND, MAX_CLASSES_U8, ClassTable
from weakseg.errors import DataError, UsageError
from weakseg.masks.labelled import LabelledImage
from weakseg.masks.polygons import Polygon, labels_from_polygons, polygons_from_labels
from weakseg.masks.shapes import (
    BACKGROUND_NAME,
    blank_labels,
    check_cost,
    labels_shown,
    paint_ring,
    ring_from_numbers,
    value_of_ignore,
    value_of_name,
)

_CHUNK_BYTES = 2**16
_OTHER_SHAPES = frozenset({"box", "ellipse", "polyline", "points", "cuboid", "skeleton"})

Attributes: TypeAlias = Mapping[str, str]


def points_from_mask(mask: NDArray[np.bool_]) -> list[int]:
    """`points` of a shape of type "mask", as `cvat_sdk.masks.encode_mask` makes them: run lengths, then the first and
    last column and row of the box, x1, y1, x2, y2. A mask of no pixels is one unset pixel.

    Args:
        mask: (H, W) bool.
    """
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8)) if mask.any() else (0, 0, 1, 1)
    flat = mask[y : y + height, x : x + width].reshape(-1)
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(changes, prepend=0, append=flat.size).tolist()
    return [*([0] if flat[0] else []), *runs, x, y, x + width - 1, y + height - 1]


def mask_from_points(points: Sequence[float], height: int, width: int) -> NDArray[np.bool_]:
    """(height, width) bool, of an image of that size.

    Raises:
        DataError: numbers that are not whole, a box outside the image, or run lengths that do not add up to the box.
    """
    whole = [int(n) for n in points if isinstance(n, int) or (isinstance(n, float) and n.is_integer())]
    if len(whole) != len(points) or len(whole) < 5:
        raise DataError("expected run lengths and a box, all whole numbers, got others")
    *runs, left, top, right, bottom = whole
    mask = np.zeros((height, width), dtype=bool)
    _box(mask, left, top, right - left + 1, bottom - top + 1)[_ones(runs, right - left + 1, bottom - top + 1)] = True
    return mask


def annotations_xml(
    images: Iterable[LabelledImage],
    classes: ClassTable,
    *,
    kind: Literal["mask", "polygon"] = "mask",
    tolerance_px: float = 0.0,
    ignore: str | None = None,
) -> Iterator[bytes]:
    """A file of "CVAT for images 1.1" in pieces, one an image; the images are gone through once, one at a time.

    Frames count from 0 in the order of the images; CVAT finds images by their names. Confidence has no place there.

    Args:
        kind: "mask" writes one mask for each class of an image. "polygon" writes an outline for each 4-connected part;
            CVAT's polygons have no holes, so that a part with a hole is written as a mask in any case.
        tolerance_px: of outlines, see `polygons_from_labels`; `read_xml` gives the very same maps.
        ignore: a label for IGNORE pixels, which are background otherwise: CVAT knows no such thing.
    Raises:
        UnknownClassError: a mask value outside the table.
        UsageError: `ignore` is the name of a class, or tolerance_px is out of range.
        DataError: a name with characters that XML cannot hold.
    """
    names = dict(enumerate(classes.names, 1))
    if ignore is not None:
        names[value_of_ignore(classes, ignore)] = ignore
    labels = "".join(f"<label><name>{_text(name)}</name><attributes/></label>" for name in names.values())
    meta = f"<meta><task><mode>annotation</mode><labels>{labels}</labels></task></meta>"
    yield f'<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>{meta}\n'.encode()
    for frame, image in enumerate(images):
        shown = labels_shown(image.labels, classes, ignore)
        height, width = shown.shape
        shapes = _masks(shown, names) if kind == "mask" else _polygons(shown, names, tolerance_px)
        head = f'<image id="{frame}" name={_attribute(image.name)} width="{width}" height="{height}">'
        yield "\n".join([head, *shapes, "</image>\n"]).encode()
    yield b"</annotations>\n"


def read_xml(data: bytes, classes: ClassTable, *, ignore: str | None = None) -> Iterator[LabelledImage]:
    """The label maps of a file of "CVAT for images 1.1" in the order of its images, one at a time.

    Shapes of a higher z_order lie over others, of one z_order later ones over earlier ones; what none covers is
    background. Inside a polygon is what `labels_from_polygons` says. Labels count by their names; "background" and
    `ignore` are known, too. Tags of images are read over. Names are as they are in the file: they may point anywhere.

    Raises:
        UnknownClassError: a shape of a label that is not in the table.
        DataError: other XML or none, a document type (entities are bombs), tracks, shapes that are neither mask nor
            polygon, damaged ones, more than MAX_PIXELS pixels or MAX_LAYERS layers.
    """

    @cache
    def value_of(label: str) -> int:
        return value_of_name(label, classes, ignore)

    found = _Found()
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = found.doctype
    parser.StartElementHandler = found.start
    parser.EndElementHandler = found.end
    for begin in range(0, len(data) + 1, _CHUNK_BYTES):
        try:
            parser.Parse(data[begin : begin + _CHUNK_BYTES], begin + _CHUNK_BYTES > len(data))
        except (expat.ExpatError, ValueError, LookupError) as error:  # the latter two of encodings
            raise DataError(f"expected a file of CVAT for images 1.1, got damaged or other data: {error}") from error
        while found.images:
            yield _labelled(*found.images.popleft(), value_of, classes)


def labelmap_txt(classes: ClassTable, palette: NDArray[np.uint8] | None = None, *, ignore: str | None = None) -> str:
    """labelmap.txt of "Segmentation mask 1.1": name:R,G,B:parts:actions, background first, then by mask value.

    Beside it go SegmentationClass/<name>.png, palette PNGs in these colours, and ImageSets/Segmentation/default.txt,
    a <name> in each line.

    Args:
        palette: (n, 3) uint8 RGB, row = mask value; None = the VOC colours.
        ignore: a label for IGNORE pixels. Without one, importers refuse masks that have any: where the task in CVAT has
            no such label, write the PNGs of `labels_shown`.
    Raises:
        UsageError: more classes than palettes have colours, names that the file cannot hold, or `ignore` is a class.
    """
    colours = classes.palette() if palette is None else palette
    names = dict(enumerate((BACKGROUND_NAME, *classes.names)))
    if ignore is not None:
        names[value_of_ignore(classes, ignore)] = ignore
    if len(classes) > MAX_CLASSES_U8 or max(names) >= len(colours):
        raise UsageError(
            f"expected a colour for each of at most {MAX_CLASSES_U8} classes, "
            f"got {len(classes)} classes and {len(colours)} colours: use another format"
        )
    if unfit := [name for name in names.values() if set(name) & set(":\r\n") or name.startswith("#")]:
        raise UsageError(f"labelmap.txt holds no names with ':' or line ends, nor with '#' first, got {unfit[0]!r}")
    lines = [f"{name}:{','.join(map(str, colours[value].tolist()))}::" for value, name in names.items()]
    return "\n".join(["# label:color_rgb:parts:actions", *lines, ""])


# Writing --------------------------------------------------------------------------------------------------------------


def _masks(labels: NDArray[Any], names: Mapping[int, str]) -> Iterator[str]:
    for value in np.unique(labels[labels != BACKGROUND]).tolist():
        yield _mask(labels == value, names[value])


def _polygons(labels: NDArray[Any], names: Mapping[int, str], tolerance_px: float) -> Iterator[str]:
    for polygon in polygons_from_labels(labels, tolerance_px):
        if polygon.holes:
            part = labels_from_polygons([Polygon(1, polygon.outer, polygon.holes)], *labels.shape)
            yield _mask(part > 0, names[polygon.value])
        else:
            points = ";".join(f"{x:.9g},{y:.9g}" for x, y in polygon.outer.tolist())
            yield _shape("polygon", names[polygon.value], f'points="{points}"')


def _mask(mask: NDArray[np.bool_], label: str) -> str:
    *runs, left, top, right, bottom = points_from_mask(mask)
    box = f'left="{left}" top="{top}" width="{right - left + 1}" height="{bottom - top + 1}"'
    return _shape("mask", label, f'rle="{", ".join(map(str, runs))}" {box}')


def _shape(kind: str, label: str, geometry: str) -> str:
    return f'<{kind} label={_attribute(label)} source="auto" occluded="0" {geometry} z_order="0"></{kind}>'


def _attribute(text: str) -> str:
    return quoteattr(_checked(text))


def _text(text: str) -> str:
    return escape(_checked(text))


def _checked(text: str) -> str:
    """XML 1.0, 2.2 Characters: no control characters but tab and line ends, no half of a surrogate pair."""
    if any((c < " " and c not in "\t\n\r") or "\ud800" <= c <= "\udfff" or c in "\ufffe\uffff" for c in text):
        raise DataError(f"expected names that XML can hold, got {text!r:.200}")
    return text


# Reading --------------------------------------------------------------------------------------------------------------


class _Found:
    """What the parser has met. images: (attributes, shapes as (element, attributes)) of those that are complete."""

    def __init__(self) -> None:
        self.images: deque[tuple[Attributes, list[tuple[str, Attributes]]]] = deque()
        self._image: Attributes | None = None
        self._shapes: list[tuple[str, Attributes]] = []
        self._in_root = False

    def doctype(self, *_: object) -> None:
        raise DataError(
            "expected a file of CVAT for images 1.1, got XML with a document type: nothing of CVAT's has one"
        )

    def start(self, element: str, attributes: Attributes) -> None:
        if not self._in_root and element != "annotations":
            raise DataError(f"expected a file of CVAT for images 1.1, which is <annotations>, got <{element:.40}>")
        self._in_root = True
        if element == "track":
            raise DataError("expected a file of CVAT for images 1.1, got tracks: export it again, not 'for video'")
        if element == "image":
            self._image, self._shapes = attributes, []
        elif self._image is not None and element in {"mask", "polygon"} | _OTHER_SHAPES:
            self._shapes.append((element, attributes))

    def end(self, element: str) -> None:
        if element == "image" and self._image is not None:
            self.images.append((self._image, self._shapes))
            self._image = None


def _labelled(
    image: Attributes, shapes: Sequence[tuple[str, Attributes]], value_of: Callable[[str], int], classes: ClassTable
) -> LabelledImage:
    if (name := image.get("name")) is None:
        raise DataError("expected images with names, got one without")
    try:
        labels = blank_labels(_integer(image, "width"), _integer(image, "height"), classes)
        cost = 0
        for kind, shape in sorted(shapes, key=lambda one: _integer({"z_order": "0", **one[1]}, "z_order")):
            cost += _paint(labels, kind, shape, value_of(shape.get("label", "")))
            check_cost(cost, labels)
    except DataError as error:
        raise type(error)(f"image {name!r:.200}: {error}") from error
    return LabelledImage(name, labels)


def _paint(labels: NDArray[Any], kind: str, shape: Attributes, value: int) -> int:
    """Returns what it cost, in pixels."""
    if kind == "mask":
        left, top, width, height = (_integer(shape, key) for key in ("left", "top", "width", "height"))
        box = _box(labels, left, top, width, height)
        runs = _numbers(int, shape.get("rle", ""))
        box[_ones(runs, width, height)] = value
        return box.size + len(runs)
    if kind == "polygon":
        return paint_ring(labels, value, ring_from_numbers(_numbers(float, shape.get("points", "").replace(";", ","))))
    raise DataError(
        f"expected masks and polygons, got a {kind} of {shape.get('label')!r:.200}: draw a mask, or delete it"
    )


def _box(image: NDArray[Any], left: int, top: int, width: int, height: int) -> NDArray[Any]:
    """That part of it."""
    if min(left, top) < 0 or min(width, height) < 1 or left + width > image.shape[1] or top + height > image.shape[0]:
        raise DataError(
            f"expected masks within the image of {image.shape[1]}x{image.shape[0]} pixels, "
            f"got one of {width}x{height} at {left}, {top}"
        )
    return image[top : top + height, left : left + width]


def _ones(runs: Sequence[int], width: int, height: int) -> NDArray[np.bool_]:
    """(height, width) of run lengths."""
    if min(runs, default=0) < 0 or sum(runs) != width * height:
        raise DataError(f"expected run lengths of {width} x {height} pixels, got others")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)


def _numbers(kind: Callable[[str], Any], text: str) -> list[Any]:
    try:
        return [kind(number) for number in text.split(",")]
    except ValueError as error:
        raise DataError(f"expected numbers with commas between them, got {text!r:.60}") from error


def _integer(attributes: Attributes, key: str) -> int:
    try:
        return int(attributes[key])
    except (KeyError, ValueError) as error:
        raise DataError(f"expected {key} as an integer, got {attributes.get(key)!r:.40}") from error
