"""COCO instances files: label maps as one, and corrected ones back, whether ours, CVAT's or Label Studio's.

An annotation is what a class covers in an image, or one connected part of it. Background is no category.
Source: cocodataset.org/#format-data; what pycocotools' `COCO` and `annToMask` make of it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from tempfile import SpooledTemporaryFile
from typing import Any, Literal, NamedTuple, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from weakseg.classes import BACKGROUND, ClassTable
from weakseg.errors import DataError
from weakseg.image import MAX_PIXELS
from weakseg.masks.coco_rle import counts_from_string, rles_from_labels
from weakseg.masks.labelled import LabelledImage
from weakseg.masks.polygons import polygons_from_labels
from weakseg.masks.shapes import (
    blank_labels,
    check_cost,
    labels_shown,
    paint_ring,
    ring_from_numbers,
    value_of_ignore,
    value_of_name,
)

_SPOOL_BYTES = 2**20  # in memory, of the list of images; the rest is in a temporary file
_READ_BYTES = 2**16

T = TypeVar("T")


class _Object(NamedTuple):
    """value: mask value. box: x, y, width, height. area: in pixels."""

    value: int
    box: tuple[int, int, int, int]
    area: int


def instances_json(
    images: Iterable[LabelledImage],
    classes: ClassTable,
    *,
    kind: Literal["rle", "polygon"] = "rle",
    parts: bool = False,
    tolerance_px: float = 0.0,
    ignore: str | None = None,
    info: Mapping[str, Any] | None = None,
) -> Iterator[bytes]:
    """One instances file in pieces. The images are gone through once, one at a time; what must be said of them at the
    end of the file, 100 bytes each, waits in a temporary file.

    Category ids are mask values, image ids count from 1 in the order of the images, annotations go by image, then by
    class. `bbox` and `area` are those of the pixels. `score` is the class's confidence, where it is known.

    Args:
        kind: "polygon" writes outlines, of all parts of the annotation. COCO's polygons have no holes, so that an
            annotation with a hole is written as run lengths in any case: no pixel is lost.
        parts: an annotation for each 4-connected part, not for each class; they come in reading order.
        tolerance_px: of outlines, see `polygons_from_labels`. At 0 pycocotools draws the very same masks. At 0.5
            `read_instances` still does; pycocotools, which rounds to fifths of a pixel, misses some along edges.
        ignore: a category for IGNORE pixels, which are background otherwise: annotation tools know no such thing.
        info: of the file; dates make each one different, so there is none by default.
    Raises:
        UnknownClassError: a mask value outside the table.
        UsageError: `ignore` is the name of a class, or tolerance_px is out of range.
    """
    names = dict(enumerate(classes.names, 1))
    if ignore is not None:
        names[value_of_ignore(classes, ignore)] = ignore
    head = {
        "info": {"description": "label maps by weakseg"} if info is None else dict(info),
        "licenses": [],
        "categories": [{"id": value, "name": name, "supercategory": ""} for value, name in names.items()],
    }
    n_annotations = 0
    with SpooledTemporaryFile(_SPOOL_BYTES) as entries:
        yield _json(head)[:-1] + b',\n"annotations":['
        for image_id, image in enumerate(images, 1):
            labels = labels_shown(image.labels, classes, ignore)
            written = []
            for annotation in _annotations(labels, kind, parts, tolerance_px):
                n_annotations += 1
                score = image.confidence.get(annotation["category_id"])
                scored = {} if score is None else {"score": float(score)}
                written.append(_json({"id": n_annotations, "image_id": image_id, **annotation, **scored}))
            if written:
                yield (b",\n" if n_annotations > len(written) else b"\n") + b",\n".join(written)
            height, width = labels.shape
            entry = {"id": image_id, "file_name": image.name, "width": width, "height": height}
            entries.write((b",\n" if image_id > 1 else b"\n") + _json(entry))
        yield b'],\n"images":['
        entries.seek(0)
        yield from iter(partial(entries.read, _READ_BYTES), b"")
    yield b"]}\n"


def read_instances(data: bytes, classes: ClassTable, *, ignore: str | None = None) -> Iterator[LabelledImage]:
    """The label maps of an instances file in the order of its images, one at a time.

    Segmentations are polygons, or run lengths, compressed or not. Categories count by their names; "background" and
    `ignore` are known, too. Later annotations lie over earlier ones; what none covers is background, all of an image
    without annotations. Inside a polygon is what `labels_from_polygons` says; several of one annotation are united.

    Names are as they are in the file: they may point anywhere.

    Raises:
        UnknownClassError: an annotation of a category that is not in the table.
        DataError: no instances file, an annotation without a mask or of an image that is not there, damaged run
            lengths or polygons, another size than the image's, more than MAX_PIXELS pixels or MAX_LAYERS layers.
    """
    content = _parsed(data)
    names = {_id(one, "id", "category"): _field(one, "name", str, "category") for one in _list(content, "categories")}
    entries = {_id(one, "id", "image"): one for one in _list(content, "images")}
    if len(entries) < len(content["images"]):
        raise DataError("expected images with ids of their own, got an id more than once")
    annotations = defaultdict(list)
    for one in _list(content, "annotations"):
        image_id = _id(one, "image_id", "annotation")
        if image_id not in entries:
            raise DataError(f"expected annotations of images in the file, got one of image {image_id!r:.40}")
        annotations[image_id].append(one)

    @cache
    def value_of(category: int | str) -> int:
        if category not in names:
            raise DataError(f"expected a category of the file, got {category!r:.40}")
        return value_of_name(names[category], classes, ignore)

    for image_id, entry in entries.items():
        yield _labelled(entry, annotations.pop(image_id, []), value_of, classes)


# Writing --------------------------------------------------------------------------------------------------------------


def _annotations(
    labels: NDArray[Any], kind: Literal["rle", "polygon"], parts: bool, tolerance_px: float
) -> Iterator[dict[str, Any]]:
    """Everything of an image's annotations but the ids that depend on other images."""
    numbered, objects = _objects(labels, parts)
    polygons = defaultdict(list)
    if kind == "polygon":
        for polygon in polygons_from_labels(numbered, tolerance_px):
            polygons[polygon.value].append(polygon)
    for number, rle in rles_from_labels(numbered).items():
        mine = polygons[number]
        segmentation: Any = {"size": list(labels.shape), "counts": rle.decode("ascii")}
        if mine and not any(polygon.holes for polygon in mine):
            segmentation = [_numbers(polygon.outer) for polygon in mine]
        value, box, area = objects[number - 1]
        yield {"category_id": value, "segmentation": segmentation, "area": area, "bbox": list(box), "iscrowd": 0}


def _objects(labels: NDArray[Any], parts: bool) -> tuple[NDArray[np.int32], list[_Object]]:
    """A map of numbers from 1 on in place of classes, and what has each number."""
    numbered = np.zeros(labels.shape, np.int32)
    objects: list[_Object] = []
    for value in np.unique(labels[labels != BACKGROUND]).tolist():
        mask = (labels == value).astype(np.uint8)
        if parts:
            _, mine, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
            numbered += np.where(mine, mine + len(objects), 0)
            objects += [_Object(value, (x, y, w, h), area) for x, y, w, h, area in stats[1:].tolist()]
        else:
            x, y, w, h = cv2.boundingRect(mask)
            objects.append(_Object(value, (x, y, w, h), cv2.countNonZero(mask)))
            numbered[mask > 0] = len(objects)
    return numbered, objects


def _numbers(ring: NDArray[np.float32]) -> list[float]:
    """x1, y1, x2, y2, …; whole ones as integers, which are shorter."""
    return [int(number) if number.is_integer() else number for number in ring.ravel().tolist()]


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


# Reading --------------------------------------------------------------------------------------------------------------


def _labelled(
    entry: Mapping[str, Any],
    annotations: Sequence[Mapping[str, Any]],
    value_of: Callable[[int | str], int],
    classes: ClassTable,
) -> LabelledImage:
    name = _field(entry, "file_name", str, "image")
    try:
        width, height = (_field(entry, key, int, "image") for key in ("width", "height"))
        labels = blank_labels(width, height, classes, "F")  # by columns, as run lengths are
    except DataError as error:
        raise DataError(f"image {name!r:.200}: {error}") from error
    confidence: dict[int, float] = {}
    total = 0
    for one in annotations:
        try:
            value = value_of(_id(one, "category_id", "annotation"))
            for cost in _paint(labels, value, one.get("segmentation")):
                total += cost
                check_cost(total, labels)
            if one.get("score") is not None:
                confidence[value] = max(_score(one["score"]), confidence.get(value, 0.0))
        except DataError as error:
            raise type(error)(f"annotation {one.get('id')!r:.40} of image {name!r:.200}: {error}") from error
    return LabelledImage(name, np.ascontiguousarray(labels), confidence)


def _paint(labels: NDArray[Any], value: int, segmentation: Any) -> Iterator[int]:
    """Yields what each shape cost, in pixels."""
    if isinstance(segmentation, dict):
        yield _paint_runs(labels, value, _counts(segmentation, labels.shape))
    elif isinstance(segmentation, list) and segmentation:
        for numbers in segmentation:
            yield paint_ring(labels, value, ring_from_numbers(numbers))
    else:
        raise DataError("expected polygons or run lengths as its segmentation, got none: draw a mask, or delete it")


def _counts(segmentation: Mapping[str, Any], shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Runs of zeros and ones in turn, column by column, that add up to the image."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != list(shape):
        raise DataError(f"expected run lengths of height, width {list(shape)}, as the image has, got {size!r:.60}")
    if isinstance(counts, str):
        if not counts.isascii():
            raise DataError("expected COCO run lengths in ASCII, got damaged ones")
        runs = counts_from_string(counts.encode("ascii"))
    elif isinstance(counts, list) and all(type(count) is int for count in counts):
        runs = np.array([min(max(count, -1), MAX_PIXELS + 1) for count in counts], dtype=np.int64)
    else:
        raise DataError("expected run lengths as a text or as a list of integers, got something else")
    n_pixels = shape[0] * shape[1]
    # Each by itself first: sums of huge ones wrap around.
    if ((runs < 0) | (runs > n_pixels)).any() or int(runs.sum()) != n_pixels:
        raise DataError(f"expected run lengths of {shape[0]} x {shape[1]} pixels, got others")
    return runs


def _paint_runs(labels: NDArray[Any], value: int, runs: NDArray[np.int64]) -> int:
    """Touches the pixels of the runs alone: hundreds of small parts have run lengths of the whole image each."""
    flat = labels.T.reshape(-1)  # a view, for the map lies by columns
    end = 0
    for zeros, ones in zip(runs[::2].tolist(), runs[1::2].tolist(), strict=False):
        start = end + zeros
        end = start + ones
        flat[start:end] = value
    return len(runs) + int(runs[1::2].sum())


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"expected a COCO instances file, got damaged or other data: {error}") from error
    if not isinstance(content, dict):
        raise DataError(
            "expected a COCO instances file, an object with images, annotations and categories, got other JSON"
        )
    return content


def _list(content: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    value = content.get(key)
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise DataError(f"expected a COCO instances file with a list of objects as its {key!r}, got another")
    return value


def _field(one: Mapping[str, Any], key: str, kind: type[T], what: str) -> T:
    value = one.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"expected {key!r} of each {what} to be of type {kind.__name__}, got {type(value).__name__}")
    return value


def _id(one: Mapping[str, Any], key: str, what: str) -> int | str:
    """Some tools have texts as ids."""
    value = one.get(key)
    return value if isinstance(value, str) else _field(one, key, int, what)


def _score(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise DataError(f"expected scores from 0 to 1, got {value!r:.40}")
    return float(value)
