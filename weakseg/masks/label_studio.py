"""Label Studio: masks as predictions that people correct, and what they have corrected back.

A task has one region for each class: a brush mask, which is exact, or polygons. Source: labelstud.io/guide/predictions,
labelstud.io/guide/export.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray

from weakseg.classes import BACKGROUND, ClassTable, voc_palette
from weakseg.errors import DataError
from weakseg.masks.keyholes import one_ring
from weakseg.masks.label_studio_rle import mask_from_rle, rle_from_mask
from weakseg.masks.labelled import LabelledImage
from weakseg.masks.polygons import polygons_from_labels
from weakseg.masks.shapes import blank_labels, check_cost, labels_shown, paint_ring, ring_from_numbers, value_of_name

Kind = Literal["brush", "polygon"]
IMAGE = "image"  # name of the tag that shows it, and key of its URL in a task's data
TOLERANCE_PX = 0.5  # of polygons: no pixel changes
_UPLOAD = re.compile(r"^[0-9a-f]{8}-")  # Label Studio puts it before the names of files that are uploaded
_NO_REGIONS = frozenset({"choices", "textarea", "rating", "number", "datetime", "taxonomy", "pairwise", "ranker"})


def tasks_json(
    images: Iterable[LabelledImage],
    classes: ClassTable,
    *,
    kind: Kind = "brush",
    model_version: str = "",
    image_url: Callable[[str], str] = str,
) -> Iterator[bytes]:
    """A file of tasks with predictions, in pieces, an image in memory at a time. IGNORE is background.

    The same images give the same bytes: ids of regions come from names.

    Args:
        image_url: where Label Studio finds an image by its name, e.g. below /data/local-files/?d=.
    Raises:
        UnknownClassError: a mask value outside the table.
    """
    before = b"["
    for image in images:
        regions = list(regions_from_labels(image, classes, kind))
        scores = [region["score"] for region in regions if "score" in region]
        prediction: dict[str, Any] = {"model_version": model_version, "result": regions}
        if scores:
            prediction["score"] = round(sum(scores) / len(scores), 6)
        task = {"data": {IMAGE: image_url(image.name)}, "predictions": [prediction]}
        yield before + b"\n" + json.dumps(task, ensure_ascii=False, separators=(",", ":")).encode()
        before = b","
    yield b"[]\n" if before == b"[" else b"\n]\n"


def regions_from_labels(image: LabelledImage, classes: ClassTable, kind: Kind) -> Iterator[dict[str, Any]]:
    """A brush region for each class, or a polygon region for each of its parts, by mask value.

    Label Studio's polygons have no holes: they are reached over bridges, see weakseg.masks.keyholes.
    """
    labels = labels_shown(image.labels, classes)
    height, width = labels.shape
    for value, geometry in _brushes(labels) if kind == "brush" else _polygons(labels):
        name = classes.names[value - 1]
        seed = json.dumps([image.name, name, kind, geometry if kind == "polygon" else None])
        region: dict[str, Any] = {
            "id": hashlib.blake2b(seed.encode(), digest_size=6).hexdigest(),
            "from_name": kind,
            "to_name": IMAGE,
            "type": f"{kind}labels",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": geometry | {f"{kind}labels": [name]},
        }
        if value in image.confidence:
            region["score"] = round(float(image.confidence[value]), 6)
        yield region


def label_config(classes: ClassTable, kind: Kind = "brush") -> str:
    """The labelling interface of a project that shows these tasks, classes in the VOC colours."""
    palette = voc_palette()
    tag = {"brush": "BrushLabels", "polygon": "PolygonLabels"}[kind]
    colours = ["#" + bytes(palette[(i + 1) % len(palette)]).hex() for i in range(len(classes))]
    labels = [
        f"    <Label value={quoteattr(name)} background={quoteattr(colour)}/>"
        for name, colour in zip(classes.names, colours, strict=True)
    ]
    lines = [
        "<View>",
        f'  <Image name="{IMAGE}" value="${IMAGE}" zoom="true" zoomControl="true"/>',
        f'  <{tag} name="{kind}" toName="{IMAGE}">',
        *labels,
        f"  </{tag}>",
        "</View>",
    ]
    return "\n".join(lines) + "\n"


def read_export(data: bytes, classes: ClassTable) -> Iterator[LabelledImage]:
    """The annotations of a JSON export, as label maps.

    Of several annotations of a task the newest one counts that was not skipped. Later regions lie over earlier ones;
    what no region covers is background. Left out are tasks that nobody has annotated, and annotations without any
    region: the file does not say how large their image is.

    Raises:
        DataError: no such export, or a region that is damaged, of another kind, or on a turned image.
        UnknownClassError: a label that is no class.
    """
    for number, task in enumerate(_tasks(data), start=1):
        try:
            annotation = _newest(task)
            if annotation is None:
                continue
            regions = [one for one in annotation["result"] if one.get("type") not in _NO_REGIONS]
            if regions:
                yield LabelledImage(_image_name(task["data"]), _labels(regions, classes))
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise DataError(f"task {number}: expected Label Studio's fields, got others: {error!r}") from error
        except DataError as error:
            raise type(error)(f"task {number}: {error}") from error


def _brushes(labels: NDArray[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    for value in np.unique(labels):
        if value != BACKGROUND:
            yield int(value), {"format": "rle", "rle": rle_from_mask(labels == value)}


def _polygons(labels: NDArray[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    percent = 100 / np.array(labels.shape[::-1], dtype=np.float64)
    for polygon in polygons_from_labels(labels, TOLERANCE_PX):
        points = (one_ring(polygon) * percent).round(6)
        yield polygon.value, {"points": points.tolist(), "closed": True}


def _tasks(data: bytes) -> list[Any]:
    try:
        tasks = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"expected a JSON export of Label Studio, got no JSON: {error}") from error
    if not isinstance(tasks, list) or not all(isinstance(task, dict) and "data" in task for task in tasks):
        raise DataError("expected a JSON export of Label Studio, a list of tasks: choose the format JSON, not JSON-MIN")
    return tasks


def _newest(task: Mapping[str, Any]) -> Mapping[str, Any] | None:
    done = [one for one in task.get("annotations", ()) if not one.get("was_cancelled")]
    times = [str(one.get("updated_at") or one.get("created_at") or "") for one in done]
    return done[max(range(len(done)), key=lambda i: (times[i], i))] if done else None


def _image_name(data: Mapping[str, Any]) -> str:
    """Of a URL as Label Studio has it: below a local folder, uploaded, or anywhere."""
    url = str(data[IMAGE] if IMAGE in data else next(iter(data.values())))
    parts = urlsplit(url)
    local = parse_qs(parts.query).get("d")
    if local and parts.path.rstrip("/").endswith("/data/local-files"):
        return local[0]
    path = unquote(parts.path).lstrip("/")
    folder, _, name = path.rpartition("/")
    if folder.startswith("data/upload"):
        return _UPLOAD.sub("", name)
    return path


def _labels(regions: list[Any], classes: ClassTable) -> NDArray[Any]:
    sizes = {(int(one["original_width"]), int(one["original_height"])) for one in regions}
    if len(sizes) > 1:
        raise DataError(f"expected regions of one image size, got {', '.join(f'{w}x{h}' for w, h in sorted(sizes))}")
    labels, cost = blank_labels(*sizes.pop(), classes), 0
    for region in regions:
        cost += _paint(labels, region, classes)
        check_cost(cost, labels)
    return labels


def _paint(labels: NDArray[Any], region: Mapping[str, Any], classes: ClassTable) -> int:
    """Returns the cost, in pixels."""
    kind, geometry = region["type"], region["value"]
    if kind not in ("brushlabels", "polygonlabels"):
        raise DataError(f"expected regions of brushes or polygons, got {kind!r}: only these are masks")
    if region.get("image_rotation"):
        raise DataError(f"expected images that are not turned, got one by {region['image_rotation']} degrees")
    names = geometry[kind]
    if len(names) != 1:
        raise DataError(f"expected one label for each region, got {', '.join(map(str, names)) or 'none'}")
    value = value_of_name(str(names[0]), classes)
    height, width = labels.shape
    if kind == "polygonlabels":
        ring = ring_from_numbers([x for point in geometry["points"] for x in point])
        return paint_ring(labels, value, ring * [width / 100, height / 100])
    if geometry.get("format", "rle") != "rle":
        raise DataError(f"expected brush masks as run lengths, got the format {geometry['format']!r}")
    labels[mask_from_rle(geometry["rle"], height, width)] = value
    return labels.size
