"""True masks drawn from an instances file, for weakseg.datasets.truth alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weakseg.classes import BACKGROUND, ignore_value, mask_dtype
from weakseg.datasets.coco_index import Index, index
from weakseg.datasets.sealed import open_sealed
from weakseg.errors import DataError, DatasetError
from weakseg.image import MAX_PIXELS
from weakseg.masks.coco_rle import mask_from_rle, string_from_counts
from weakseg.masks.shapes import paint_ring, ring_from_numbers


@dataclass(frozen=True)
class CocoMasks:
    """Label maps of the images of an instances file; small to pickle, a process looks up the index again.

    values: {category id: mask value}; what has another category is IGNORE.
    """

    path: Path
    sha256: str
    values: Mapping[int, int]

    def where(self, sample_id: str) -> str:
        return f"{self.path}: {sample_id}"

    def has(self, sample_id: str) -> bool:
        """Whether each of the image's annotations has a mask."""
        found = self._index()
        return sample_id in found.rows and bool(found.has_mask[found.rows[sample_id]])

    def read(self, sample_id: str, n_classes: int) -> NDArray[np.uint8] | NDArray[np.uint16]:
        """Raises DatasetError: a mask that is missing or damaged, or an image without a size."""
        found = self._index()
        if not self.has(sample_id):
            raise DatasetError(f"{self.where(sample_id)}: expected a mask for each annotation, got annotations without")
        row = found.rows[sample_id]
        height, width = found.sizes[row].tolist()
        if not 0 < height * width <= MAX_PIXELS:
            raise DatasetError(
                f"{self.where(sample_id)}: expected the height and width of its image, of at most {MAX_PIXELS} pixels, "
                f"got {height} and {width}"
            )
        try:
            annotations = _annotations(self.path, found.spans[found.span_starts[row] : found.span_starts[row + 1]])
            return labels_from_annotations(annotations, self.values, height, width, mask_dtype(n_classes))
        except DataError as error:
            raise DatasetError(f"{self.where(sample_id)}: {error}") from error

    def _index(self) -> Index:
        found = index(self.path)
        if found.sha256 != self.sha256:
            raise DatasetError(f"{self.path} has changed since it was opened: run the same command again")
        return found


def labels_from_annotations(
    annotations: Sequence[Mapping[str, Any]],
    values: Mapping[int, int],
    height: int,
    width: int,
    dtype: type[np.uint8 | np.uint16],
) -> NDArray[Any]:
    """(height, width) label map of one image's annotations: the smaller over the larger, of equal ones the later.

    Crowds (`iscrowd`) are IGNORE. Inside a polygon is what weakseg.masks.polygons says; those of one annotation unite.

    Raises:
        DataError: no polygons or run lengths, damaged ones, or run lengths of another size.
    """
    labels: NDArray[Any] = np.full((height, width), BACKGROUND, dtype=dtype)
    shapes = []
    for annotation in annotations:
        mask = mask_from_segmentation(annotation["segmentation"], height, width)
        value = values.get(annotation["category_id"], ignore_value(labels))
        shown = ignore_value(labels) if annotation.get("iscrowd") else value
        shapes.append((np.count_nonzero(mask), shown, np.packbits(mask)))
    for _, value, packed in sorted(shapes, key=lambda shape: -shape[0]):
        labels[np.unpackbits(packed, count=labels.size).reshape(labels.shape) > 0] = value
    return labels


def mask_from_segmentation(segmentation: Any, height: int, width: int) -> NDArray[np.uint8]:
    """(height, width) of 0 and 1: polygons, or run lengths, compressed or not."""
    if isinstance(segmentation, list):
        mask = np.zeros((height, width), dtype=np.uint8)
        for numbers in segmentation:
            paint_ring(mask, 1, ring_from_numbers(numbers))
        return mask
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        raise DataError(f"expected polygons, or run lengths of a size [{height}, {width}], got {segmentation!r:.80}")
    counts = segmentation.get("counts")
    if isinstance(counts, list) and all(type(count) is int and 0 <= count <= height * width for count in counts):
        counts = string_from_counts(np.array(counts, dtype=np.int64)).decode()
    if not isinstance(counts, str) or not counts.isascii():
        raise DataError("expected run lengths as a text or a list of counts, got something else")
    return mask_from_rle(counts.encode(), height, width).astype(np.uint8)


def _annotations(path: Path, spans: NDArray[np.int64]) -> list[dict[str, Any]]:
    out = []
    with open_sealed(path) as file:
        for begin, end in spans.tolist():
            file.seek(begin)
            try:
                out.append(json.loads(file.read(end - begin)))
            except ValueError as error:
                raise DatasetError(f"expected an annotation at byte {begin}, got something else: {error}") from error
    return out
